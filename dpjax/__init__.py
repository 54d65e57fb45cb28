"""Fine-tune pretrained models under differential privacy, in JAX."""

__version__ = "0.1.0"
