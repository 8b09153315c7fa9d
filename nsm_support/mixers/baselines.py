"""The sequence models that a neural state machine is compared with, all with one interface.

Letters: B batch, T tokens, D token width, H heads, K width of a head, C outputs.

Each is a stack of layers between the same ends: an embedding below; above, a LayerNorm and a linear head, which for
classification sees the mean over tokens. They differ in their layers and in nothing else.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from nsm_support.checks import check, check_choice, check_ends, check_sizes
from nsm_support.mixers.cache import Cache
from nsm_support.mixers.mamba import MambaBlock, MambaStream
from nsm_support.mixers.rotary import rotate
from nsm_support.models import SequenceModel, Stream, Trace

POSITIONS = ("none", "learned")


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineConfig:
    """Everything that makes a baseline; raises ValueError for fields that do not fit.

    Inputs are vectors [B,T,input_dim] or token numbers [B,T] below vocab_size: give one of the two.
    """

    output_dim: int | None = None  # C; a language model predicts vocab_size tokens
    input_dim: int | None = None
    vocab_size: int | None = None
    head: str = "classification"  # one of HEADS
    token_dim: int = 64  # D
    num_layers: int = 2
    num_heads: int = 4  # H, of the Transformer
    causal: bool = False  # for the Transformer; the others look back only, whatever stands here
    positions: str = "none"  # added to the tokens; "learned" is a table of max_length. The Transformer is rotary besides
    max_length: int | None = None
    ffn_multiple: int = 4  # inner width of the Transformer's feed-forward part, in token widths
    state_dim: int = 16  # of Mamba, per channel

    def __post_init__(self) -> None:
        check_choice(self, POSITIONS, "positions")
        check_sizes(self, "token_dim", "num_layers", "num_heads", "ffn_multiple", "state_dim")
        check_ends(self, causal=self.causal)


class Baseline(SequenceModel):
    """The ends of every baseline. A layer has `forward(tokens, mask)`, `start` and `go_on`."""

    Config = BaselineConfig

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Vectors [B,T,input_dim] or token numbers [B,T] → [B,C] (classification) or [B,T,C].

        Where mask [B,T] is False, a token is padding (at the right). Raises ValueError for shapes that do not fit.
        """
        return self._run(inputs, mask, None)

    def trace(self, inputs: Tensor, mask: Tensor | None = None) -> Trace:
        """`forward`, and the tokens [B,T,D] after each layer (after all of them, for the fused LSTM and GRU)."""
        layers: list[Tensor] = []
        return Trace(self._run(inputs, mask, layers), tuple(layers))

    def _run(self, inputs: Tensor, mask: Tensor | None, kept: list[Tensor] | None) -> Tensor:
        tokens = self._embed(inputs)
        self._check_mask(tokens, mask)
        for layer in self.layers:
            tokens = layer(tokens, mask)
            if kept is not None:
                kept.append(tokens)
        tokens = self.norm(tokens)
        if self.config.head != "classification":
            return self.head(tokens)
        if mask is None:
            return self.head(tokens.mean(1))
        return self.head((tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1))

    def _conclude(self, tokens: Tensor, stream: Stream) -> tuple[Tensor, Stream]:
        tokens = self.norm(tokens)
        if self.config.head != "classification":
            return self.head(tokens), stream
        total = tokens.sum(1) if stream.total is None else stream.total + tokens.sum(1)
        return self.head(total / stream.position), stream._replace(total=total)


class TransformerLayer(nn.Module):
    """Full attention with rotary positions, residual; feed-forward with GELU, residual (norm before each)."""

    def __init__(self, token_dim: int, num_heads: int, causal: bool, ffn_multiple: int = 4):
        super().__init__()
        even = not token_dim % (2 * num_heads)
        check(self, even, "token_dim a multiple of 2 · num_heads", token_dim=token_dim, num_heads=num_heads)
        self.num_heads, self.causal = num_heads, causal
        self.norm, self.ffn_norm = nn.LayerNorm(token_dim), nn.LayerNorm(token_dim)
        self.qkv, self.out = nn.Linear(token_dim, 3 * token_dim, bias=False), nn.Linear(token_dim, token_dim)
        inner = ffn_multiple * token_dim
        self.ffn = nn.Sequential(nn.Linear(token_dim, inner), nn.GELU(), nn.Linear(inner, token_dim))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self._project(tokens)
        # Padding stands at the right, where a causal query does not look anyway.
        shown = None if mask is None or self.causal else mask[:, None, None]
        return self._finish(tokens, F.scaled_dot_product_attention(q, k, v, shown, is_causal=self.causal))

    def start(self, batch_size: int) -> Cache:
        D = self.out.in_features
        return Cache.empty(self.out.weight, batch_size, self.num_heads, D // self.num_heads)

    def go_on(self, tokens: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        heard, cache = cache.attend(*self._project(tokens, cache.length))
        return self._finish(tokens, heard), cache

    def _project(self, tokens: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values [B,H,T,K], of tokens [B,T,D], the first at position `start`."""
        q, k, v = self.qkv(self.norm(tokens)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return rotate(q, start), rotate(k, start), v

    def _finish(self, tokens: Tensor, heard: Tensor) -> Tensor:
        tokens = tokens + self.out(heard.transpose(1, 2).flatten(-2))
        return tokens + self.ffn(self.ffn_norm(tokens))


class Transformer(Baseline):
    """Pre-norm Transformer (Vaswani et al. 2017, arXiv:1706.03762) with rotary positions, causal or bidirectional."""

    def __init__(self, config: BaselineConfig):
        shape = config.token_dim, config.num_heads, config.causal, config.ffn_multiple
        super().__init__(config, (TransformerLayer(*shape) for _ in range(config.num_layers)), config.causal)


class RecurrentLayers(nn.Module):
    """`torch.nn.LSTM` or `torch.nn.GRU`, all layers in one fused module, each as wide as the tokens."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU], token_dim: int, num_layers: int):
        super().__init__()
        self.rnn = cell(token_dim, token_dim, num_layers, batch_first=True)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.rnn(tokens)[0]

    def start(self, batch_size: int) -> None:
        return None  # torch.nn starts from zeros

    def go_on(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.rnn(tokens, state)


class Recurrent(Baseline):
    """What `LSTM` and `GRU` share: layers as PyTorch has them, stacked."""

    cell: ClassVar[type[nn.LSTM] | type[nn.GRU]]

    def __init__(self, config: BaselineConfig):
        super().__init__(config, [RecurrentLayers(self.cell, config.token_dim, config.num_layers)], causal=True)


class LSTM(Recurrent):
    """Hochreiter and Schmidhuber 1997, with a forget gate."""

    cell = nn.LSTM


class GRU(Recurrent):
    """Cho et al. 2014 (arXiv:1406.1078)."""

    cell = nn.GRU


class MambaLayer(nn.Module):
    """Norm, Mamba block, residual."""

    def __init__(self, token_dim: int, state_dim: int):
        super().__init__()
        self.norm, self.block = nn.LayerNorm(token_dim), MambaBlock(token_dim, state_dim=state_dim)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return tokens + self.block(self.norm(tokens))

    def start(self, batch_size: int) -> MambaStream:
        return self.block.start(batch_size)

    def go_on(self, tokens: Tensor, memory: MambaStream) -> tuple[Tensor, MambaStream]:
        out, memory = self.block.go_on(self.norm(tokens), memory)
        return tokens + out, memory


class Mamba(Baseline):
    """A stack of selective state spaces (Gu and Dao 2023, arXiv:2312.00752), pre-norm and residual."""

    def __init__(self, config: BaselineConfig):
        super().__init__(config, (MambaLayer(config.token_dim, config.state_dim) for _ in range(config.num_layers)), causal=True)


BASELINES: dict[str, type[Baseline]] = {"Transformer": Transformer, "LSTM": LSTM, "GRU": GRU, "Mamba": Mamba}
