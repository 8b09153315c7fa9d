"""Causal attention of the BlockFFN family, ordinary and latent, of all tokens or of some queries alone.

Letters: B batch, T tokens, D token width, H heads, K width of a head's keys, V of its values, Q queries.

Parameters bear the names of the published checkpoints. There is no bias anywhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsm_support.mixers.cache import Cache

CHUNK = 128  # queries at a time in `attend_at`: many enough for a matrix product, few enough to skip later keys


def rotate_half(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary positions as the checkpoints have them: number i of a head is turned together with number i + K/2.

    x [B,H,T,K], positions [T] or [B,T] → [B,H,T,K]. Su et al. 2021 (arXiv:2104.09864, equation 34) turns neighbours, as
    `nsm_support.mixers.rotary` does: the same up to the order of a head's numbers, which trained weights fix. Angles are
    computed in float64.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = positions[..., None, :, None] * frequency  # (1, T, K/2) or (B, 1, T, K/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def attend_at(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Causal attention of the queries q [B,H,Q,K] that stand at `positions` [B,Q], over all keys and values [B,H,T,·].

    A chunk of queries meets the keys up to its last position and no others, so that with sorted positions half the
    queries cost half the time. A mask over all keys would cost what all queries cost under a causal mask.
    """
    heard = []
    for queries, at in zip(q.split(CHUNK, 2), positions.split(CHUNK, 1), strict=True):
        end = int(at.max()) + 1
        seen = torch.arange(end, device=at.device) <= at[:, None, :, None]  # (B, 1, chunk, end)
        heard.append(F.scaled_dot_product_attention(queries, k[:, :, :end], v[:, :, :end], seen, enable_gqa=True))
    return torch.cat(heard, 2)


class CausalAttention(nn.Module):
    """What both kinds share. Each adds `queries` (x, positions) → [B,H,Q,K], and `keys_values` → [B,H,T,K], [B,H,T,V]."""

    o_proj: nn.Linear

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Tokens [B,T,D] → [B,T,D], each from itself and those before it.

        With `positions` [B,Q], sorted, only the outputs at these places [B,Q,D]: keys and values are made of all
        tokens, but queries, their products and the output projection of these alone.
        """
        k, v, V = self._padded(x)
        if positions is None:
            q = self.queries(x, _places(x))
            heard = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            chosen = x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))  # (B, Q, D)
            heard = attend_at(self.queries(chosen, positions), k, v, positions)
        return self.o_proj(heard[..., :V].transpose(1, 2).flatten(-2))

    def start(self, batch_size: int) -> Cache:
        """No keys and values yet, as wide and as many as a token's."""
        k = self._padded(self.o_proj.weight.new_zeros(batch_size, 1, self.o_proj.out_features))[0]
        return Cache.empty(k, batch_size, k.shape[1], k.shape[-1])

    def go_on(self, x: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """`forward` of the first tokens [B,T,D] of a stream, or of the next one [B,1,D]; and the cache after."""
        k, v, V = self._padded(x, cache.length)
        heard, cache = cache.attend(self.queries(x, _places(x, cache.length)), k, v)
        return self.o_proj(heard[..., :V].transpose(1, 2).flatten(-2)), cache

    def _padded(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, int]:
        """Keys and values of equal width, for the path that never holds T × T numbers; and the values' own width."""
        k, v = self.keys_values(x, start)
        return k, F.pad(v, (0, max(0, k.shape[-1] - v.shape[-1]))), v.shape[-1]

    def queries(self, x: Tensor, positions: Tensor) -> Tensor:
        raise NotImplementedError

    def keys_values(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class Attention(CausalAttention):
    """Multi-head attention with rotary positions (published `attention_type` "vanilla"); with fewer heads of keys than of
    queries, a group of queries shares one (Ainslie et al. 2023, arXiv:2305.13245).
    """

    def __init__(self, dim: int, num_heads: int, num_key_value_heads: int, theta: float):
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.theta = num_heads, num_key_value_heads, theta
        width = dim // num_heads * num_key_value_heads
        self.q_proj, self.o_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.k_proj, self.v_proj = nn.Linear(dim, width, bias=False), nn.Linear(dim, width, bias=False)

    def queries(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotate_half(_heads(self.q_proj(x), self.num_heads), positions, self.theta)

    def keys_values(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        k, v = (_heads(proj(x), self.num_key_value_heads) for proj in (self.k_proj, self.v_proj))
        return rotate_half(k, _places(x, start), self.theta), v


class LatentAttention(CausalAttention):
    """Multi-head latent attention (published `attention_type` "mla"; DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Queries, and keys with values, pass through narrow layers (`q_lora_rank`, `kv_lora_rank`), each with a norm. A head's
    query and key are `qk_nope_head_dim` numbers without a position, then `qk_rope_head_dim` rotary ones, whose key all
    heads share. The two norms have eps 1e-6 whatever the model's is, as in the published code.
    """

    def __init__(self, dim: int, num_heads: int, nope: int, rope: int, q_rank: int, kv_rank: int, theta: float):
        super().__init__()
        self.num_heads, self.nope, self.rope, self.theta = num_heads, nope, rope, theta
        self.value = dim // num_heads
        self.q_a_proj = nn.Linear(dim, q_rank, bias=False)
        self.q_a_layernorm = nn.RMSNorm(q_rank, eps=1e-6)
        self.q_b_proj = nn.Linear(q_rank, num_heads * (nope + rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(dim, kv_rank + rope, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(kv_rank, eps=1e-6)
        self.kv_b_proj = nn.Linear(kv_rank, num_heads * (nope + self.value), bias=False)
        self.o_proj = nn.Linear(num_heads * self.value, dim, bias=False)

    def queries(self, x: Tensor, positions: Tensor) -> Tensor:
        q = _heads(self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))), self.num_heads)
        plain, turned = q.split((self.nope, self.rope), -1)
        return torch.cat((plain, rotate_half(turned, positions, self.theta)), -1)

    def keys_values(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        latent, turned = self.kv_a_proj_with_mqa(x).split((self.kv_a_layernorm.weight.shape[0], self.rope), -1)
        k, v = _heads(self.kv_b_proj(self.kv_a_layernorm(latent)), self.num_heads).split((self.nope, self.value), -1)
        turned = rotate_half(turned[:, None], _places(x, start), self.theta)  # (B, 1, T, rope)
        return torch.cat((k, turned.expand(-1, self.num_heads, -1, -1)), -1), v


def _places(x: Tensor, start: int = 0) -> Tensor:
    """The positions [T] of tokens [B,T,D], the first at `start`."""
    return torch.arange(start, start + x.shape[1], device=x.device)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B,T,H·K] → [B,H,T,K]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
