"""What a causal attention remembers of a stream: the keys and values of all tokens so far."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SPARE = 256  # places by which the memory grows: copying it costs 1/256 of reading it


class Cache(NamedTuple):
    """Keys [B,H,≥ length,K] and values [B,H,≥ length,V] of `length` tokens. A value: no call changes it.

    The places from `length` on are free. Caches that come of each other share their memory as long as nobody else has
    written to the place that comes next; otherwise `append` copies.
    """

    keys: Tensor
    values: Tensor
    length: int
    written: list[int]  # one number, shared with the memory: places of it that are written

    @classmethod
    def empty(cls, like: Tensor, batch_size: int, heads: int, key: int, value: int | None = None) -> "Cache":
        """No tokens yet, in the dtype and on the device of `like`."""
        keys = like.new_zeros(batch_size, heads, 0, key)
        return cls(keys, keys if value is None else like.new_zeros(batch_size, heads, 0, value), 0, [0])

    def append(self, keys: Tensor, values: Tensor) -> "Cache":
        """The cache with keys and values [B,H,n,·] of n tokens more."""
        end, memory, written = self.length + keys.shape[2], [self.keys, self.values], self.written
        frozen = self.keys.is_inference() and not torch.is_inference_mode_enabled()
        if end > self.keys.shape[2] or written[0] != self.length or frozen:
            free = (0, 0, 0, end + SPARE - self.length)
            memory = [F.pad(x[:, :, : self.length].to(keys.dtype), free) for x in memory]
            written = [self.length]
        for old, new in zip(memory, (keys, values), strict=True):
            old[:, :, self.length : end] = new
        written[0] = end
        return Cache(memory[0], memory[1], end, written)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, "Cache"]:
        """Causal attention of the next token's queries [B,H,1,K], or of all first ones, over all keys; and the cache after.

        With fewer heads of keys than of queries, a group of queries shares one.
        """
        after = self.append(keys, values)
        grouped = q.shape[1] != keys.shape[1]
        k, v = after.keys[:, :, : after.length], after.values[:, :, : after.length]
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=grouped), after
