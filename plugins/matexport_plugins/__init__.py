"""The custom ops of matexport: Mamba2Scan and CausalConv1d, each with its specification beside it."""

__version__ = "0.1.0"
