"""Verifiers, one file per TEE: evidence and policy in, what was proven and how it is judged out."""
