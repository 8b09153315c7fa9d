"""Sidecars for a trained model: their training, and the model's loss with them at a fixed α.

A run is a base model and a seed of its sidecars. Letters: L layers, B batch, C held-out chapters, W windows of each, T
tokens of a window.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from nsm_support.blockffn import hybrid
from nsm_support.blockffn.checkpoint import load_checkpoint, load_tokenizer
from nsm_support.blockffn.gates import Gate
from nsm_support.blockffn.hybrid import MambaSidecar, attach, detach, recorded_alpha
from nsm_support.blockffn.model import BlockFFNModel
from nsm_support.corpus import load_corpus
from nsm_support.data import window_sampler
from nsm_support.studies.language_model import TrainedModels, load_trained
from nsm_support.studies.protocol import Network, Row, Run, Scores
from nsm_support.training import TrainingConfig, evaluating, load_model, save_model

Sidecars = dict[int, MambaSidecar]
ROWS = 32  #: windows at a time in evaluation; a gate's draws repeat from one such batch to the next


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What all runs of an experiment share: the base models, and the text."""

    models: str | None = None  #: a file by `language_model.save_trained`
    checkpoint: str | None = None  #: instead: a folder or a name for `load_checkpoint`; its model is base 0
    text: str | None = None  #: a text file; None is the Bible
    window: int = 128  #: T
    windows: int = 1  #: W, of a held-out chapter, from its beginning
    chapters: int | None = None  #: most of each part, from all over it; None is all
    device: str = "cpu"


class TextWindows(NamedTuple):
    """The text as token numbers int64: all of the training part [n], and of each part the first W windows of every chapter
    that has so many [C, W, T + 1]. A window's last token is the next one's first: each is predicted once."""

    stream: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor


class WindowScores(NamedTuple):
    """What a model made of held-out windows."""

    nats: Tensor  # (C,), mean over the predicted tokens of a chapter, float64
    alpha: Tensor  # (L,), mean of α by layer that has a sidecar
    tokens: Tensor  # (C, W · T), mean of α over these layers


def load_models(setup: Setup) -> TrainedModels:
    """The base models and their tokenizer, read anew, on the device. Raises ValueError without a file or a checkpoint."""
    if setup.checkpoint is not None:
        trained = TrainedModels({0: load_checkpoint(setup.checkpoint)}, load_tokenizer(setup.checkpoint))
    elif setup.models is not None:
        trained = load_trained(setup.models)
    else:
        raise ValueError("Setup: neither models nor checkpoint is given; one of them is needed")
    for model in trained.models.values():
        model.to(setup.device)
    return trained


@cache
def load_windows(setup: Setup) -> TextWindows:
    """The text of a run, kept from one call to the next. Raises ValueError if no held-out chapter has W · T + 1 tokens."""
    corpus = load_corpus(setup.text, tokenizer=load_models(setup).tokenizer)
    T, length, parts = setup.window, setup.window * setup.windows, []
    for chapters in corpus.tokens:
        whole = [chapter[: length + 1].unfold(0, T + 1, T) for chapter in chapters if len(chapter) > length]
        if not whole:
            raise ValueError(f"no chapter has the {length + 1} tokens of its windows; fewer or smaller ones are needed")
        parts.append(torch.stack(whole).to(setup.device))
    chosen = (part if setup.chapters is None else evenly(part, setup.chapters) for part in parts)
    return TextWindows(corpus.train.to(setup.device), *chosen)


def evenly(windows: Tensor, most: int) -> Tensor:
    """At most so many of windows [C,...], from all over the text."""
    return windows[torch.linspace(0, len(windows) - 1, min(most, len(windows))).round().long()]


def make_sidecars(model: BlockFFNModel, seed: int, mamba: Mapping[str, int]) -> Sidecars:
    """Untrained sidecars for every layer, by layer number."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sidecars = {i: MambaSidecar(model.config.token_dim, **mamba) for i in range(len(model.layers))}
    return {i: sidecar.to(model.lm_head.weight.device) for i, sidecar in sidecars.items()}


def save_sidecars(path: str | Path, trained: Mapping[tuple[int, int], Sidecars], mamba: Mapping[str, int]) -> None:
    """Write sidecars by (base, seed) and layer, all made with the options `mamba`, in one file, whole or not at all."""
    by_name = {f"{base}/{seed}/{i}": sidecar for (base, seed), layers in trained.items() for i, sidecar in layers.items()}
    dim = next(iter(by_name.values())).norm.weight.shape[0]
    save_model(path, nn.ModuleDict(by_name), {"names": list(by_name), "dim": dim, "mamba": dict(mamba)})


def load_sidecars(path: str | Path) -> dict[tuple[int, int], Sidecars]:
    """What `save_sidecars` wrote, by (base, seed) and layer."""
    by_name: dict[str, MambaSidecar] = {}

    def build(data: dict[str, Any]) -> nn.ModuleDict:
        by_name.update({name: MambaSidecar(data["dim"], **data["mamba"]) for name in data["names"]})
        return nn.ModuleDict(by_name)

    load_model(path, build)
    found: dict[tuple[int, int], Sidecars] = {}
    for name, sidecar in by_name.items():
        base, seed, layer = map(int, name.split("/"))
        found.setdefault((base, seed), {})[layer] = sidecar
    return found


def attach_all(model: BlockFFNModel, sidecars: Sidecars, gate: Callable[[int], Gate]) -> None:
    """`attach`, with the routing of the layer before as the signal, and layer 0, which has none, asking its own router."""
    for i, sidecar in sidecars.items():
        attach(model, {i: sidecar}, gate, source="previous" if i else "own")


@contextmanager
def mixed(model: BlockFFNModel, sidecars: Sidecars, alpha: Sequence[float]) -> Iterator[BlockFFNModel]:
    """Inside, the model with the sidecars attached and α fixed, layer by layer."""
    attach_all(model, sidecars, lambda i: Gate("fixed", alpha[i]))
    try:
        yield model
    finally:
        detach(model)


def score_windows(model: BlockFFNModel, windows: Tensor) -> WindowScores:
    """Held-out windows [C, W, T + 1], every token but the first of each scored once, given those before it in its window."""
    C, nats = len(windows), []
    with evaluating(model), recorded_alpha(model) as record:
        for rows in windows.flatten(0, 1).split(ROWS):
            logits = model(rows[:, :-1])
            nats.append(F.cross_entropy(logits.mT, rows[:, 1:], reduction="none").double())
    of_chapter = torch.cat(nats).view(C, -1).mean(1).cpu()
    if not record:
        return WindowScores(of_chapter, torch.zeros(0), of_chapter.new_zeros(C, windows[0, :, 1:].numel()))
    alpha = torch.stack([torch.cat(parts).float().view(C, -1) for parts in record.values()]).cpu()  # (L, C, W · T)
    return WindowScores(of_chapter, alpha.mean((1, 2), dtype=torch.float64), alpha.mean(0))


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridRun(Run[Network]):
    """A run on one of the base models."""

    setup: Setup
    base: int  #: the base model's seed

    def labels(self) -> Row:
        return {"base": self.base, "seed": self.seed}

    @property
    def own_seed(self) -> int:
        """The seed of all that the run draws: runs of two base models share no start and no batch."""
        return 1_000 * self.base + self.seed

    def base_model(self) -> BlockFFNModel:
        return load_models(self.setup).models[self.base]


@dataclass(frozen=True, kw_only=True, slots=True)
class SidecarRun(HybridRun[nn.ModuleDict]):
    """The training of one base model's sidecars: distilled on each attention's output, then tuned on the model's own loss.

    While they are tuned, every layer has an α of its own in every batch, drawn uniformly from 0 … 1: no α, no layer and no
    gate is favoured. The history is that of the distillation, `layer_0` … on validation chapters. Rows: for `sidecar`
    "untrained", "distilled" and "tuned" the `error` of each `layer`, as `distillation_errors`, on `ROWS` test chapters.
    """

    mamba: Mapping[str, int] = field(default_factory=dict)  #: options of `MambaSidecar`
    distil_steps: int = 250
    tune_steps: int = 120
    batch_size: int = 4  #: windows
    learning_rate: float = 3e-3  #: of the distillation; tuning has a third of it

    def build(self) -> nn.ModuleDict:
        sidecars = make_sidecars(self.base_model(), self.own_seed, self.mamba)
        return nn.ModuleDict({str(i): sidecar for i, sidecar in sidecars.items()})

    def train(self, model: nn.ModuleDict) -> Scores:
        base, text = self.base_model(), load_windows(self.setup)
        sidecars, sample = sidecars_in(model), window_sampler(text.stream, self.setup.window)
        shared: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.own_seed}
        interval = max(1, self.distil_steps // 8)
        plan = TrainingConfig(steps=self.distil_steps, learning_rate=self.learning_rate, evaluation_interval=interval, **shared)
        history = hybrid.distil(base, sidecars, sample, plan, held_out=evenly(text.validation, ROWS)[:, 0, :-1])
        distilled = self._errors(model, "distilled")
        gates = {i: Gate("fixed") for i in sidecars}
        attach_all(base, sidecars, gates.__getitem__)

        def sample_and_mix(generator: Generator, batch_size: int) -> tuple[Tensor, Tensor]:
            batch = sample(generator, batch_size)
            for gate, alpha in zip(gates.values(), torch.rand(len(gates), generator=generator).tolist(), strict=True):
                gate.alpha = alpha
            return batch

        hybrid.tune(base, sample_and_mix, TrainingConfig(steps=self.tune_steps, learning_rate=self.learning_rate / 3, **shared))
        detach(base)
        return Scores(distilled, history=history.records)

    def score(self, model: nn.ModuleDict, trained: bool) -> Scores:
        return Scores(self._errors(model, "tuned" if trained else "untrained"))

    def _errors(self, model: nn.ModuleDict, kind: str) -> list[Row]:
        tokens = evenly(load_windows(self.setup).test, ROWS)[:, 0, :-1]
        with evaluating(model):
            errors = hybrid.distillation_errors(self.base_model(), sidecars_in(model), tokens)
        return [{"sidecar": kind, "layer": layer, "error": error.item()} for layer, error in errors.items()]


def sidecars_in(modules: nn.Module) -> Sidecars:
    """The sidecars of a trained `SidecarRun`'s model, by layer."""
    return {int(name): sidecar for name, sidecar in modules.named_children() if isinstance(sidecar, MambaSidecar)}


@dataclass(frozen=True, kw_only=True, slots=True)
class AttachedRun(HybridRun[BlockFFNModel]):
    """A run on a base model with sidecars from a file. The model is too large for the result."""

    keeps_state: ClassVar[bool] = False

    sidecars: str  #: a file by `save_sidecars`

    def load_sidecars(self) -> Sidecars:
        """The run's sidecars as they are in the file, on its device."""
        return {i: sidecar.to(self.setup.device) for i, sidecar in load_sidecars(self.sidecars)[self.base, self.seed].items()}


class Mixture(NamedTuple):
    """A fixed α by layer, and the sidecars: "trained", "untrained", or "silent": α takes attention away and gives nothing."""

    alpha: tuple[float, ...]
    sidecars: str = "trained"


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRun(AttachedRun):
    """Mixtures scored with one run's sidecars; nothing is trained.

    Rows: `sidecars`, `alpha` and `nats` of each mixture. The tensors are the nats [C] of test chapters by mixture, and by
    "baseline" those of the model without sidecars.
    """

    mixtures: tuple[Mixture, ...]
    mamba: Mapping[str, int] = field(default_factory=dict)  #: of the untrained sidecars

    def build(self) -> BlockFFNModel:
        return self.base_model()

    def score(self, model: BlockFFNModel, trained: bool) -> Scores:
        test = load_windows(self.setup).test
        if not trained:
            return Scores(tensors={"baseline": score_windows(model, test).nats})
        sidecars, untrained = self.load_sidecars(), make_sidecars(model, self.own_seed, self.mamba)
        kinds = {"trained": sidecars, "untrained": untrained, "silent": copy.deepcopy(sidecars)}
        for silent in kinds["silent"].values():
            nn.init.zeros_(silent.block.out_proj.weight)
        nats: dict[Any, Tensor] = {}
        for mixture in self.mixtures:
            with mixed(model, kinds[mixture.sidecars], mixture.alpha):
                nats[mixture] = score_windows(model, test).nats
        return Scores([{**mixture._asdict(), "nats": value.mean().item()} for mixture, value in nats.items()], nats)


def model_pass(run: AttachedRun, alpha: float | None, tokens: Tensor) -> Callable[[], Tensor]:
    """A pass of the model over tokens [B,T], no gradient, α fixed and the same in all layers; None is without sidecars."""
    model = run.base_model()
    if alpha is not None:
        attach_all(model, run.load_sidecars(), lambda i: Gate("fixed", alpha))
    return torch.no_grad()(lambda: model(tokens.to(run.setup.device)))


def gates_of(model: BlockFFNModel) -> list[Gate]:
    """The gates of the layers that have sidecars, in their order."""
    return [layer.gate for layer in hybrid.hybrid_layers(model).values()]
