"""One training of the BlockFFN pages, measured on the way: `train(run)`, which `nsm_support.workers` can call.

Letters: T tokens, E experts (blocks), L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nsm_support.blockffn.model import BlockFFNConfig, BlockFFNModel, losses
from nsm_support.blockffn.objectives import chunk_sparsity, dead_experts, token_sparsity
from nsm_support.data import window_sampler
from nsm_support.perplexity import token_losses
from nsm_support.studies.corpus import Corpus, load_corpus
from nsm_support.training import TrainingConfig, evaluating, fit

CHUNKS = (8, 64)  #: tokens of the chunks whose sparsity is measured: the paper's, and that of its objective


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """All that decides a training. The text's vocabulary is as large as the model's."""

    model: BlockFFNConfig
    text: str | None = None  #: path of a text file; None for the American Standard Version
    seed: int = 0  #: of the start and the batches
    window: int = 128  #: tokens of a window, T, in training and in validation
    batch_size: int = 4  #: windows of an update
    steps: int = 1000
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    records: int = 10  #: measurements on the way, besides that of the untrained model
    validated: int = 128  #: windows that a measurement reads, spread over the validation chapters; all, if fewer
    held_out: int | None = None  #: test chapters that are scored, the first ones; None: all
    device: str = "cpu"


@cache
def read_corpus(text: str | None, vocab_size: int) -> Corpus:
    """`load_corpus`, once a process."""
    return load_corpus(text, vocab_size=vocab_size)


def windows(chapters: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Whole windows of chapters one after the other, from the first token on: inputs and targets [B,length].

    Raises:
        ValueError: if there is not one.
    """
    tokens = torch.cat(tuple(chapters))
    count = (len(tokens) - 1) // length
    if not count:
        raise ValueError(f"a window takes {length + 1} tokens; the chapters have {len(tokens)}")
    inputs, targets = (tokens[first : first + count * length].view(count, length) for first in (0, 1))
    return inputs, targets


def routing_measures(scores: Sequence[Tensor]) -> dict[str, float]:
    """What the scores [B,T,E] of each layer's routing say of a model: means over layers, tokens or chunks, and blocks.

    `token_sparsity`, `chunk_8_sparsity` and `chunk_64_sparsity`, and `chunk_8_scattered` and `chunk_64_scattered`: the
    same of as many tokens from anywhere, drawn without replacement, in expectation. Each with `_alive` behind its name over
    those blocks alone that some token here uses. And `dead_experts`, how many blocks of all layers none does.

    Raises:
        ValueError: for fewer than 64 tokens, or if a layer uses no block at all.
    """
    found: dict[str, list[float]] = {}
    dead = [dead_experts(layer) for layer in scores]
    if any(layer.all() for layer in dead):
        raise ValueError("a layer uses no block for any token: nothing is left to measure")
    for layer, unused in zip(scores, dead, strict=True):
        for ending, kept in (("", layer), ("_alive", layer[..., ~unused])):
            found.setdefault(f"token_sparsity{ending}", []).append(token_sparsity(kept).mean().item())
            for size in CHUNKS:
                one = chunk_sparsity(kept, size).mean().item()
                found.setdefault(f"chunk_{size}_sparsity{ending}", []).append(one)
                found.setdefault(f"chunk_{size}_scattered{ending}", []).append(scattered_sparsity(kept, size))
    means = {name: sum(values) / len(values) for name, values in found.items()}
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
    for some, wanted in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        logits, routing = model.forward_with_routing(some)
        nats.append(F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").double())
        scores.append([routed.scores for routed in routing if routed is not None])
    return torch.cat(nats).mean().item(), [torch.cat(layer) for layer in zip(*scores, strict=True)]


def chapter_losses(model: BlockFFNModel, chapters: Sequence[Tensor], window: int) -> list[Tensor]:
    """`token_losses` of each chapter by itself, windows overlapping by a half: nats, [n−1] float64 each."""
    device = next(model.parameters()).device
    return [token_losses(model, one.to(device), window=window, stride=max(1, window // 2)).cpu() for one in chapters]


def score(model: BlockFFNModel, chapters: Sequence[Tensor], window: int) -> dict[str, Any]:
    """What a trained model is worth on chapters that it never saw: `losses` and `routing` of `train`.

    Raises:
        ValueError: if the chapters together do not fill a window.
    """
    device = next(model.parameters()).device
    with evaluating(model):
        loss, scores = read_windows(model, *(part.to(device) for part in windows(chapters, window)))
        routing = routing_measures(scores) if scores else {}
        return {"losses": chapter_losses(model, chapters, window), "routing": {"loss": loss, **routing}}


def train(run: Run) -> dict[str, Any]:
    """Train, and measure on held-out chapters.

    Returns:
        history: a dict a record, the first of the untrained model: `step`, `train_loss` (with the objectives; NaN at
            first), `seconds`, `validation_loss` (nats a token, windows that do not overlap), and of a routed model the
            `routing_measures` on the same windows.
        routing: the same on all windows of the test chapters, after training: `loss`, and `routing_measures` if routed.
        losses: nats of every token but the first of each test chapter, [n−1] float64 each.
        state: state_dict of the trained model, on the CPU.
    """
    corpus = read_corpus(run.text, run.model.vocab_size)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(run.seed)
        model = BlockFFNModel(run.model).to(run.device)
    chapters = corpus.tokens.test[: run.held_out]
    validation = windows(corpus.tokens.validation, run.window)
    some = torch.linspace(0, len(validation[0]) - 1, min(run.validated, len(validation[0]))).long()  # all over the chapters

    def measured(parts: tuple[Tensor, Tensor], name: str) -> dict[str, float]:
        loss, scores = read_windows(model, *(part.to(run.device) for part in parts))
        return {name: loss, **(routing_measures(scores) if scores else {})}

    draw = window_sampler(corpus.train, run.window)
    history = fit(
        model,
        lambda generator, size: tuple(part.to(run.device) for part in draw(generator, size)),
        lambda model, batch: losses(model, batch).total,
        TrainingConfig(
            steps=run.steps,
            batch_size=run.batch_size,
            learning_rate=run.learning_rate,
            seed=run.seed,
            weight_decay=run.weight_decay,
            evaluation_interval=max(1, run.steps // run.records),
        ),
        evaluate=lambda _: measured((validation[0][some], validation[1][some]), "validation_loss"),
    )
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    return {"history": history.records, "state": state, **score(model, chapters, run.window)}
