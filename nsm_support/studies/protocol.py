"""One training, measured: what every study is, and the one way to carry it out.

A study is a frozen dataclass, a `Run`: its fields hold all that decides one training, its methods say how the model is
built, trained and scored. `measure` carries out one run, `measure_all` many at once, each in a process of its own.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Generator, Tensor, nn

from nsm_support.training import TrainingConfig, evaluating, fit
from nsm_support.workers import run_all

Network = TypeVar("Network", bound=nn.Module)
Batch = TypeVar("Batch")
Row = dict[str, Any]


class Scores(NamedTuple):
    """What was measured: rows of a table; by its name what fits no row, such as tensors; records of a training."""

    rows: Sequence[Row] = ()
    tensors: Mapping[Any, Any] = MappingProxyType({})
    history: Sequence[Row] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What `measure` returns, the same for every study. All tensors are on the CPU, unless the study says otherwise."""

    run: "Run[Any]"
    rows: list[Row]  #: scores before, in and after the training; each begins with the run's labels, ends with `seconds`
    history: list[Row]  #: records of the training, the first of the untrained model
    state: dict[str, Tensor]  #: state_dict of the trained model; empty if the study does not keep it
    tensors: dict[str, Any]  #: what fits no row, by its name
    seconds: float  #: of training

    def model(self) -> nn.Module:
        """The trained model, on the CPU, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            model = self.run.build()
        model.load_state_dict(self.state)
        return model.cpu().eval()


@dataclass(frozen=True, kw_only=True, slots=True)
class Run(Generic[Network]):
    """All that decides one training. Each study adds its fields and says what its methods do."""

    keeps_state: ClassVar[bool] = True  #: whether the trained model's parameters are part of the result

    seed: int = 0  #: of the first parameters, the batches and the noise

    def labels(self) -> Row:
        """What tells the rows of this run from those of others."""
        return {"seed": self.seed}

    def build(self) -> Network:
        """The untrained model, on its device. `measure` has seeded the global random state."""
        raise NotImplementedError

    def train(self, model: Network) -> Scores:
        """Train the model in place, if at all; what is measured on the way."""
        return Scores()

    def score(self, model: Network, trained: bool) -> Scores:
        """Score the model before and after its training; it is in eval mode, without gradients."""
        raise NotImplementedError

    def score_diverged(self, model: Network, error: FloatingPointError) -> Scores:
        """The scores of a training whose loss was not finite; by default it is an error."""
        raise error


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedRun(Run[Network], Generic[Network, Batch]):
    """A run whose training is `training.fit`."""

    steps: int = 500  #: updates
    batch_size: int = 32
    learning_rate: float = 1e-3  #: the highest one
    weight_decay: float = 0.01
    records: int = 10  #: measurements on the way, besides that of the untrained model
    device: str = "cpu"

    def sample_batch(self, generator: Generator, size: int) -> Batch:
        """A batch of training data on the device; all its randomness comes from the generator."""
        raise NotImplementedError

    def loss(self, model: Network, batch: Batch) -> Tensor:
        """What is minimised, a scalar."""
        raise NotImplementedError

    def evaluate(self, model: Network) -> Mapping[str, float | Tensor]:
        """What a record of the history holds beside the loss; tensors [...] are returned as [records, ...] by their name."""
        return {}

    def before_step(self, step: int, model: Network) -> None:
        """Called before each update, for schedules."""

    def train(self, model: Network) -> Scores:
        tensors: dict[str, list[Tensor]] = {}

        def record(_: nn.Module) -> dict[str, float]:
            found = self.evaluate(model)
            for name, value in found.items():
                if isinstance(value, Tensor):
                    tensors.setdefault(name, []).append(value)
            return {name: value for name, value in found.items() if not isinstance(value, Tensor)}

        shared = {name: getattr(self, name) for name in ("steps", "batch_size", "learning_rate", "weight_decay", "seed")}
        config = TrainingConfig(**shared, evaluation_interval=max(1, self.steps // self.records))
        loss, on_step = lambda _, batch: self.loss(model, batch), lambda step, *_: self.before_step(step, model)
        history = fit(model, self.sample_batch, loss, config, evaluate=record, on_step=on_step)
        stacked = {name: torch.stack(values) for name, values in tensors.items()}
        return Scores(tensors=stacked, history=history.records)


def measure(run: Run[Any]) -> Result:
    """Build a run's model from its seed, score it, train it, and score it again.

    The global random state is left as it was. Raises FloatingPointError if the loss is not finite, unless the study scores such
    runs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model, diverged = run.build(), None
        with evaluating(model):
            untrained = run.score(model, trained=False)
        start = time.perf_counter()
        try:
            training = run.train(model)
        except FloatingPointError as error:
            training, diverged = Scores(), error
        seconds = time.perf_counter() - start
        with evaluating(model):
            trained = run.score_diverged(model, diverged) if diverged else run.score(model, trained=True)
    return Result(
        run=run,
        rows=[{**run.labels(), **row, "seconds": seconds} for row in (*untrained.rows, *training.rows, *trained.rows)],
        history=list(training.history),
        state={name: value.cpu() for name, value in model.state_dict().items()} if run.keeps_state else {},
        tensors={**untrained.tensors, **training.tensors, **trained.tensors},
        seconds=seconds,
    )


def measure_all(runs: Iterable[Run[Any]], workers: int = 2) -> list[Result]:
    """The results of all runs, in their order, from `workers` processes at once with one thread each."""
    return run_all(measure, runs, workers)


def rows_of(results: Iterable[Result]) -> list[Row]:
    """The rows of all results, one after the other."""
    return [row for result in results for row in result.rows]
