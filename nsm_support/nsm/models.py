"""Whole models: a stack of layers with a head for classification, labelling or language modelling.

Letters: B batch, T tokens, D token width, S states, M state width, H heads, C outputs.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from nsm_support.checks import check, check_choice, check_ends, check_sizes
from nsm_support.models import SequenceModel, Stream, Trace
from nsm_support.nsm.layer import LayerSizes, NSMLayer
from nsm_support.nsm.states import Pruned

POSITIONS = ("rotary", "learned", "none")


@dataclass(frozen=True, kw_only=True, slots=True)
class NSMConfig(LayerSizes):
    """Everything that makes an `NSM`; raises ValueError for fields that do not fit.

    Inputs are vectors [B,T,input_dim] or token numbers [B,T] below vocab_size: give one of the two.
    """

    output_dim: int | None = None  # C; a language model predicts vocab_size tokens
    input_dim: int | None = None
    vocab_size: int | None = None
    head: str = "classification"  # one of HEADS
    num_states: int | tuple[int, ...] = 16  # type: ignore[assignment]  # S, or one number per layer
    num_layers: int = 2
    positions: str = "rotary"  # inside the window; or "learned", a table of max_length; or "none"
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_choice(self, POSITIONS, "positions")
        check_sizes(self, "num_layers")
        check_ends(self, causal=self.chunk is not None)
        fits = not isinstance(self.num_states, Sequence) or len(self.num_states) == self.num_layers
        check(self, fits, "one number, or one per layer", "num_states", "num_layers")
        if isinstance(self.num_states, Sequence):
            object.__setattr__(self, "num_states", tuple(self.num_states))

    @property
    def states_per_layer(self) -> tuple[int, ...]:
        return self.num_states if isinstance(self.num_states, tuple) else (self.num_states,) * self.num_layers


class NSM(SequenceModel):
    """A stack of `NSMLayer` modules with one head, made from its config and nothing else.

    The classification head sees the mean token (causally the last one) beside the states of the last layer, averaged by
    importance. `config` follows pruning and allocation, so that `NSM(model.config)` always fits `model.state_dict()`.
    """

    Config = NSMConfig

    def __init__(self, config: NSMConfig):
        options = {f.name: getattr(config, f.name) for f in fields(LayerSizes) if f.name != "num_states"}
        options["rotary"] = config.positions == "rotary"
        layers = (NSMLayer(num_states, **options) for num_states in config.states_per_layer)
        pooled = config.head == "classification" and config.mix != "local"
        super().__init__(config, layers, config.chunk is not None, config.token_dim + config.state_dim * pooled)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Vectors [B,T,input_dim] or token numbers [B,T] → [B,C] (classification) or [B,T,C].

        Where mask [B,T] is False, a token is padding (at the right). Raises ValueError for shapes that do not fit.
        """
        tokens, states = self._embed(inputs), None
        for layer in self.layers:
            tokens, states = layer(tokens, mask=mask)
        return self._decide(tokens, states, mask)

    def trace(self, inputs: Tensor, mask: Tensor | None = None) -> Trace:
        """`forward`, and the `LayerTrace` of every layer: routing weights [B,H,T,S], states and mix."""
        tokens, layers = self._embed(inputs), []
        for layer in self.layers:
            layers.append(layer.trace(tokens, mask=mask))
            tokens = layers[-1].tokens
        return Trace(self._decide(tokens, layers[-1].states, mask), tuple(layers))

    def routing(self, inputs: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Routing weights [B,H,T,S] by which tokens read, one tensor per layer."""
        return [layer.weights for layer in self.trace(inputs, mask).layers]

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

    def _conclude(self, tokens: Tensor, stream: Stream) -> tuple[Tensor, Stream]:
        states = self.layers[-1].close(stream.layers[-1]) if self.config.head == "classification" else None
        return self._decide(tokens, states, None), stream

    def prune(self, keep: Sequence | None = None, *, threshold: float = 0.3, **options: Any) -> list[Pruned]:
        """Prune every layer (`StateManager.prune`); `keep` takes one list of indices per layer."""
        if keep is not None and len(keep) != len(self.layers):
            raise ValueError(f"keep takes one list of indices per layer ({len(self.layers)}); got {len(keep)}")
        given = zip(self._with_states(), [None] * len(self.layers) if keep is None else keep, strict=True)
        pruned = [layer.state_manager.prune(kept, threshold=threshold, **options) for layer, kept in given]
        self._count()
        return pruned

    def allocate(self, layer: int, vector: Tensor | None = None, **options) -> int:
        """Add a state to one layer (`StateManager.allocate`) and return its index."""
        index = self._with_states()[layer].state_manager.allocate(vector, **options)
        self._count()
        return index

    def _with_states(self) -> Any:
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

    def __init__(self, input_dim: int, state_dim: int, num_states: int, output_dim: int, gate_type: str = "gru", **options: Any):
        sizes = {"input_dim": input_dim, "state_dim": state_dim, "num_states": num_states, "output_dim": output_dim}
        super().__init__(NSMConfig(**{"token_dim": state_dim, "num_layers": 1} | sizes | {"gate_type": gate_type} | options))

    @classmethod
    def from_config(cls, config: NSMConfig) -> Self:
        return cls(**asdict(config))
