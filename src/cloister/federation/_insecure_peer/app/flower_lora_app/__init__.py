"""The unprotected peer: LoRA and FedAvg in the clear. The apps themselves are in the installed package."""
