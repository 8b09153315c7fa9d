"""One way to use any model of the book, whatever is inside: the protocols, and what all of them share.

Letters: B batch, T tokens, D token width, C outputs, V vocabulary.

Every model (`Model`) has `model(inputs)`, `trace(inputs)`, `save_pretrained` and `from_pretrained`; a causal one
(`StreamingModel`) also `start`, `prefill` and `step`; one that predicts tokens (`LanguageModel`) also `generate`.

A stream is a value: no call changes it, so that stepping twice from one gives the same twice. Where a config makes a class
look ahead, or end in a classifier, `start` and `generate` say so in a ValueError.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, fields, is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self, get_type_hints, runtime_checkable

import safetensors.torch
import torch
from torch import Generator, Tensor, nn

from nsm_support.checks import check, check_choice, check_shape
from nsm_support.files import write_json, write_whole
from nsm_support.training import CheckpointError, evaluating


class Trace(NamedTuple):
    """What a pass gave, and what went on inside, layer by layer: each model says what its layers show."""

    outputs: Tensor
    layers: tuple[Any, ...]


class Stream(NamedTuple):
    """What a causal model remembers between two tokens: a memory a layer, and the position of the next token."""

    layers: tuple[Any, ...]
    position: int
    total: Tensor | None = None  # (B, D): sum of the tokens so far, where a classifier takes their mean


@runtime_checkable
class Model(Protocol):
    """Built from its config and nothing else. `model(inputs)` gives outputs [B,C] or [B,T,C], or what `trace` gives."""

    config: Any

    def __call__(self, inputs: Tensor) -> Any: ...
    def trace(self, inputs: Tensor) -> Any: ...  # a NamedTuple with `outputs`, and what is inside
    def save_pretrained(self, folder: str | Path) -> None: ...
    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self: ...


@runtime_checkable
class StreamingModel(Model, Protocol):
    """Reads tokens as they come, as `StreamedModel` says. No method records gradients; all equal the full pass up to rounding."""

    def start(self, batch_size: int) -> Any: ...
    def prefill(self, inputs: Tensor) -> tuple[Tensor, Any]: ...
    def step(self, inputs: Tensor, stream: Any) -> tuple[Tensor, Any]: ...


@runtime_checkable
class LanguageModel(StreamingModel, Protocol):
    """Predicts the next of V tokens at every place, and generates as `StreamedModel.generate` says."""

    def generate(self, prompt: Tensor, length: int, **options: Any) -> Tensor: ...


class PretrainedModel(nn.Module):
    """A model that is kept in a folder: config.json, and weights in safetensors under the name that config.json gives."""

    Config: ClassVar[type]
    config: Any

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """The model of a config. (A class with other arguments says how.)"""
        return cls(config)  # type: ignore[call-arg]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config and weights, whole or not at all: config.json comes last and names the weights by their checksum.

        Raises ValueError for a model whose weights are no longer those of its config (a part was put in another's place).
        """
        with torch.device("meta"):
            expected = {name: value.shape for name, value in self.from_config(self.config).state_dict().items()}
        state = self.state_dict()
        fits = expected == {name: value.shape for name, value in state.items()}
        check(self, fits, "a model with the weights of its config", model="a part was put in another's place")
        weights = safetensors.torch.save({name: state[name].detach().cpu().contiguous() for name in _distinct(state)})
        digest, folder = sha256(weights).hexdigest(), Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"model-{digest[:16]}.safetensors"
        write_whole(folder / name, weights)
        about = {"class": type(self).__name__, "config": asdict(self.config), "weights": name, "sha256": digest}
        write_json(folder / "config.json", about)
        for old in folder.glob("model-*.safetensors"):
            if re.fullmatch(r"model-[0-9a-f]{16}\.safetensors", old.name) and old.name != name:
                old.unlink(missing_ok=True)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model that `save_pretrained` wrote, on the CPU, in eval mode; the random state stays as it was.

        Raises FileNotFoundError without config.json, or without the weights that it names; CheckpointError for a file that is
        damaged, a model of another class, or weights of another config.
        """
        path = Path(folder) / "config.json"
        try:
            about = json.loads(path.read_bytes())
            kind, given, name, digest = (about[key] for key in ("class", "config", "weights", "sha256"))
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path} is damaged, or no config that save_pretrained wrote ({error!r})") from error
        if kind != cls.__name__:
            raise CheckpointError(f"{path} belongs to a model of class {kind}; {cls.__name__} was asked for")
        try:
            config = _config(cls.Config, given)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        weights = path.with_name(Path(name).name)
        data = weights.read_bytes()
        if sha256(data).hexdigest() != digest:
            raise CheckpointError(f"{weights} is damaged: its checksum is not the one in config.json")
        kept = safetensors.torch.load(data)
        with torch.random.fork_rng(devices=[]):
            model = cls.from_config(config)
        state = model.state_dict(keep_vars=True)
        shapes = {name: tuple(state[name].shape) for name in _distinct(state)}
        if shapes != {name: tuple(value.shape) for name, value in kept.items()}:
            raise CheckpointError(f"{weights} does not fit {path.name}: names or shapes of its tensors are others")
        with torch.no_grad():
            for name, value in kept.items():  # into the model's own tensors, so that those that are shared stay so
                state[name].data = value.clone()
        return model.eval()


class StreamedModel(PretrainedModel):
    """`start`, `prefill`, `step` and `generate`, for a stack of layers that have `start` and `go_on`.

    `layer.go_on(tokens, memory)` takes the first tokens [B,T,D] of a stream, or the next one [B,1,D], and what the layer
    remembers; it gives the tokens that come out, and what to remember then. A subclass says whether it is `causal`, which layers
    it has (`stack`), how tokens come in (`_embed`) and how outputs go out (`_conclude`).
    """

    causal: bool = True

    def stack(self) -> Any:
        """The layers, in order."""
        raise NotImplementedError

    def _embed(self, inputs: Tensor, start: int = 0) -> Tensor:
        """Inputs [B,T,·], the first at position `start` → tokens [B,T,D]. Raises ValueError for others."""
        raise NotImplementedError

    def _conclude(self, tokens: Tensor, stream: Stream) -> tuple[Tensor, Stream]:
        """The last layer's tokens [B,T,D], and the stream after them → outputs, and the stream to hand out."""
        raise NotImplementedError

    @torch.no_grad()
    def start(self, batch_size: int) -> Stream:
        """The stream before the first token. Raises ValueError for a model that looks ahead."""
        check(self, self.causal, "True: a stream sees no later token", "causal")
        return Stream(tuple(layer.start(batch_size) for layer in self.stack()), 0)

    def prefill(self, inputs: Tensor) -> tuple[Tensor, Stream]:
        """The first T tokens at once → outputs as from a full pass, and the stream after them."""
        return self._go_on(inputs, self.start(len(inputs)))

    def step(self, inputs: Tensor, stream: Stream) -> tuple[Tensor, Stream]:
        """The next token of each sequence ([B] or [B,input_dim]) → outputs [B,C] at its place, and the stream after it.

        Equals the full pass over the sequence so far.
        """
        outputs, stream = self._go_on(inputs[:, None], stream)
        return outputs if outputs.dim() == 2 else outputs[:, 0], stream

    @torch.no_grad()
    def _go_on(self, inputs: Tensor, stream: Stream) -> tuple[Tensor, Stream]:
        tokens, layers = self._embed(inputs, stream.position), []
        for layer, memory in zip(self.stack(), stream.layers, strict=True):
            tokens, memory = layer.go_on(tokens, memory)
            layers.append(memory)
        position = stream.position + inputs.shape[1]
        return self._conclude(tokens, stream._replace(layers=tuple(layers), position=position))

    def generate(
        self,
        prompt: Tensor,
        length: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """The prompt [B,T], and `length` tokens more, each drawn from what the model predicts: [B,T+length].

        Args:
            temperature: divides the logits; at 0 the likeliest token is taken.
            top_k: draw among so many of the likeliest; None for all.
            generator: source of the draws; the global one by default.

        Raises ValueError for a model that predicts no tokens, or an argument that does not fit.
        """
        head = getattr(self.config, "head", "language_model")
        check(type(self).__name__, head == "language_model", "'language_model': others predict no tokens", head=head)
        check_shape(self, "prompt", prompt, "B T")
        check("generate", length >= 0 and temperature >= 0, "0 or more", length=length, temperature=temperature)
        check("generate", top_k is None or top_k >= 1, "None, or 1 or more", top_k=top_k)
        tokens = [prompt]
        with evaluating(self):
            outputs, stream = self.prefill(prompt)
            for i in range(length):
                if i:
                    outputs, stream = self.step(tokens[-1][:, 0], stream)
                logits = outputs if outputs.dim() == 2 else outputs[:, -1]
                tokens.append(draw(logits, temperature, top_k, generator))
        return torch.cat(tokens, 1)


class SequenceModel(StreamedModel):
    """A stack of layers between the ends that models of a task share: an embedding below; a norm and a linear head above.

    The config has `head`, `token_dim`, `positions`, `max_length`, and what `checks.check_ends` asks for.

    Args:
        layers: made after the embedding, if they are made on demand: this order decides the initial weights.
        head_dim: width of what the head sees; a token's by default.
    """

    layers: Any  # an `nn.ModuleList`

    def __init__(self, config: Any, layers: Iterable[nn.Module], causal: bool, head_dim: int | None = None):
        super().__init__()
        self.config, self.causal = config, causal
        D = config.token_dim
        self.embed = nn.Linear(config.input_dim, D) if config.vocab_size is None else nn.Embedding(config.vocab_size, D)
        learned = config.positions == "learned"
        self.position = nn.Parameter(torch.randn(config.max_length, D) * 0.3) if learned else None
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(head_dim or D, config.output_dim or config.vocab_size)

    def stack(self) -> Any:
        return self.layers

    def _embed(self, inputs: Tensor, start: int = 0) -> Tensor:
        """Vectors [B,T,input_dim] or token numbers [B,T], the first at position `start` → tokens [B,T,D]."""
        if self.config.vocab_size is None:
            check_shape(self, "inputs", inputs, "B T input_dim", input_dim=self.config.input_dim)
        else:
            check_shape(self, "inputs", inputs, "B T")
        check(self, inputs.shape[1] > 0, "at least one token", T=inputs.shape[1])
        tokens = self.embed(inputs)  # (B, T, D)
        if self.position is None:
            return tokens
        end = start + tokens.shape[1]
        check(self, end <= len(self.position), f"at most max_length = {len(self.position)}", **{"number of tokens": end})
        return tokens + self.position[start:end]

    def _check_mask(self, tokens: Tensor, mask: Tensor | None) -> None:
        if mask is not None:
            check_shape(self, "mask", mask, "B T", B=tokens.shape[0], T=tokens.shape[1])
            check_choice(self, (torch.bool,), **{"mask.dtype": mask.dtype})


def draw(logits: Tensor, temperature: float, top_k: int | None = None, generator: Generator | None = None) -> Tensor:
    """One of V tokens [B,1] by logits [B,V], as in `StreamedModel.generate`."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def _distinct(state: dict[str, Tensor]) -> list[str]:
    """The names of a state's tensors, of those that share their memory the first alone."""
    first: dict[Any, str] = {}
    for name, value in state.items():
        first.setdefault((value.data_ptr(), value.shape) if value.numel() else name, name)
    return list(first.values())


def _config(kind: type, given: dict[str, Any]) -> Any:
    """A config, and the configs in it, of what `asdict` and JSON made of it. Raises TypeError or ValueError."""
    types = get_type_hints(kind)
    expected = {field.name for field in fields(kind)}
    if not isinstance(given, dict) or given.keys() != expected:
        raise TypeError(f"{kind.__name__} has the fields {', '.join(sorted(expected))}; got {', '.join(sorted(given))}")
    made = {}
    for field in fields(kind):
        value = given[field.name]
        if is_dataclass(types[field.name]):
            value = _config(types[field.name], value)
        made[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**made)
