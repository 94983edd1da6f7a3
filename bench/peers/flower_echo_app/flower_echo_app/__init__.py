"""A Flower app that does nothing but carry an empty message there and back."""
