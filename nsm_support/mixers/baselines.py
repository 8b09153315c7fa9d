"""The sequence models that a neural state machine is compared with, all with one interface.

Letters: B batch, T tokens, D token width, H heads, K width of a head, C outputs.

Each is a stack of layers between the same ends: an embedding below; above, a LayerNorm and a linear head, which for
classification sees the mean over tokens. They differ in their layers and in nothing else.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsm_support.checks import check, check_choice, check_ends, check_shape, check_sizes
from nsm_support.data import from_patches
from nsm_support.mixers.mamba import MambaBlock
from nsm_support.mixers.rotary import rotate

POSITIONS = ("none", "learned")
CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}
ROOM = 256  # places by which a cache of keys and values grows: copying it costs 1/256 of reading it


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

    def __post_init__(self):
        check_choice(self, POSITIONS, "positions")
        check_sizes(self, "token_dim", "num_layers", "num_heads", "ffn_multiple", "state_dim")
        check_ends(self, causal=self.causal)


class Stream(NamedTuple):
    """What a causal model remembers between two tokens, and the position of the next."""

    layers: tuple[Any, ...]
    total: Tensor | None  # (B, D): sum of the tokens so far, for classification
    position: int


class SequenceModel(nn.Module):
    """Embedding, layers, norm and head. A layer has `forward(tokens, mask)`, `start`, `step` and `prefill`.

    `start`, `prefill` and `step` are for inference: they record no gradients, and a stream that was handed to `step` is
    used up (the new one may share its memory).
    """

    def __init__(self, config: BaselineConfig, layers: Iterable[nn.Module], causal: bool = True):
        super().__init__()
        self.config, self.causal = config, causal
        D = config.token_dim
        self.embed = nn.Linear(config.input_dim, D) if config.vocab_size is None else nn.Embedding(config.vocab_size, D)
        self.position = None
        if config.positions == "learned":
            self.position = nn.Parameter(torch.randn(config.max_length, D) * 0.3)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, config.output_dim or config.vocab_size)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Vectors [B,T,input_dim] or token numbers [B,T] → [B,C] (classification) or [B,T,C].

        Where mask [B,T] is False, a token is padding (at the right). Raises ValueError for shapes that do not fit.
        """
        tokens = self._embed(inputs)
        if mask is not None:
            check_shape(self, "mask", mask, "B T", B=tokens.shape[0], T=tokens.shape[1])
            check_choice(self, (torch.bool,), **{"mask.dtype": mask.dtype})
        for layer in self.layers:
            tokens = layer(tokens, mask)
        tokens = self.norm(tokens)
        if self.config.head != "classification":
            return self.head(tokens)
        if mask is None:
            return self.head(tokens.mean(1))
        return self.head((tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1))

    @torch.no_grad()
    def start(self, batch_size: int) -> Stream:
        """The memory before the first token. Raises ValueError for a model that is not causal."""
        check(self, self.causal, "True: a stream sees no later token", "causal")
        total = self.head.weight.new_zeros(batch_size, self.config.token_dim)
        layers = tuple(layer.start(batch_size) for layer in self.layers)
        return Stream(layers, total if self.config.head == "classification" else None, 0)

    @torch.no_grad()
    def prefill(self, inputs: Tensor) -> tuple[Tensor, Stream]:
        """The first T tokens at once → outputs as from `forward`, and the memory after them."""
        stream = self.start(len(inputs))
        tokens, layers = self._embed(inputs), []
        for layer in self.layers:
            tokens, memory = layer.prefill(tokens)
            layers.append(memory)
        tokens = self.norm(tokens)
        total = None if stream.total is None else tokens.sum(1)
        outputs = self.head(tokens if total is None else tokens.mean(1))
        return outputs, Stream(tuple(layers), total, tokens.shape[1])

    @torch.no_grad()
    def step(self, inputs: Tensor, stream: Stream) -> tuple[Tensor, Stream]:
        """One token of each sequence ([B] or [B,input_dim]) → outputs [B,C] at its place, and the new memory.

        Equals the full causal pass over the sequence so far.
        """
        tokens, layers = self._embed(inputs[:, None], stream.position)[:, 0], []
        for layer, memory in zip(self.layers, stream.layers, strict=True):
            tokens, memory = layer.step(tokens, memory)
            layers.append(memory)
        tokens, position = self.norm(tokens), stream.position + 1
        total = None if stream.total is None else stream.total + tokens
        outputs = self.head(tokens if total is None else total / position)
        return outputs, Stream(tuple(layers), total, position)

    def _embed(self, inputs: Tensor, start: int = 0) -> Tensor:
        dim = self.config.input_dim
        fits = inputs.ndim == 2 if dim is None else inputs.ndim == 3 and inputs.shape[2] == dim
        if not fits or inputs.shape[1] == 0:
            expected = "[B,T] token numbers" if dim is None else f"[B,T,{dim}]"
            raise ValueError(f"inputs are {expected}, at least one token; got shape {list(inputs.shape)}")
        tokens = self.embed(inputs)  # (B, T, D)
        if self.position is None:
            return tokens
        end = start + tokens.shape[1]
        if end > len(self.position):
            raise ValueError(f"learned positions end at max_length ({len(self.position)}); got {end} tokens")
        return tokens + self.position[start:end]


class Cache(NamedTuple):
    """Keys and values [B,H,≥ length,K] that a causal attention has seen; the places from `length` on are free."""

    keys: Tensor
    values: Tensor
    length: int

    def append(self, keys: Tensor, values: Tensor) -> "Cache":
        """Write keys and values [B,H,n,K] into the free places, of which it makes more where they do not suffice."""
        end = self.length + keys.shape[2]
        kept = self.keys, self.values
        if end > self.keys.shape[2]:
            kept = tuple(F.pad(x, (0, 0, 0, end + ROOM - x.shape[2])) for x in kept)
        for old, new in zip(kept, (keys, values), strict=True):
            old[:, :, self.length : end] = new
        return Cache(*kept, end)


class TransformerLayer(nn.Module):
    """Full attention with rotary positions, residual; feed-forward with GELU, residual (norm before each)."""

    def __init__(self, token_dim: int, num_heads: int, causal: bool, ffn_multiple: int = 4):
        super().__init__()
        even = not token_dim % (2 * num_heads)
        check(self, even, "token_dim a multiple of 2 · num_heads", token_dim=token_dim, num_heads=num_heads)
        self.num_heads, self.causal = num_heads, causal
        self.norm, self.ffn_norm = nn.LayerNorm(token_dim), nn.LayerNorm(token_dim)
        self.qkv, self.out = nn.Linear(token_dim, 3 * token_dim, bias=False), nn.Linear(token_dim, token_dim)
        self.ffn = nn.Sequential(
            nn.Linear(token_dim, ffn_multiple * token_dim), nn.GELU(), nn.Linear(ffn_multiple * token_dim, token_dim)
        )

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self._project(tokens)
        # Padding stands at the right, where a causal query does not look anyway.
        shown = None if mask is None or self.causal else mask[:, None, None]
        return self._finish(tokens, F.scaled_dot_product_attention(q, k, v, shown, is_causal=self.causal))

    def start(self, batch_size: int) -> Cache:
        empty = self.out.weight.new_zeros(batch_size, self.num_heads, 0, self.out.in_features // self.num_heads)
        return Cache(empty, empty, 0)

    def prefill(self, tokens: Tensor) -> tuple[Tensor, Cache]:
        q, k, v = self._project(tokens)
        heard = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self._finish(tokens, heard), self.start(len(tokens)).append(k, v)

    def step(self, tokens: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        tokens = tokens[:, None]  # (B, 1, D)
        q, k, v = self._project(tokens, cache.length)
        cache = cache.append(k, v)
        seen = (x[:, :, : cache.length] for x in (cache.keys, cache.values))
        return self._finish(tokens, F.scaled_dot_product_attention(q, *seen))[:, 0], cache

    def _project(self, tokens: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values [B,H,T,K], of tokens [B,T,D], the first at position `start`."""
        q, k, v = self.qkv(self.norm(tokens)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return rotate(q, start), rotate(k, start), v

    def _finish(self, tokens: Tensor, heard: Tensor) -> Tensor:
        tokens = tokens + self.out(heard.transpose(1, 2).flatten(-2))
        return tokens + self.ffn(self.ffn_norm(tokens))


class Transformer(SequenceModel):
    """Pre-norm Transformer (Vaswani et al. 2017, arXiv:1706.03762) with rotary positions, causal or bidirectional."""

    def __init__(self, config: BaselineConfig):
        shape = config.token_dim, config.num_heads, config.causal, config.ffn_multiple
        super().__init__(config, (TransformerLayer(*shape) for _ in range(config.num_layers)), config.causal)


class RecurrentLayers(nn.Module):
    """`torch.nn.LSTM` or `torch.nn.GRU`, all layers in one fused module, each as wide as the tokens."""

    def __init__(self, token_dim: int, num_layers: int, cell: str):
        super().__init__()
        self.rnn = CELLS[cell](token_dim, token_dim, num_layers, batch_first=True)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.rnn(tokens)[0]

    def start(self, batch_size: int) -> None:
        return None  # torch.nn starts from zeros

    def prefill(self, tokens: Tensor):
        return self.rnn(tokens)

    def step(self, tokens: Tensor, state):
        tokens, state = self.rnn(tokens[:, None], state)
        return tokens[:, 0], state


class Recurrent(SequenceModel):
    """LSTM (Hochreiter and Schmidhuber 1997) or GRU (Cho et al. 2014, arXiv:1406.1078), stacked, as PyTorch has them."""

    def __init__(self, config: BaselineConfig, cell: str = "lstm"):
        check_choice(self, CELLS, cell=cell)
        super().__init__(config, [RecurrentLayers(config.token_dim, config.num_layers, cell)])


class MambaLayer(nn.Module):
    """Norm, Mamba block, residual."""

    def __init__(self, token_dim: int, state_dim: int):
        super().__init__()
        self.norm, self.block = nn.LayerNorm(token_dim), MambaBlock(token_dim, state_dim=state_dim)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return tokens + self.block(self.norm(tokens))

    def start(self, batch_size: int):
        return self.block.start(batch_size)

    def prefill(self, tokens: Tensor):
        out, memory = self.block.prefill(self.norm(tokens))
        return tokens + out, memory

    def step(self, tokens: Tensor, memory):
        out, memory = self.block.step(self.norm(tokens), memory)
        return tokens + out, memory


class Mamba(SequenceModel):
    """A stack of selective state spaces (Gu and Dao 2023, arXiv:2312.00752), pre-norm and residual."""

    def __init__(self, config: BaselineConfig):
        super().__init__(config, (MambaLayer(config.token_dim, config.state_dim) for _ in range(config.num_layers)))


class SmallCNN(nn.Module):
    """Two convolutions with pooling and a linear classifier, for digits as images or as square patches.

    Args:
        width: channels of the first convolution; the second has twice as many.
        output_dim: classes C. side: pixels along one side of an image, a multiple of 4.
    """

    def __init__(self, width: int = 16, output_dim: int = 10, side: int = 28):
        super().__init__()
        check_sizes(self, width=width, side=side)
        check(self, not side % 4, "a multiple of 4", side=side)
        self.side = side
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Linear(2 * width * (side // 4) ** 2, output_dim)

    def forward(self, inputs: Tensor) -> Tensor:
        """Images [B,side,side], or their patches [B,n²,size²] as `data.to_patches` makes them → [B,C]."""
        side = self.side
        images = inputs if inputs.ndim != 3 or inputs.shape[1:] == (side, side) else from_patches(inputs)
        if images.shape[1:] != (side, side):
            shapes = f"[B,{side},{side}] or the patches of such"
            raise ValueError(f"inputs are images {shapes}; got shape {list(inputs.shape)}")
        return self.head(self.features(images[:, None]).flatten(1))


#: name → build(config)
BASELINES: dict[str, Callable[[BaselineConfig], SequenceModel]] = {
    "Transformer": Transformer,
    "LSTM": partial(Recurrent, cell="lstm"),
    "GRU": partial(Recurrent, cell="gru"),
    "Mamba": Mamba,
}


def count_parameters(module: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def match_parameters(build: Callable[[int], nn.Module], parameters: int, widths: Iterable[int]) -> tuple[int, nn.Module]:
    """The width at which `build(width)` has most nearly so many parameters, and the module, built once.

    The module is what `build(width)` gives under the present random state, which stays as it was: seed before each.

    Raises:
        ValueError: if the nearest is more than 5 % away.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        with torch.device("meta"):  # sizes without numbers, and without drawing any
            counts = {width: count_parameters(build(width)) for width in widths}
        if not counts:
            raise ValueError("match_parameters: no width was given to choose from")
        width = min(counts, key=lambda width: abs(counts[width] - parameters))
        if abs(counts[width] - parameters) > 0.05 * parameters:
            raise ValueError(
                f"no width gives {parameters:,} parameters within 5 %; nearest is width {width} with {counts[width]:,}, of "
                f"{len(counts)} widths from {min(counts)} to {max(counts)}"
            )
        return width, build(width)
