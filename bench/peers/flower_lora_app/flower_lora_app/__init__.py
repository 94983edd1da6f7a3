"""A Flower app: sequence classification with a sentence encoder, LoRA and FedAvg."""
