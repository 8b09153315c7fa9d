"""Neural state machines, discrete codes and hybrids in PyTorch: the package under the book."""

__version__ = "0.2.0"
