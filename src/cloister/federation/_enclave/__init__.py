"""Method 1 (`enclave`): adapters that live in enclaves, trained in rounds and aggregated in the server enclave."""
