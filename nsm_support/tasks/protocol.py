"""What every task is: batches to train on, fixed held-out parts, controls; and how outputs are scored."""

import math
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

IGNORE = -100  #: the target where nothing is asked, as `cross_entropy` takes it
HELD_OUT = ("validation", "test")


class Batch(NamedTuple):
    """Inputs [B, T] tokens or [B, T, input_dim] vectors; targets [B] (classification) or [B, T], int64."""

    inputs: Tensor
    targets: Tensor


class Control(NamedTuple):
    """What stands beside a model: "chance: …", "counter: …" or "optimum: …", its accuracy, its loss (None if none)."""

    name: str
    accuracy: float
    loss_nats: float | None


class Score(NamedTuple):
    """How many of the targets were right, how many were asked for, and the sum of their losses in nats."""

    correct: int
    asked: int
    nats: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.asked

    @property
    def loss_nats(self) -> float:
        return self.nats / self.asked

    @property
    def bits(self) -> float:
        """The loss in bits; bits per character where the targets are characters."""
        return self.loss_nats / math.log(2)


def score(outputs: Tensor, targets: Tensor) -> Score:
    """Score outputs [..., C], logits or log-probabilities, by targets [...]; `IGNORE` is left out. Sums are float64.

    Scores of several batches add up field by field. Raises ValueError if the shapes differ, nothing is asked, or a target is no
    class.
    """
    if outputs.shape[:-1] != targets.shape:
        raise ValueError(f"score: outputs {tuple(outputs.shape)} for targets {tuple(targets.shape)}; [..., C] is needed")
    asked = targets != IGNORE
    if not asked.any():
        raise ValueError("score: every target is IGNORE; at least one has to be asked for")
    logs, wanted = outputs.detach()[asked].double().log_softmax(-1), targets[asked]  # (asked, C), (asked,)
    if wanted.min() < 0 or wanted.max() >= logs.shape[1]:
        span = f"{wanted.min().item()} to {wanted.max().item()}"
        raise ValueError(f"score: targets from {span}; 0 to {logs.shape[1] - 1} and IGNORE are accepted")
    nats = 0.0 - logs.gather(1, wanted[:, None]).sum().item()  # 0, not −0, for a perfect model
    return Score(int((logs.argmax(1) == wanted).sum()), len(wanted), nats)


def control(name: str, probabilities: Tensor, targets: Tensor) -> Control:
    """The control that predicts these probabilities [..., C] for targets [...]."""
    measured = score(probabilities.double().log(), targets)
    return Control(name, measured.accuracy, measured.loss_nats)


class Task:
    """One task: training batches without end, two fixed held-out parts, and the controls on the test part.

    A model reads `vocab_size` tokens, or vectors of `input_dim` (the other is None), at most `max_length` of them in
    training, causally if `causal`, and gives `output_dim` classes. All tensors are on the CPU.
    """

    name: str
    head: Literal["classification", "labelling", "language_model"]
    causal: bool
    output_dim: int
    max_length: int
    vocab_size: int | None = None
    input_dim: int | None = None

    def sample_batch(self, generator: Generator, batch_size: int, length: int | None = None) -> Batch:
        """A training batch, as `training.fit` takes it; all its randomness comes from the generator.

        Raises ValueError for a length that the task does not have: data tasks and ListOps have None alone.
        """
        raise NotImplementedError

    def held_out(self, part: Literal["validation", "test"], length: int | None = None, size: int | None = None) -> Batch:
        """A held-out part, the same at every call; or its first `size` examples, a mixed sample of it.

        Raises ValueError for another part, and for a length or size that the task does not have.
        """
        raise NotImplementedError

    def controls_at(self, length: int | None = None) -> list[Control]:
        """The controls on all of `held_out("test", length)`: chance, the counters, the optimum if it is known.

        Chance is the best constant in hindsight: it knows the test part's shares of the classes, and nothing else.
        """
        test = self.held_out("test", length)
        shares = test.targets[test.targets != IGNORE].bincount().double()
        shares /= shares.sum()
        chance = Control("chance: the commonest class", shares.max().item(), torch.special.entr(shares).sum().item())
        return [chance, *self._counters(test)]

    @cached_property
    def controls(self) -> list[Control]:
        """`controls_at()`, computed when first asked for."""
        return self.controls_at()

    def _counters(self, test: Batch) -> list[Control]:
        raise NotImplementedError

    def _has(self, part: str, length: int | None = None) -> None:
        """Refuse a part that is not held out, and any length."""
        if part not in HELD_OUT:
            raise ValueError(f"{self.name}: part {part!r}; {' and '.join(map(repr, HELD_OUT))} are accepted")
        if length is not None:
            raise ValueError(f"{self.name}: length = {length}; None is accepted: the task's sizes fix the length")
