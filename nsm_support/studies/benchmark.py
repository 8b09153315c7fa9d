"""One model on one task at one learning rate from one seed; the rate is chosen in the same way for all models.

The models are `NSM` and the baselines, each as wide as brings it within 5 % of the Transformer's parameters. The rate is
chosen on the validation part with the first seed, from the same grid for every model; the test part is scored afterwards
and chooses nothing.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from nsm_support.checks import check_choice
from nsm_support.costs import count_parameters, match_parameters
from nsm_support.mixers import BASELINES, BaselineConfig, CNNConfig, SmallCNN
from nsm_support.nsm.models import NSM, NSMConfig
from nsm_support.studies.protocol import FittedRun, Row, Scores
from nsm_support.tasks import IGNORE, Batch, Score, Task, make_task, score
from nsm_support.training import evaluating

MODELS = ("NSM", *BASELINES)
FOLDED = ("mnist", "permuted_mnist")
FOLDS = 5
"""Of the digits, seed s tests on fold s: five seeds see every digit once in a test. Other tasks draw parts by the seed."""
EVALUATION_BATCH = 250
HeldOut = Literal["validation", "test"]


@cache
def _task(name: str, fold: int, seed: int, sizes: tuple) -> Task:
    return make_task(name, fold=fold, seed=seed, **dict(sizes))


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkRun(FittedRun[nn.Module, Batch]):
    """One training of a model on a task, at a rate, from a seed.

    Rows: one of the untrained model, one for validation, one for the test at each length. Each holds task, model, variant,
    rate, seed, part ("validation", "test", "untrained"), length (0 where a task has one), accuracy, nats (mean
    cross-entropy), parameters, steps, seconds. A run that diverged scores accuracy 0 and infinitely many nats: its rate is
    not chosen.
    """

    task: str
    model: str = "NSM"  #: one of `MODELS`, or "CNN" for the digits
    width: int = 48  #: of the Transformer; all others have as many parameters
    num_layers: int = 2
    positions: str = "none"  #: "learned" adds a table of positions to the tokens, in every model
    lengths: tuple[int, ...] = ()  #: at which the task is tested, where it has more than one
    held_out: int | None = None  #: examples of validation and of test; None: the task's own number
    sizes: dict[str, Any] = field(default_factory=dict)  #: of the task
    nsm: dict[str, Any] = field(default_factory=dict)  #: fields of `NSMConfig`
    variant: str = ""  #: names what was changed in the NSM, if anything
    changes: dict[str, Any] = field(default_factory=dict)  #: the fields of `NSMConfig` in which the variant differs
    records: int = 1

    def labels(self) -> Row:
        return {"task": self.task, "model": self.model, "variant": self.variant, "rate": self.learning_rate, "seed": self.seed}

    def load_task(self) -> Task:
        """The task, with the split that belongs to the seed."""
        fold, seed = (self.seed % FOLDS, 0) if self.task in FOLDED else (0, self.seed)
        return _task(self.task, fold, seed, tuple(sorted(self.sizes.items())))

    def build(self) -> nn.Module:
        """A fresh model, within 5 % of the parameters of the Transformer of width `width`. Raises ValueError for a model that
        there is not, or if no width comes within 5 %.
        """
        check_choice(self, (*MODELS, "CNN"), "model")
        task = replace(self, seed=0).load_task()
        common: dict[str, Any] = {"head": task.head, "vocab_size": task.vocab_size, "input_dim": task.input_dim}
        common["output_dim"] = None if task.head == "language_model" else task.output_dim
        if self.positions == "learned":
            common |= {"positions": "learned", "max_length": task.max_length}
        common["num_layers"] = self.num_layers
        machine = self.nsm | self.changes
        width = _width(self.model, task.causal, self.width, _items(common), _items(machine))
        return _of_width(self.model, width, task.causal, common, machine).to(self.device)

    def sample_batch(self, generator: Generator, size: int) -> Batch:
        return self._moved(self.load_task().sample_batch(generator, size))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model, batch)

    def score(self, model: nn.Module, trained: bool) -> Scores:
        if trained:
            return Scores([self._row(model, *asked, evaluate(model, self._held_out(*asked))) for asked in self._parts()])
        length = self._parts()[1][1]
        first = Batch(*(tensor[:EVALUATION_BATCH] for tensor in self._held_out("test", length)))
        return Scores([self._row(model, "untrained", length, evaluate(model, first))])

    def score_diverged(self, model: nn.Module, error: FloatingPointError) -> Scores:
        return Scores([self._row(model, *asked, Score(0, 1, math.inf)) for asked in self._parts()])

    def _parts(self) -> list[tuple[HeldOut, int | None]]:
        """The parts that are scored, validation first, and the length of their strings."""
        return [("validation", None), *(("test", length) for length in self.lengths or (None,))]

    def _moved(self, batch: Batch) -> Batch:
        return Batch(*(tensor.to(self.device) for tensor in batch))

    def _held_out(self, part: HeldOut, length: int | None) -> Batch:
        return self._moved(self.load_task().held_out(part, length, self.held_out))

    def _row(self, model: nn.Module, part: str, length: int | None, scored: Score) -> Row:
        row = {"part": part, "length": length or 0, "accuracy": scored.accuracy, "nats": scored.loss_nats}
        return {**row, "parameters": count_parameters(model), "steps": self.steps}


_WORDS: dict[str, Any] = {"width": 32, "lengths": (20, 40, 100, 400), "held_out": 500}
_MACHINE = {"num_layers": 1, "num_states": 2, "chunk": 1, "mix": "read", "positions": "none", "ffn_multiple": 1}
_RECALL = {"pairs": 4, "keys": 16, "values": 16}
_STATES = {"num_states": 16, "ffn_multiple": 2}
_PERMUTED = _STATES | {"window": 8, "chunk": 56}
_TEXT: dict[str, Any] = {"batch_size": 16, "width": 64, "held_out": 320, "sizes": {"length": 128}}
_DIGITS = {"num_states": 8, "window": 16, "chunk": 7, "mix": "sum", "ffn_multiple": 1}
SETTINGS = {
    run.task: run
    for run in (
        BenchmarkRun(task="mnist", steps=400, nsm=_DIGITS, positions="learned"),
        BenchmarkRun(task="recall", steps=400, nsm=_STATES | {"window": 4, "chunk": 2}, held_out=500, sizes=_RECALL),
        BenchmarkRun(task="parity", steps=500, nsm=_MACHINE, **_WORDS),
        BenchmarkRun(task="a5", steps=2000, nsm=_MACHINE, **_WORDS),
        BenchmarkRun(task="text", steps=250, nsm=_STATES | {"window": 16, "chunk": 16}, **_TEXT),
        BenchmarkRun(task="s3", steps=1500, nsm=_MACHINE, **_WORDS),
        BenchmarkRun(task="s5", steps=4000, nsm=_MACHINE, **_WORDS),
        BenchmarkRun(task="permuted_mnist", steps=600, nsm=_PERMUTED, batch_size=16, positions="learned"),
        BenchmarkRun(task="listops", steps=1500, nsm=_STATES | {"window": 8, "chunk": 4}, held_out=1000),
        BenchmarkRun(task="selective_copying", steps=1000, nsm=_STATES | {"window": 4, "chunk": 4}, held_out=500),
        BenchmarkRun(task="verse_section", steps=600, nsm=_STATES | {"window": 8}, positions="learned", held_out=1500),
    )
}
"""How every task is trained as the book publishes it; `dataclasses.replace` sets model, rate and seed, or changes a part."""


def models_of(task: str) -> tuple[str, ...]:
    """The models that are compared on a task: all of `MODELS`, and on digits as patches a small CNN."""
    return (*MODELS, "CNN") if task == "mnist" else MODELS


def _items(fields: dict[str, Any]) -> tuple:
    return tuple(sorted(fields.items()))


def _of_width(model: str, width: Any, causal: bool, common: dict[str, Any], machine: dict[str, Any]) -> nn.Module:
    if model == "CNN":
        return SmallCNN(CNNConfig(channels=width, output_dim=common["output_dim"]))
    if model in BASELINES:
        baseline: Callable[[BaselineConfig], nn.Module] = BASELINES[model]
        return baseline(BaselineConfig(**common, token_dim=width, causal=causal))
    return NSM(NSMConfig(**(common | machine), token_dim=width[0], state_dim=width[1]))


@cache
def _width(model: str, causal: bool, reference: int, common: tuple, machine: tuple) -> Any:
    """The width of a model that has most nearly the parameters of a Transformer of the width `reference`."""
    if model == "Transformer":
        return reference
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        parameters = count_parameters(_of_width("Transformer", reference, causal, dict(common), {}))
    widths: Iterable[Any] = range(4, 40) if model == "CNN" else range(reference, 2 * reference)
    if model == "NSM":  # states about as wide as tokens; four heads, which rotary positions want of even width
        step = 8 if "positions" not in (*dict(common), *dict(machine)) else 4
        widths = [(D, M) for D in range(reference // 2 // 8 * 8, reference + 24, step) for M in range(D - 8, D + 12, 4)]
    return match_parameters(lambda width: _of_width(model, width, causal, dict(common), dict(machine)), parameters, widths)[0]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy (nats, scalar) over what a batch asks: targets [B] or [B,T]."""
    outputs = model(batch.inputs)
    return F.cross_entropy(outputs.flatten(0, -2), batch.targets.flatten(), ignore_index=IGNORE)


def evaluate(model: nn.Module, batch: Batch) -> Score:
    """Score a model on a held-out part [N,T] or [N,T,input_dim], in pieces of `EVALUATION_BATCH`."""
    pieces = zip(batch.inputs.split(EVALUATION_BATCH), batch.targets.split(EVALUATION_BATCH), strict=True)
    with evaluating(model):
        scores = [score(model(inputs), targets) for inputs, targets in pieces]
    return Score(*(sum(part) for part in zip(*scores, strict=True)))


def best_rates(rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """The rate of each (task, model) that did best on validation: by accuracy, then by cross-entropy."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row["part"] == "validation" and not row["variant"]:
            key = row["task"], row["model"]
            if key not in best or (-row["accuracy"], row["nats"]) < (-best[key]["accuracy"], best[key]["nats"]):
                best[key] = row
    return {key: row["rate"] for key, row in best.items()}


# What a pass costs ----------------------------------------------------------------------------------------------------

VOCABULARY = 64
COST = {"head": "labelling", "vocab_size": VOCABULARY, "output_dim": VOCABULARY, "num_layers": 2}
"""The models whose cost is measured label each token of a text over 64 tokens; the Transformer is 64 wide."""


def cost_width(model: str, causal: bool = True) -> Any:
    """The width at which a model to measure is as large as the Transformer; finding it takes a second."""
    return _width(model, causal, 64, _items(COST), _items({"chunk": 128 if causal else None}))


def cost_model(model: str, causal: bool = True, width: Any = None) -> nn.Module:
    """A model to measure, of `cost_width`. NSM has 16 states, and causally it writes every 128 tokens."""
    width = cost_width(model, causal) if width is None else width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _of_width(model, width, causal, COST, {"chunk": 128 if causal else None})


def training_pass(model: str, T: int, causal: bool = True, width: Any = None) -> Callable[[], None]:
    """A function that goes forward and backward over one sequence of T tokens."""
    network = cost_model(model, causal, width)
    inputs = torch.randint(VOCABULARY, (1, T), generator=torch.Generator().manual_seed(0))

    def once() -> None:
        network.zero_grad()
        cross_entropy(network, Batch(inputs, inputs)).backward()

    return once


def stream_from(model: str, T: int) -> Callable[[], None]:
    """A function that reads one token more, T tokens having been read."""
    network: Any = cost_model(model)
    inputs = torch.randint(VOCABULARY, (1, T), generator=torch.Generator().manual_seed(0))
    with evaluating(network):
        if model == "NSM":
            stream = network.start(1)
            for token in inputs.T:
                stream = network.step(token, stream)[1]
        else:
            stream = network.prefill(inputs)[1]

    @torch.no_grad()
    def once() -> None:
        nonlocal stream
        stream = network.step(inputs[:, 0], stream)[1]

    return once
