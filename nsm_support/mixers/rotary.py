"""Rotary positions, for every attention of the book."""

import torch
from torch import Tensor


def rotate(x: Tensor, start: int = 0) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864, equation 34) on x [B,H,T,K], the first at `start`.

    Products of rotated queries and keys depend on their distance alone. Angles are computed in float64: at position
    100,000 a float32 angle is off by a hundredth. Half precision is turned in float32, and rounded afterwards.
    """
    half, precise = x.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32)
    frequency = 10_000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = torch.arange(start, start + x.shape[-2], device=x.device, dtype=torch.float64)[:, None] * frequency
    turn = torch.polar(torch.ones_like(angle), angle).to(precise.to_complex())  # (T, K/2)
    # pairs (x_1, x_2) as complex numbers, each turned by its angle
    pairs = torch.view_as_complex(x.to(precise).unflatten(-1, (half, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
