"""Method 2 (`split`): sealed features in, a far side tuned in the server enclave, predictions out."""
