"""Random inputs by their seed, as the tests of all threads draw them."""

import torch


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def numbers(*shape: int, below: int = 23, seed: int = 0) -> torch.Tensor:
    """Whole numbers from 0 to `below` − 1."""
    return torch.randint(below, shape, generator=generator(seed))
