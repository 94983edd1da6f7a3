"""The simulated platforms: software roots that issue byte-true evidence, all of it stamped SIMULATED."""
