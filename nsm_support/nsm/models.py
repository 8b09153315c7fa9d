"""Whole models: a stack of layers with a head for classification, labelling or language modelling.

Letters: B batch, T tokens, D token width, S states, M state width, H heads, C outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nsm_support.checks import check, check_choice, check_ends, check_shape, check_sizes
from nsm_support.nsm.layer import LayerStream, LayerTrace, NSMLayer
from nsm_support.nsm.states import Pruned

POSITIONS = ("rotary", "learned", "none")


@dataclass(frozen=True, kw_only=True, slots=True)
class NSMConfig:
    """Everything that makes an `NSM`.

    Inputs are vectors [B,T,input_dim] or token numbers [B,T] below vocab_size: give one of the two.
    """

    output_dim: int | None = None  # C; a language model predicts vocab_size tokens
    input_dim: int | None = None
    vocab_size: int | None = None
    head: str = "classification"  # one of HEADS
    token_dim: int = 64  # D
    state_dim: int = 64  # M
    num_states: int | tuple[int, ...] = 16  # S, or one number per layer
    max_states: int | None = None  # how far `allocate` may go
    num_layers: int = 2
    num_heads: int = 4  # H
    window: int = 16  # tokens seen on one side, itself included
    chunk: int | None = None  # None: bidirectional; c ≥ 1: causal, in chunks of c tokens
    gate_type: str = "gru"  # or "lstm"
    state_attention: bool = True
    top_k: int | None = None  # states per token and head; None: all
    temperature: float = 1.0
    mix: str = "gate"  # or "sum", "fixed" (with alpha), "local", "read"
    alpha: float = 0.5
    positions: str = "rotary"  # inside the window; or "learned", a table of max_length; or "none"
    max_length: int | None = None
    ffn_multiple: int = 4
    dropout: float = 0.0

    def __post_init__(self):
        check_choice(self, POSITIONS, "positions")
        check_sizes(self, "num_layers")
        check_ends(self, causal=self.chunk is not None)
        fits = not isinstance(self.num_states, Sequence) or len(self.num_states) == self.num_layers
        check(self, fits, "one number, or one per layer", "num_states", "num_layers")

    @property
    def states_per_layer(self) -> tuple[int, ...]:
        return (self.num_states,) * self.num_layers if isinstance(self.num_states, int) else tuple(self.num_states)


class ModelTrace(NamedTuple):
    """Outputs ([B,C] or [B,T,C]) and what every layer did."""

    outputs: Tensor
    layers: tuple[LayerTrace, ...]


class ModelStream(NamedTuple):
    """What a causal model remembers between two tokens, and the position of the next."""

    layers: tuple[LayerStream, ...]
    position: int


class NSM(nn.Module):
    """A stack of `NSMLayer` modules with one head, made from its config and nothing else.

    The classification head sees the mean token (causally the last one) beside the states of the last layer, averaged by
    importance. `config` follows pruning and allocation, so that `NSM(model.config)` always fits `model.state_dict()`.
    """

    def __init__(self, config: NSMConfig):
        super().__init__()
        self.config = config
        D = config.token_dim
        self.embed = nn.Linear(config.input_dim, D) if config.vocab_size is None else nn.Embedding(config.vocab_size, D)
        self.position = None
        if config.positions == "learned":
            self.position = nn.Parameter(torch.randn(config.max_length, D) * 0.3)
        self.layers = nn.ModuleList(
            NSMLayer(
                num_states,
                config.state_dim,
                D,
                num_heads=config.num_heads,
                window=config.window,
                chunk=config.chunk,
                gate_type=config.gate_type,
                state_attention=config.state_attention,
                top_k=config.top_k,
                temperature=config.temperature,
                mix=config.mix,
                alpha=config.alpha,
                rotary=config.positions == "rotary",
                ffn_multiple=config.ffn_multiple,
                max_states=config.max_states,
                dropout=config.dropout,
            )
            for num_states in config.states_per_layer
        )
        self.norm = nn.LayerNorm(D)
        pooled = config.head == "classification" and config.mix != "local"
        self.head = nn.Linear(D + config.state_dim * pooled, config.output_dim or config.vocab_size)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Vectors [B,T,input_dim] or token numbers [B,T] → [B,C] (classification) or [B,T,C].

        Where mask [B,T] is False, a token is padding (at the right). Raises ValueError for shapes that do not fit.
        """
        tokens, states = self._embed(inputs), None
        for layer in self.layers:
            tokens, states = layer(tokens, mask=mask)
        return self._decide(tokens, states, mask)

    def trace(self, inputs: Tensor, mask: Tensor | None = None) -> ModelTrace:
        """`forward`, with the routing weights [B,H,T,S], the states and the mix of every layer."""
        tokens, layers = self._embed(inputs), []
        for layer in self.layers:
            layers.append(layer.trace(tokens, mask=mask))
            tokens = layers[-1].tokens
        return ModelTrace(self._decide(tokens, layers[-1].states, mask), tuple(layers))

    def routing(self, inputs: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Routing weights [B,H,T,S] by which tokens read, one tensor per layer."""
        return [layer.weights for layer in self.trace(inputs, mask).layers]

    def _embed(self, inputs: Tensor, start: int = 0) -> Tensor:
        if self.config.vocab_size is None:
            check_shape(self, "inputs", inputs, "B T input_dim", input_dim=self.config.input_dim)
        else:
            check_shape(self, "inputs", inputs, "B T")
        tokens = self.embed(inputs)  # (B, T, D)
        if self.position is None:
            return tokens
        end = start + tokens.shape[1]
        if end > len(self.position):
            raise ValueError(f"learned positions end at max_length ({len(self.position)}); got {end} tokens")
        return tokens + self.position[start:end]

    def _decide(self, tokens: Tensor, states: Tensor | None, mask: Tensor | None) -> Tensor:
        """Tokens [B,T,D] and states of the last layer → outputs."""
        tokens = self.norm(tokens)
        if self.config.head != "classification":
            return self.head(tokens)
        if self.config.chunk is not None:
            last = torch.full_like(tokens[:, 0, 0], -1).long() if mask is None else mask.sum(1) - 1
            pooled = tokens[torch.arange(len(tokens), device=tokens.device), last]
        elif mask is None:
            pooled = tokens.mean(1)
        else:
            pooled = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        if states is not None:
            share = self.layers[-1].router.log_importance.softmax(0)
            pooled = torch.cat([pooled, torch.einsum("s,bsm->bm", share, states)], -1)
        return self.head(pooled)

    def start(self, batch_size: int) -> ModelStream:
        """The memory before the first token. Raises ValueError for a model that is not causal."""
        return ModelStream(tuple(layer.start(batch_size) for layer in self.layers), 0)

    def step(self, inputs: Tensor, stream: ModelStream) -> tuple[Tensor, ModelStream]:
        """One token of each sequence ([B] or [B,input_dim]) → outputs [B,C] at its place, and the new memory.

        Equals the full pass over the sequence so far; the cost does not depend on how long that is.
        """
        tokens, layers = self._embed(inputs[:, None], stream.position)[:, 0], []
        for layer, memory in zip(self.layers, stream.layers, strict=True):
            tokens, memory = layer.step(tokens, memory, stream.position)
            layers.append(memory)
        states = self.layers[-1].close(layers[-1]) if self.config.head == "classification" else None
        outputs = self._decide(tokens[:, None], states, None)
        outputs = outputs if self.config.head == "classification" else outputs[:, 0]
        return outputs, ModelStream(tuple(layers), stream.position + 1)

    def prune(
        self,
        keep: Sequence | None = None,
        *,
        threshold: float = 0.3,
        by: str = "importance",
        optimizer: torch.optim.Optimizer | None = None,
    ) -> list[Pruned]:
        """Prune every layer (`StateManager.prune`); `keep` takes one list of indices per layer."""
        if keep is not None and len(keep) != len(self.layers):
            raise ValueError(f"keep takes one list of indices per layer ({len(self.layers)}); got {len(keep)}")
        pruned = [
            layer.state_manager.prune(None if keep is None else keep[i], threshold=threshold, by=by, optimizer=optimizer)
            for i, layer in enumerate(self._with_states())
        ]
        self._count()
        return pruned

    def allocate(self, layer: int, vector: Tensor | None = None, **options) -> int:
        """Add a state to one layer (`StateManager.allocate`) and return its index."""
        index = self._with_states()[layer].state_manager.allocate(vector, **options)
        self._count()
        return index

    def _with_states(self) -> nn.ModuleList:
        if self.config.mix == "local":
            raise ValueError("mix 'local' has no states to prune or allocate")
        return self.layers

    def _count(self) -> None:
        self.config = replace(self.config, num_states=tuple(layer.num_states for layer in self.layers))


class SimpleNSM(NSM):
    """One bidirectional layer with a classification head: [B,T,input_dim] → [B,output_dim].

    Its arguments are those of the first prototype, with tokens as wide as states; every other field of `NSMConfig` may
    be given by name.
    """

    def __init__(self, input_dim: int, state_dim: int, num_states: int, output_dim: int, gate_type: str = "gru", **options):
        defaults = {"token_dim": state_dim, "num_layers": 1}
        super().__init__(
            NSMConfig(
                input_dim=input_dim,
                state_dim=state_dim,
                num_states=num_states,
                output_dim=output_dim,
                gate_type=gate_type,
                **(defaults | options),
            )
        )
