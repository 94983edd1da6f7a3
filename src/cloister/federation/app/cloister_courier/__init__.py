"""Flower app of cloister. The couriers themselves are in the installed package, not in the bundle."""
