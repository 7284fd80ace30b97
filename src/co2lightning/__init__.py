"""A2C, SAC and PPO controllers that cut the CO2 of a charging site, on PyTorch Lightning."""

__version__ = "0.1.0"
