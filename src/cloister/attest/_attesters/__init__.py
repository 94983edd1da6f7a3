"""Attesters, one file per TEE: what an enclave calls to get evidence about itself."""
