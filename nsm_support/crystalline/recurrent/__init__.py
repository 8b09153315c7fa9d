"""A recurrent machine whose state is one code, and its training."""
