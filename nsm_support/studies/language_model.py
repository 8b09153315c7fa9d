"""Trainings of BlockFFN language models, what they are worth on held-out chapters, and their files.

Letters: T tokens, E experts (blocks), L layers.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from nsm_support.blockffn.model import BlockFFNConfig, BlockFFNModel, losses
from nsm_support.blockffn.objectives import chunk_sparsity, dead_experts, token_sparsity
from nsm_support.corpus import Corpus, Tokenizer, load_corpus
from nsm_support.data import window_sampler
from nsm_support.metrics import token_losses
from nsm_support.studies.protocol import FittedRun, Scores
from nsm_support.training import evaluating, load_model, save_model

CHUNKS = (8, 64)  #: tokens of the chunks whose sparsity is measured: the paper's, and that of its objective
Windows = tuple[Tensor, Tensor]  #: inputs and targets [B,T]


@cache
def read_corpus(text: str | None, vocab_size: int) -> Corpus:
    """`load_corpus`, once a process."""
    return load_corpus(text, vocab_size=vocab_size)


@cache
def _training_windows(text: str | None, vocab_size: int, window: int):
    return window_sampler(read_corpus(text, vocab_size).train, window)


def windows(chapters: Sequence[Tensor], length: int) -> Windows:
    """Whole windows of chapters one after the other, from the first token on: inputs and targets [B,length].
    Raises ValueError if there is not one.
    """
    tokens = torch.cat(tuple(chapters))
    count = (len(tokens) - 1) // length
    if not count:
        raise ValueError(f"a window takes {length + 1} tokens; the chapters have {len(tokens)}")
    inputs, targets = (tokens[first : first + count * length].view(count, length) for first in (0, 1))
    return inputs, targets


def routing_measures(scores: Sequence[Tensor]) -> dict[str, float]:
    """What the scores [B,T,E] of each layer's routing say of a model: means over layers, tokens or chunks, and blocks.

    `token_sparsity`, `chunk_8_sparsity` and `chunk_64_sparsity`, and `chunk_8_scattered` and `chunk_64_scattered`: the same of
    as many tokens from anywhere, drawn without replacement, in expectation. Each with `_alive` behind its name over those
    blocks alone that some token here uses. And `dead_experts`, how many blocks of all layers none does. Raises ValueError for
    fewer than 64 tokens, or if a layer uses no block at all.
    """
    measures: dict[str, list[float]] = defaultdict(list)
    dead = [dead_experts(layer) for layer in scores]
    if any(layer.all() for layer in dead):
        raise ValueError("a layer uses no block for any token: nothing is left to measure")
    for layer, unused in zip(scores, dead, strict=True):
        for ending, kept in (("", layer), ("_alive", layer[..., ~unused])):
            measures[f"token_sparsity{ending}"].append(token_sparsity(kept).mean().item())
            for size in CHUNKS:
                measures[f"chunk_{size}_sparsity{ending}"].append(chunk_sparsity(kept, size).mean().item())
                measures[f"chunk_{size}_scattered{ending}"].append(scattered_sparsity(kept, size))
    means = {name: sum(values) / len(values) for name, values in measures.items()}
    return means | {"dead_experts": float(sum(int(layer.sum()) for layer in dead))}


def scattered_sparsity(scores: Tensor, size: int) -> float:
    """Share of the blocks that `size` tokens from anywhere in scores [...,E] leave out together, in expectation.

    Of n tokens u leave a block out, so all that are drawn do with probability Π_j (u − j)/(n − j), j = 0 … size − 1.
    """
    unused = (scores == 0).flatten(0, -2).sum(0)
    taken = torch.arange(size, device=scores.device)
    chances = (unused[:, None] - taken).clamp(min=0).double() / (scores[..., 0].numel() - taken)
    return chances.prod(1).mean().item()


@torch.no_grad()
def read_windows(model: BlockFFNModel, inputs: Tensor, targets: Tensor, batch_size: int = 16) -> tuple[float, list[Tensor]]:
    """Mean loss (nats a token) of windows [B,T], and the scores [B,T,E] of each routed layer, `batch_size` at a time."""
    nats, scores = [], []
    for rows, wanted in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        logits, routing = model.trace(rows)
        nats.append(F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").double())
        scores.append([routed.scores for routed in routing if routed is not None])
    return torch.cat(nats).mean().item(), [torch.cat(layer) for layer in zip(*scores, strict=True)]


def chapter_losses(model: BlockFFNModel, chapters: Sequence[Tensor], window: int) -> list[Tensor]:
    """`token_losses` of each chapter by itself, windows overlapping by a half: nats, [n−1] float64 each."""
    device, stride = next(model.parameters()).device, max(1, window // 2)
    return [token_losses(model, chapter.to(device), window=window, stride=stride).cpu() for chapter in chapters]


def score_chapters(model: BlockFFNModel, chapters: Sequence[Tensor], window: int) -> Scores:
    """What a model is worth on chapters that it never saw: one row, and the tensors `losses`, as `LanguageModelRun` has them.
    Raises ValueError if the chapters together do not fill a window.
    """
    with evaluating(model):
        loss, measures = _measures(model, windows(chapters, window))
        return Scores([{"part": "test", "loss": loss, **measures}], {"losses": chapter_losses(model, chapters, window)})


def _measures(model: BlockFFNModel, parts: Windows) -> tuple[float, dict[str, float]]:
    device = next(model.parameters()).device
    loss, scores = read_windows(model, parts[0].to(device), parts[1].to(device))
    return loss, routing_measures(scores) if scores else {}


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageModelRun(FittedRun[BlockFFNModel, Windows]):
    """One training. The text's vocabulary is as large as the model's.

    The history holds `validation_loss` (nats a token, windows that do not overlap), and of a routed model the
    `routing_measures` on the same windows. The one row is of all windows of the test chapters, after training: `loss`, and
    `routing_measures` if routed. `losses` among the tensors are the nats of every token but the first of each test
    chapter, [n−1] float64 each.
    """

    model: BlockFFNConfig
    text: str | None = None  #: path of a text file; None for the American Standard Version
    window: int = 128  #: tokens of a window, T, in training and in validation
    batch_size: int = 4  #: windows of an update
    steps: int = 1000
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    validated: int = 128  #: windows that a measurement reads, spread over the validation chapters; all, if fewer
    held_out: int | None = None  #: test chapters that are scored, the first ones; None: all

    def build(self) -> BlockFFNModel:
        return BlockFFNModel(self.model).to(self.device)

    def sample_batch(self, generator: Generator, size: int) -> Windows:
        inputs, targets = _training_windows(self.text, self.model.vocab_size, self.window)(generator, size)
        return inputs.to(self.device), targets.to(self.device)

    def loss(self, model: BlockFFNModel, batch: Windows) -> Tensor:
        return losses(model, batch).total

    def evaluate(self, model: BlockFFNModel) -> Mapping[str, float]:
        inputs, targets = windows(read_corpus(self.text, self.model.vocab_size).tokens.validation, self.window)
        chosen = torch.linspace(0, len(inputs) - 1, min(self.validated, len(inputs))).long()  # all over the chapters
        loss, measures = _measures(model, (inputs[chosen], targets[chosen]))
        return {"validation_loss": loss, **measures}

    def score(self, model: BlockFFNModel, trained: bool) -> Scores:
        if not trained:
            return Scores()  # the first record of the history is of this model
        chapters = read_corpus(self.text, self.model.vocab_size).tokens.test[: self.held_out]
        return score_chapters(model, chapters, self.window)


class TrainedModels(NamedTuple):
    """Models of a text by the seed that they began with, all of one config, in eval mode; and the text's tokenizer."""

    models: dict[int, BlockFFNModel]
    tokenizer: Tokenizer


def save_trained(path: str | os.PathLike[str], models: Mapping[int, BlockFFNModel], tokenizer: Tokenizer) -> None:
    """Write models of one config, and their tokenizer, in one file, whole or not at all. Raises ValueError if there is no
    model, or configs differ.
    """
    configs = [model.config for model in models.values()]
    if not configs or any(config != configs[0] for config in configs):
        raise ValueError(f"one or more models of one config can be saved together; got {configs}")
    together = nn.ModuleDict({str(seed): model for seed, model in models.items()})
    save_model(path, together, {"config": asdict(configs[0]), "seeds": list(models), "tokenizer": tokenizer.to_str()})


def load_trained(path: str | os.PathLike[str]) -> TrainedModels:
    """What `save_trained` wrote. Raises FileNotFoundError, or `training.CheckpointError` for a damaged file."""
    metadata: dict[str, Any] = {}
    models: dict[int, BlockFFNModel] = {}

    def build(stored: dict[str, Any]) -> nn.ModuleDict:
        metadata.update(stored)
        models.update({seed: BlockFFNModel(BlockFFNConfig(**stored["config"])) for seed in stored["seeds"]})
        return nn.ModuleDict({str(seed): model for seed, model in models.items()})

    load_model(path, build)
    return TrainedModels(models, Tokenizer.from_str(metadata["tokenizer"]))
