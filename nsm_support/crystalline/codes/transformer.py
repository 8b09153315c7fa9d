"""A causal transformer whose attention and MLP outputs pass a discrete bottleneck.

Letters: B batch, T tokens, D width, H heads, V vocabulary, K codes. Pre-norm blocks, positions that are rotary or learned,
and an embedding that is not tied to the head.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsm_support.checks import check, check_choice, check_shape, check_sizes
from nsm_support.crystalline.codes.bottleneck import Bottleneck, BottleneckConfig
from nsm_support.crystalline.codes.schedules import temperature_at
from nsm_support.mixers.cache import Cache
from nsm_support.mixers.rotary import rotate
from nsm_support.models import Stream, StreamedModel, Trace

Positions = Literal["rotary", "learned"]
POSITIONS = get_args(Positions)

Info = dict[str, dict[str, Tensor]]
"""What the two bottlenecks of a block did: "attn" and "mlp", each as `Bottleneck.forward` gives it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CrystallineConfig:
    """Sizes of a transformer. Raises ValueError for sizes that do not fit, naming them."""

    vocab_size: int  #: V
    token_dim: int = 128  #: D
    num_layers: int = 3
    num_heads: int = 4  #: H; the width of a head, D/H, is even
    max_length: int = 256  #: the longest sequence accepted
    dropout: float = 0.0  #: of attention and MLP outputs, before the bottleneck
    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)
    bypass: bool = True  #: whether a residual connection leads around each bottleneck
    positions: Positions = "rotary"  #: distances inside attention, or a vector added for each place
    embedding_std: float = 1.0  #: of the token vectors at the start: the smaller, the sooner tokens of one use come together

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "token_dim", "num_layers", "num_heads", "max_length")
        check(self, not self.token_dim % (2 * self.num_heads), "token_dim a multiple of 2 · num_heads", "token_dim", "num_heads")
        check_choice(self, POSITIONS, "positions")
        check(self, 0 <= self.dropout < 1, "0 to below 1", "dropout")
        check(self, self.embedding_std > 0, "above 0", "embedding_std")


class ModelConfig(CrystallineConfig):
    """`CrystallineConfig` under the names of the first notebooks: dim, n_layers, n_heads and max_seq_len."""

    __slots__ = ()

    def __init__(self, **sizes: Any):
        names = {"dim": "token_dim", "n_layers": "num_layers", "n_heads": "num_heads", "max_seq_len": "max_length"}
        super().__init__(**{names.get(name, name): size for name, size in sizes.items()})


class Block(nn.Module):
    """Causal self-attention, then an MLP, each through a bottleneck Q: x + Q(f(x)), or Q(x + f(x)) without bypass."""

    def __init__(self, config: CrystallineConfig):
        super().__init__()
        D = config.token_dim
        self.num_heads, self.bypass, self.positions = config.num_heads, config.bypass, config.positions
        self.attn_norm, self.mlp_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.dropout = nn.Dropout(config.dropout)
        self.attn_bottleneck, self.mlp_bottleneck = (Bottleneck(D, config.bottleneck) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Info]:
        """x [B,T,D] → [B,T,D], and what the bottlenecks did."""
        return self._finish(x, self._attention(x))

    def start(self, batch_size: int) -> Cache:
        D = self.out.in_features
        return Cache.empty(self.out.weight, batch_size, self.num_heads, D // self.num_heads)

    def go_on(self, x: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        mixed, cache = cache.attend(*self._project(x, cache.length))
        return self._finish(x, self._merge(mixed))[0], cache

    def _finish(self, x: Tensor, change: Tensor) -> tuple[Tensor, Info]:
        x, attn = self._through(self.attn_bottleneck, x, change)
        x, mlp = self._through(self.mlp_bottleneck, x, self._mlp(x))
        return x, {"attn": attn, "mlp": mlp}

    def _through(self, bottleneck: Bottleneck, x: Tensor, change: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.bypass:  # what comes after knows the codes and nothing else
            return bottleneck(x + change)
        codes, info = bottleneck(change)
        return x + codes, info

    def _attention(self, x: Tensor) -> Tensor:
        return self._merge(F.scaled_dot_product_attention(*self._project(x), is_causal=True))

    def _merge(self, mixed: Tensor) -> Tensor:
        """[B,H,T,D/H] → [B,T,D]"""
        return self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))

    def _project(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B,H,T,D/H] of x [B,T,D], the first at position `start`."""
        qkv = self.qkv(self.attn_norm(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D/H)
        q, k, v = qkv
        if self.positions == "rotary":
            q, k = rotate(qkv[:2], start)
        return q, k, v

    def _mlp(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(self.mlp_norm(x)))))


class CrystallineTransformer(StreamedModel):
    """Predicts a class at every token from the tokens so far."""

    Config = CrystallineConfig

    def __init__(self, config: CrystallineConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.token_dim)
        nn.init.normal_(self.embedding.weight, std=config.embedding_std)
        if config.positions == "learned":
            self.places = nn.Parameter(torch.empty(config.max_length, config.token_dim).normal_(std=config.embedding_std))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm, self.head = nn.LayerNorm(config.token_dim), nn.Linear(config.token_dim, config.vocab_size)

    def stack(self) -> Any:
        return self.blocks

    def forward(self, tokens: Tensor) -> Trace:
        """As `trace`: logits and codes belong together, as in the first notebooks."""
        return self.trace(tokens)

    def trace(self, tokens: Tensor) -> Trace:
        """Tokens [B,T] → logits [B,T,V], and what the bottlenecks of each block did. Raises ValueError if tokens are not [B,T],
        or T passes `max_length`.
        """
        x, infos = self._embed(tokens), []
        for block in self.blocks:
            x, info = block(x)
            infos.append(info)
        return Trace(self.head(self.norm(x)), tuple(infos))

    def _embed(self, inputs: Tensor, start: int = 0) -> Tensor:
        check_shape(self, "tokens", inputs, "B T")
        end = start + inputs.shape[1]
        check(self, end <= self.config.max_length, f"at most max_length = {self.config.max_length}", T=end)
        x = self.embedding(inputs)
        return x + self.places[start:end] if self.config.positions == "learned" else x

    def _conclude(self, tokens: Tensor, stream: Stream) -> tuple[Tensor, Stream]:
        return self.head(self.norm(tokens)), stream

    def bottlenecks(self) -> Iterator[tuple[str, Bottleneck]]:
        """Every bottleneck in forward order, under names such as "block 0, attn"."""
        for i, block in enumerate(self.stack()):
            yield f"block {i}, attn", block.attn_bottleneck
            yield f"block {i}, mlp", block.mlp_bottleneck

    def anneal(self, progress: float) -> None:
        """Set every temperature to what the schedule says after a share of the training, 0 … 1; a learned one stays."""
        config = self.config.bottleneck
        if config.schedule != "learned":
            temperature = temperature_at(progress, config.schedule, config.temp_init, config.temp_min)
            for _, bottleneck in self.bottlenecks():
                bottleneck._temperature.fill_(temperature)
