"""Neural state machines, discrete codes and hybrids in PyTorch, and the pipeline that publishes their book."""
