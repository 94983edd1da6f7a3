"""Verifiers, one file per TEE: evidence and policy in, what was proven and how it is judged out."""

__all__: list[str] = []
