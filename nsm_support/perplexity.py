"""Perplexity of a text longer than a model's window: every token is scored once, overlapping context never."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def token_losses(
    model: Callable[[Tensor], Tensor], tokens: Tensor, *, window: int, stride: int | None = None, batch_size: int = 16
) -> Tensor:
    """−ln p(token t | those before it in its window) of every token but the first: nats, [n−1] float64.

    Windows begin `stride` tokens apart. In each, only what the window before did not reach is scored; the rest is
    context. The last window ends with the text and overlaps as far as it must. So each token is scored exactly once,
    and with `window` − `stride` + 1 tokens of context at least, but for those of the first window.

    Args:
        model: token numbers [B,T] → logits [B,T,V], in eval mode if it has one.
        tokens: [n], n ≥ 2.
        window: T, most tokens that the model is given at once.
        stride: 1 … window; None for `window`: no overlap, each token read once.
        batch_size: windows at a time; changes time and memory only.

    Raises:
        ValueError: for tokens of another shape, a window below 1, or a stride outside 1 … window.
    """
    stride = window if stride is None else stride
    if tokens.dim() != 1 or len(tokens) < 2:
        raise ValueError(f"tokens have shape [n], n at least 2; got {list(tokens.shape)}")
    if window < 1 or not 1 <= stride <= window:
        raise ValueError(f"window is at least 1 and stride lies in 1 … window; got {window!r} and {stride!r}")
    n = len(tokens) - 1  # tokens to score
    window = min(window, n)
    starts = torch.arange(0, n - window + stride, stride).clamp(max=n - window).tolist()
    losses = torch.empty(n, dtype=torch.float64, device=tokens.device)
    scored = 0
    for first in range(0, len(starts), batch_size):
        chosen = starts[first : first + batch_size]
        logits = model(torch.stack([tokens[start : start + window] for start in chosen]))  # (B, T, V)
        targets = torch.stack([tokens[start + 1 : start + window + 1] for start in chosen])
        nats = F.cross_entropy(logits.mT, targets, reduction="none").double()
        for start, row in zip(chosen, nats, strict=True):
            losses[scored : start + window] = row[scored - start :]
            scored = start + window
    return losses


def perplexity(losses: Tensor) -> float:
    """e to the mean of losses in nats: of V equally likely tokens, V."""
    return math.exp(losses.double().mean().item())
