"""What a token hears: its neighbours in a sliding window, the states it reads, and a mix of the two.

Letters: B batch, T tokens, D token width, H heads, K width of a head, W window.
"""

import math
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsm_support.checks import check, check_choice, check_shape, check_sizes
from nsm_support.mixers.rotary import rotate

MIXES = ("gate", "sum", "fixed", "local", "read")


def visible(distance: Tensor, window: int, causal: bool) -> Tensor:
    """Which distances (query position minus key position) a window shows: 0 … W−1, or up to W−1 both ways."""
    return (distance < window) & (distance > (-1 if causal else -window))


@lru_cache(maxsize=32)
def _block_mask(tokens: int, window: int, causal: bool, device: torch.device) -> Tensor:
    """[1, N, W, 2W or 3W]: for N blocks of W queries, which keys of the blocks around they see."""
    blocks = -(-tokens // window)
    with torch.inference_mode(False):  # the mask is kept: one made in inference mode could not serve in training
        query = torch.arange(blocks * window, device=device).view(blocks, window, 1)
        first = torch.arange(-1, blocks - 1, device=device)[:, None, None] * window  # one block back
        key = first + torch.arange((2 if causal else 3) * window, device=device)
        return (visible(query - key, window, causal) & (key >= 0) & ((key < tokens) | (key == query)))[None]


def local_attention(q: Tensor, k: Tensor, v: Tensor, window: int, causal: bool, mask: Tensor | None = None) -> Tensor:
    """Sliding-window attention in blocks, O(T·W): q, k, v [B,H,T,K] → [B,H,T,K].

    Token t sees itself and the W−1 tokens before it; bidirectionally also the W−1 after it (Beltagy et al. 2020,
    arXiv:2004.05150, section 3.1). Blocks of W queries meet the blocks of keys around them in one call of
    `scaled_dot_product_attention`. Keys where `mask` [B,T] is False are seen by nobody but themselves.
    """
    B, H, T, K = q.shape
    window = min(window, T)
    N = -(-T // window)
    pad = N * window - T

    def blocks(x):  # (B·H, N, W, K); N stands where the kernel expects heads
        return F.pad(x, (0, 0, 0, pad)).reshape(B * H, N, window, x.shape[-1])

    def around(x):  # (B·H, N, 2W or 3W, K)
        x = F.pad(x, (0, 0, 0, 0, 1, 0 if causal else 1))
        parts = (x[:, :-1], x[:, 1:]) if causal else (x[:, :-2], x[:, 1:-1], x[:, 2:])
        return torch.cat(parts, 2)

    shown = _block_mask(T, window, causal, q.device)
    if mask is not None:
        real = around(blocks(mask[:, None, :, None].expand(B, H, T, 1)))[..., 0]  # (B·H, N, 2W or 3W)
        itself = torch.eye(window, dtype=torch.bool, device=q.device)
        itself = F.pad(itself, (window, 0 if causal else window))
        shown = shown & (real[:, :, None] | itself)
    out = F.scaled_dot_product_attention(blocks(q), around(blocks(k)), around(blocks(v)), attn_mask=shown)
    return out.reshape(B, H, N * window, K)[:, :, :T]


def local_attention_reference(q, k, v, window, causal, mask=None):
    """The definition of `local_attention`: all T×T logits, those outside the window masked. O(T²)."""
    position = torch.arange(q.shape[-2], device=q.device)
    distance = position[:, None] - position
    shown = visible(distance, window, causal)[None, None]
    if mask is not None:
        shown = shown & (mask[:, None, None, :] | (distance == 0))
    logits = torch.einsum("bhtk,bhuk->bhtu", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhtu,bhuk->bhtk", logits.masked_fill(~shown, -math.inf).softmax(-1), v)


class HybridAttention(nn.Module):
    """Sliding-window attention among tokens, mixed with what the tokens read from the states.

    Args:
        token_dim: width D of a token.
        num_heads: heads H of the window.
        window: W, tokens that a token sees on one side, itself included.
        causal: look back only.
        mix: "gate", g·local + (1−g)·read with g learned per token; "fixed", the same with g = `alpha`; "sum", local + read;
            "local" and "read", one alone.
        alpha: share of the window for "fixed", 0 … 1.
        rotary: rotary positions inside the window.
        state_dim: width M of the states, needed only to call the module on states that are not D wide.

    Raises ValueError for an unknown mix, an alpha outside 0 … 1, or sizes that do not fit.
    """

    def __init__(
        self,
        token_dim: int,
        num_heads: int = 4,
        window: int = 16,
        *,
        causal: bool = False,
        mix: str = "gate",
        alpha: float = 0.5,
        rotary: bool = False,
        state_dim: int | None = None,
    ):
        super().__init__()
        check_sizes(self, token_dim=token_dim, num_heads=num_heads, window=window)
        check(self, not token_dim % num_heads, "a multiple of num_heads", token_dim=token_dim, num_heads=num_heads)
        check_choice(self, MIXES, mix=mix)
        check(self, 0 <= alpha <= 1, "0 … 1, the share of the window", alpha=alpha)
        odd = rotary and token_dim // num_heads % 2
        check(self, not odd, "an even width per head for rotary positions", token_dim=token_dim, num_heads=num_heads)
        self.token_dim, self.num_heads, self.window, self.causal = token_dim, num_heads, window, causal
        self.mix, self.alpha, self.rotary = mix, alpha, rotary
        if mix != "read":
            self.qkv, self.out = nn.Linear(token_dim, 3 * token_dim, bias=False), nn.Linear(token_dim, token_dim)
        if mix == "gate":
            self.gate = nn.Linear(token_dim, 1)
        self.state_proj = nn.Linear(state_dim, token_dim) if state_dim not in (None, token_dim) else None

    def forward(self, tokens: Tensor, states: Tensor, weights: Tensor) -> Tensor:
        """Tokens [B,T,D] hear their window, and states [B,S,M] through routing weights [B,T,S] → [B,T,D]."""
        check_shape(self, "tokens", tokens, "B T D", D=self.token_dim)
        values = states if self.state_proj is None else self.state_proj(states)
        check_shape(self, "states (give state_dim where they are not token_dim wide)", values, "B S D", D=self.token_dim)
        local = self.local(tokens)
        heard = tokens if local is None else tokens + local
        return self.combine(heard, local, weights @ values)

    def local(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """What tokens [B,T,D] hear in their window [B,T,D]; None where the mix is "read"."""
        if self.mix == "read":
            return None
        q, k, v = self.project(tokens)
        heard = local_attention(q, k, v, self.window, self.causal, mask)
        return self.out(heard.transpose(1, 2).flatten(-2))

    def project(self, tokens: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values [B,H,T,K] of tokens [B,T,D], the first at position `start`."""
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return (rotate(q, start), rotate(k, start), v) if self.rotary else (q, k, v)

    def share(self, heard: Tensor) -> Tensor | None:
        """The window's share g [B,T,1] in the mix of tokens that have heard it; None for "sum"."""
        if self.mix == "gate":
            return self.gate(heard).sigmoid()
        alpha = {"fixed": self.alpha, "local": 1.0, "read": 0.0}.get(self.mix)
        return None if alpha is None else heard.new_full((*heard.shape[:-1], 1), alpha)

    def combine(self, heard: Tensor, local: Tensor | None, read: Tensor | None) -> Tensor:
        """Mix local and read [B,T,D]; `heard` is the token with its window, from which the gate decides."""
        if self.mix in ("local", "read"):
            return cast(Tensor, local if self.mix == "local" else read)
        local, read = cast(tuple[Tensor, Tensor], (local, read))
        # out = g·local + (1 − g)·read
        share = self.share(heard)
        return local + read if share is None else torch.lerp(read, local, share)
