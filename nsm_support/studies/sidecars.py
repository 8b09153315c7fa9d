"""Sidecars for a trained model: their training, and the model's loss with them at a fixed α.

`train_sidecars` and `sweep` are functions of one run, which `nsm_support.workers` can call. A run is a base model and a
seed of its sidecars.

Letters: L layers, B batch, C held-out chapters, W windows of each, T tokens of a window.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from nsm_support.blockffn.checkpoint import load_checkpoint, load_tokenizer
from nsm_support.blockffn.gates import Gate
from nsm_support.blockffn.hybrid import MambaSidecar, attach, detach, distil, distillation_errors, recorded_alpha, tune
from nsm_support.blockffn.model import BlockFFNModel
from nsm_support.data import window_sampler
from nsm_support.studies.corpus import Trained, load_corpus, load_trained
from nsm_support.training import TrainingConfig, evaluating, load_model, save_model

Sidecars = dict[int, MambaSidecar]
ROWS = 32  #: windows at a time in evaluation; a gate's draws repeat from one such batch to the next


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """The base models, and the text."""

    models: str | None = None  #: a file by `corpus.save_trained`
    checkpoint: str | None = None  #: instead: a folder or a name for `load_checkpoint`; its model is base 0
    text: str | None = None  #: a text file; None is the Bible
    window: int = 128  #: T
    windows: int = 1  #: W, of a held-out chapter, from its beginning
    chapters: int | None = None  #: most of each part, from all over it; None is all
    device: str = "cpu"


class Pieces(NamedTuple):
    """The text as token numbers int64: all of the training part [n], and of each part the first W windows of every chapter
    that has so many [C, W, T + 1]. A window's last token is the next one's first: each is predicted once."""

    stream: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SidecarRun:
    """All that decides the training of one base model's sidecars."""

    material: Material
    base: int  #: the base model's seed
    seed: int  #: with that of the base model, of the sidecars' start and of the batches
    mamba: Mapping[str, int] = field(default_factory=dict)  #: options of `MambaSidecar`
    distil_steps: int = 250
    tune_steps: int = 120
    batch_size: int = 4  #: windows
    learning_rate: float = 3e-3  #: of the distillation; tuning has a third of it


def own_seed(run: Any) -> int:
    """The seed of all that a run draws, from its `base` and `seed`: runs of two base models share no start and no batch."""
    return 1_000 * run.base + run.seed


class Scored(NamedTuple):
    """What a model made of held-out windows."""

    nats: Tensor  # (C,), mean over the predicted tokens of a chapter, float64
    alpha: Tensor  # (L,), mean of α by layer that has a sidecar
    tokens: Tensor  # (C, W · T), mean of α over these layers


def load(material: Material) -> Trained:
    """The base models and their tokenizer, read anew, on the device."""
    if material.checkpoint is None:
        trained = load_trained(material.models)
    else:
        trained = Trained({0: load_checkpoint(material.checkpoint)}, load_tokenizer(material.checkpoint))
    for model in trained.models.values():
        model.to(material.device)
    return trained


@cache
def pieces(material: Material) -> Pieces:
    """The text of a run, kept from one call to the next. Raises ValueError if no held-out chapter has W · T + 1 tokens."""
    corpus = load_corpus(material.text, tokenizer=load(material).tokenizer)
    T, length, parts = material.window, material.window * material.windows, []
    for chapters in corpus.tokens:
        whole = [chapter[: length + 1].unfold(0, T + 1, T) for chapter in chapters if len(chapter) > length]
        if not whole:
            raise ValueError(f"no chapter has the {length + 1} tokens of its windows; fewer or smaller ones are needed")
        parts.append(torch.stack(whole).to(material.device))
    chosen = (part if material.chapters is None else evenly(part, material.chapters) for part in parts)
    return Pieces(corpus.train.to(material.device), *chosen)


def evenly(windows: Tensor, most: int) -> Tensor:
    """At most so many of windows [C,...], from all over the text."""
    return windows[torch.linspace(0, len(windows) - 1, min(most, len(windows))).round().long()]


def make_sidecars(model: BlockFFNModel, seed: int, mamba: Mapping[str, int]) -> Sidecars:
    """Untrained sidecars for every layer, by layer number."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = {i: MambaSidecar(model.config.token_dim, **mamba) for i in range(len(model.layers))}
    return {i: sidecar.to(model.lm_head.weight.device) for i, sidecar in made.items()}


def silent(sidecars: Sidecars) -> Sidecars:
    """Copies that always give zero: with them α takes attention away and puts nothing in its place."""
    quiet = copy.deepcopy(sidecars)
    for sidecar in quiet.values():
        nn.init.zeros_(sidecar.block.out_proj.weight)
    return quiet


def save_sidecars(path: str | Path, trained: Mapping[tuple[int, int], Sidecars], mamba: Mapping[str, int]) -> None:
    """Write sidecars by (base, seed) and layer, all made with the options `mamba`, in one file, whole or not at all."""
    together = {f"{base}/{seed}/{i}": one for (base, seed), every in trained.items() for i, one in every.items()}
    dim = next(iter(together.values())).norm.weight.shape[0]
    save_model(path, nn.ModuleDict(together), {"names": list(together), "dim": dim, "mamba": dict(mamba)})


def sidecars_of(run: "SweepRun") -> Sidecars:
    """A run's sidecars as they are in the file, on its device."""
    return {i: one.to(run.material.device) for i, one in load_sidecars(run.sidecars)[run.base, run.seed].items()}


def load_sidecars(path: str) -> dict[tuple[int, int], Sidecars]:
    """What `save_sidecars` wrote, by (base, seed) and layer."""

    def build(data: dict[str, Any]) -> nn.ModuleDict:
        return nn.ModuleDict({name: MambaSidecar(data["dim"], **data["mamba"]) for name in data["names"]})

    found: dict[tuple[int, int], Sidecars] = {}
    for name, sidecar in load_model(path, build).items():
        base, seed, layer = map(int, name.split("/"))
        found.setdefault((base, seed), {})[layer] = sidecar
    return found


def attach_all(model: BlockFFNModel, sidecars: Sidecars, gate) -> None:
    """`attach`, with the routing of the layer before as the signal, and layer 0, which has none, asking its own router."""
    attach(model, {i: one for i, one in sidecars.items() if i == 0}, gate, source="own")
    attach(model, {i: one for i, one in sidecars.items() if i > 0}, gate, source="previous")


def score(model: BlockFFNModel, windows: Tensor) -> Scored:
    """Held-out windows [C, W, T + 1], every token but the first of each scored once, given those before it in its window."""
    C, rows_of_all, nats = len(windows), windows.flatten(0, 1), []
    with evaluating(model), recorded_alpha(model) as record:
        for rows in rows_of_all.split(ROWS):
            logits = model(rows[:, :-1])
            nats.append(F.cross_entropy(logits.mT, rows[:, 1:], reduction="none").double())
    of_chapter = torch.cat(nats).view(C, -1).mean(1).cpu()
    if not record:
        return Scored(of_chapter, torch.zeros(0), of_chapter.new_zeros(C, windows[0, :, 1:].numel()))
    alpha = torch.stack([torch.cat(parts).float().view(C, -1) for parts in record.values()]).cpu()  # (L, C, W · T)
    return Scored(of_chapter, alpha.mean((1, 2), dtype=torch.float64), alpha.mean(0))


def train_sidecars(run: SidecarRun) -> dict[str, Any]:
    """Distil sidecars on each attention's output, then tune them on the model's own loss.

    While they are tuned, every layer has an α of its own in every batch, drawn uniformly from 0 … 1: no α, no layer and no
    gate is favoured.

    Returns:
        sidecars: by layer, on the CPU. history: of the distillation, `layer_0` … on validation chapters.
        errors: `distillation_errors` on `ROWS` test chapters by layer, for "untrained", "distilled" and "tuned" sidecars.
    """
    text, model = pieces(run.material), load(run.material).models[run.base]
    sidecars = make_sidecars(model, own_seed(run), run.mamba)
    sample = window_sampler(text.stream, run.material.window)
    options = {"batch_size": run.batch_size, "seed": own_seed(run)}

    def errors() -> dict[int, float]:
        students = nn.ModuleDict({str(i): one for i, one in sidecars.items()})
        with evaluating(students):
            found = distillation_errors(model, students, evenly(text.test, ROWS)[:, 0, :-1])
        return {int(i): error.item() for i, error in found.items()}

    measured = {"untrained": errors()}
    plan = TrainingConfig(
        steps=run.distil_steps, learning_rate=run.learning_rate, evaluation_interval=max(1, run.distil_steps // 8), **options
    )
    history = distil(model, sidecars, sample, plan, held_out=evenly(text.validation, ROWS)[:, 0, :-1])
    measured["distilled"] = errors()
    attach_all(model, sidecars, lambda i: Gate("fixed"))

    def sample_and_mix(generator: Generator, batch_size: int) -> tuple[Tensor, Tensor]:
        batch = sample(generator, batch_size)
        for layer, alpha in zip(model.layers, torch.rand(len(model.layers), generator=generator).tolist(), strict=True):
            layer.gate.alpha = alpha
        return batch

    tune(model, sample_and_mix, TrainingConfig(steps=run.tune_steps, learning_rate=run.learning_rate / 3, **options))
    sidecars = detach(model)
    measured["tuned"] = errors()
    return {"sidecars": {i: one.cpu().eval() for i, one in sidecars.items()}, "history": history.records, "errors": measured}


class Mixture(NamedTuple):
    """A fixed α by layer, and the sidecars: "trained", "untrained" or "silent"."""

    alpha: tuple[float, ...]
    sidecars: str = "trained"


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRun:
    """Mixtures to be scored with one run's sidecars."""

    material: Material
    sidecars: str  #: a file by `save_sidecars`
    base: int
    seed: int
    mixtures: tuple[Mixture, ...]
    mamba: Mapping[str, int] = field(default_factory=dict)  #: of the untrained sidecars


def sweep(run: SweepRun) -> dict[Mixture | str, Tensor]:
    """Nats [C] of test chapters for every mixture; and of "baseline", the model without sidecars."""
    text, model = pieces(run.material), load(run.material).models[run.base]
    trained = sidecars_of(run)
    kinds = {"trained": trained, "silent": silent(trained), "untrained": make_sidecars(model, own_seed(run), run.mamba)}
    found: dict[Mixture | str, Tensor] = {"baseline": score(model, text.test).nats}
    for mixture in run.mixtures:
        with mixed(model, kinds[mixture.sidecars], mixture.alpha):
            found[mixture] = score(model, text.test).nats
    return found


@contextmanager
def mixed(model: BlockFFNModel, sidecars: Sidecars, alpha: Sequence[float]) -> Iterator[BlockFFNModel]:
    """Inside, the model with the sidecars attached and α fixed, layer by layer."""
    attach_all(model, sidecars, lambda i: Gate("fixed", alpha[i]))
    try:
        yield model
    finally:
        detach(model)


def model_pass(run: SweepRun, alpha: float | None, tokens: Tensor) -> Callable[[], Tensor]:
    """A pass of the model over tokens [B,T], no gradient, α fixed and the same in all layers; None is without sidecars."""
    model = load(run.material).models[run.base]
    if alpha is not None:
        attach_all(model, sidecars_of(run), lambda i: Gate("fixed", alpha))
    return torch.no_grad()(lambda: model(tokens.to(run.material.device)))
