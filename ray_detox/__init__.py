"""Make an encoder-decoder language model less toxic with PPO, on Ray."""

__version__ = "0.1.0"
