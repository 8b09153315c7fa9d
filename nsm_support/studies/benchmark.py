"""One model on one task at one learning rate from one seed; and many of these at once, with the rate chosen alike for all.

The models are `NSM` and the baselines, each as wide as brings it within 5 % of the Transformer's parameters. The rate is
chosen on the validation part with the first seed, from the same grid for every model; the test part is scored afterwards
and chooses nothing.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsm_support.mixers.baselines import BASELINES, BaselineConfig, SmallCNN, count_parameters, match_parameters
from nsm_support.nsm.models import NSM, NSMConfig
from nsm_support.tasks import IGNORE, Batch, Score, Task, make_task, score
from nsm_support.training import TrainingConfig, evaluating, fit
from nsm_support.workers import run_all

MODELS = ("NSM", *BASELINES)
FOLDED = ("mnist", "permuted_mnist")
FOLDS = 5
"""Of the digits, seed s tests on fold s: five seeds see every digit once in a test. Other tasks draw parts by the seed."""
EVALUATION_BATCH = 250


@dataclass(frozen=True, slots=True)
class Setting:
    """How the models are trained on one task: the same for all of them but for the fields of `NSMConfig` in `nsm`."""

    task: str
    _: KW_ONLY
    steps: int
    batch_size: int
    width: int = 64  # of the Transformer; all others have as many parameters
    num_layers: int = 2
    positions: str = "none"  # "learned" adds a table of positions to the tokens, in every model
    lengths: tuple[int, ...] = ()  # at which the task is tested, where it has more than one
    held_out: int | None = None  # examples of validation and of test; None: the task's own number
    sizes: dict[str, Any] = field(default_factory=dict, hash=False)  # of the task
    nsm: dict[str, Any] = field(default_factory=dict, hash=False)  # fields of `NSMConfig`


_WORDS = {"batch_size": 32, "width": 32, "lengths": (20, 40, 100, 400), "held_out": 500}
_MACHINE = {"num_layers": 1, "num_states": 2, "chunk": 1, "mix": "read", "positions": "none", "ffn_multiple": 1}
SETTINGS = {
    "mnist": Setting(
        "mnist",
        steps=400,
        batch_size=32,
        width=48,
        positions="learned",
        nsm={"num_states": 8, "window": 16, "chunk": 7, "mix": "sum", "ffn_multiple": 1},
    ),
    "recall": Setting(
        "recall",
        steps=400,
        batch_size=32,
        width=48,
        sizes={"pairs": 4, "keys": 16, "values": 16},
        held_out=500,
        nsm={"num_states": 16, "window": 4, "chunk": 2, "ffn_multiple": 2},
    ),
    "parity": Setting("parity", steps=500, nsm=_MACHINE, **_WORDS),
    "a5": Setting("a5", steps=2000, nsm=_MACHINE, **_WORDS),
    "text": Setting(
        "text",
        steps=250,
        batch_size=16,
        width=64,
        sizes={"length": 128},
        held_out=320,
        nsm={"num_states": 16, "window": 16, "chunk": 16, "ffn_multiple": 2},
    ),
    "s3": Setting("s3", steps=1500, nsm=_MACHINE, **_WORDS),
    "s5": Setting("s5", steps=4000, nsm=_MACHINE, **_WORDS),
    "permuted_mnist": Setting(
        "permuted_mnist",
        steps=600,
        batch_size=16,
        width=48,
        positions="learned",
        nsm={"num_states": 16, "window": 8, "chunk": 56, "ffn_multiple": 2},
    ),
    "listops": Setting(
        "listops",
        steps=1500,
        batch_size=32,
        width=48,
        held_out=1000,
        nsm={"num_states": 16, "window": 8, "chunk": 4, "ffn_multiple": 2},
    ),
    "selective_copying": Setting(
        "selective_copying",
        steps=1000,
        batch_size=32,
        width=48,
        held_out=500,
        nsm={"num_states": 16, "window": 4, "chunk": 4, "ffn_multiple": 2},
    ),
    "verse_section": Setting(
        "verse_section",
        steps=600,
        batch_size=32,
        width=48,
        positions="learned",
        held_out=1500,
        nsm={"num_states": 16, "window": 8, "ffn_multiple": 2},
    ),
}
"""How every task is trained as the book publishes it; `dataclasses.replace` changes a part."""


def models_of(setting: Setting) -> tuple[str, ...]:
    """The models that are compared on a task: all of `MODELS`, and on digits as patches a small CNN."""
    return (*MODELS, "CNN") if setting.task == "mnist" else MODELS


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training: a model on a task, at a rate, from a seed. `variant` names what was changed in the NSM, if anything."""

    setting: Setting
    model: str
    rate: float
    seed: int
    variant: str = ""
    changes: dict[str, Any] = field(default_factory=dict, hash=False)


@cache
def _task(name: str, fold: int, seed: int, sizes: tuple) -> Task:
    return make_task(name, fold=fold, seed=seed, **dict(sizes))


def task_of(setting: Setting, seed: int = 0) -> Task:
    """The task of a setting, with the split that belongs to the seed."""
    fold, seed = (seed % FOLDS, 0) if setting.task in FOLDED else (0, seed)
    return _task(setting.task, fold, seed, tuple(sorted(setting.sizes.items())))


def build(setting: Setting, model: str, changes: dict[str, Any] | None = None, seed: int = 0) -> nn.Module:
    """A fresh model for a task, within 5 % of the parameters of the Transformer of width `setting.width`.

    Args:
        model: one of `MODELS`, or "CNN" for the digits.
        changes: fields of `NSMConfig` in which a variant of the NSM differs.
        seed: of the initial weights; the global random state is left as it was.

    Raises:
        ValueError: for another model, or if no width comes within 5 %.
    """
    if model not in (*MODELS, "CNN"):
        raise ValueError(f"model is one of {', '.join(map(repr, (*MODELS, 'CNN')))}; got {model!r}")
    task = task_of(setting)
    ends = {"head": task.head, "vocab_size": task.vocab_size, "input_dim": task.input_dim}
    ends["output_dim"] = None if task.head == "language_model" else task.output_dim
    table = {"positions": "learned", "max_length": task.max_length} if setting.positions == "learned" else {}
    common = ends | table | {"num_layers": setting.num_layers}
    machine = setting.nsm | (changes or {})
    width = _width(model, task.causal, setting.width, _items(common), _items(machine))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _of_width(model, width, task.causal, common, machine)


def _items(fields: dict[str, Any]) -> tuple:
    return tuple(sorted(fields.items()))


def _of_width(model: str, width: Any, causal: bool, common: dict[str, Any], machine: dict[str, Any]) -> nn.Module:
    if model == "CNN":
        return SmallCNN(width, common["output_dim"])
    if model in BASELINES:
        return BASELINES[model](BaselineConfig(**common, token_dim=width, causal=causal))
    return NSM(NSMConfig(**(common | machine), token_dim=width[0], state_dim=width[1]))


@cache
def _width(model: str, causal: bool, reference: int, common: tuple, machine: tuple) -> Any:
    """The width of a model that has most nearly the parameters of a Transformer of the width `reference`."""
    if model == "Transformer":
        return reference
    with torch.device("meta"):
        parameters = count_parameters(_of_width("Transformer", reference, causal, dict(common), {}))
    if model == "NSM":  # states about as wide as tokens; four heads, which rotary positions want of even width
        step = 8 if "positions" not in (*dict(common), *dict(machine)) else 4
        widths = [(D, M) for D in range(reference // 2 // 8 * 8, reference + 24, step) for M in range(D - 8, D + 12, 4)]
    else:
        widths = range(4, 40) if model == "CNN" else range(reference, 2 * reference)
    return match_parameters(lambda width: _of_width(model, width, causal, dict(common), dict(machine)), parameters, widths)[0]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy (nats, scalar) over what a batch asks: targets [B] or [B,T]."""
    outputs = model(batch.inputs)
    return F.cross_entropy(outputs.flatten(0, -2), batch.targets.flatten(), ignore_index=IGNORE)


def evaluate(model: nn.Module, batch: Batch) -> Score:
    """Score a model on a held-out part [N,T] or [N,T,input_dim], in pieces of `EVALUATION_BATCH`."""
    pieces = zip(batch.inputs.split(EVALUATION_BATCH), batch.targets.split(EVALUATION_BATCH), strict=True)
    with evaluating(model):
        scores = [score(model(inputs), targets) for inputs, targets in pieces]
    return Score(*(sum(part) for part in zip(*scores, strict=True)))


def train(run: Run, device: str = "cpu") -> list[dict[str, Any]]:
    """Train one model and score it: a row for validation, one for the test at each length, and one untrained.

    Each row holds task, model, variant, rate, seed, part ("validation", "test", "untrained"), length (0 where a task has
    one), accuracy, nats (mean cross-entropy), parameters, steps, seconds. A run that diverged scores accuracy 0 and
    infinitely many nats: its rate is not chosen.
    """
    setting, task = run.setting, task_of(run.setting, run.seed)
    model = build(setting, run.model, run.changes, run.seed).to(device)

    def held_out(part: str, length: int | None = None) -> Batch:
        return Batch(*(tensor.to(device) for tensor in task.held_out(part, length, setting.held_out)))

    def sample_batch(generator: torch.Generator, batch_size: int) -> Batch:
        return Batch(*(tensor.to(device) for tensor in task.sample_batch(generator, batch_size)))

    lengths = setting.lengths or (None,)
    config = TrainingConfig(
        steps=setting.steps,
        batch_size=setting.batch_size,
        learning_rate=run.rate,
        seed=run.seed,
        evaluation_interval=setting.steps,
    )
    untrained = held_out("test", lengths[0])
    scores = {("untrained", lengths[0] or 0): evaluate(model, Batch(*(tensor[:EVALUATION_BATCH] for tensor in untrained)))}
    start, diverged = time.perf_counter(), False
    try:
        fit(model, sample_batch, loss_of, config)
    except FloatingPointError:
        diverged = True
    seconds = time.perf_counter() - start
    for part, length in (("validation", None), *(("test", length) for length in lengths)):
        scores[part, length or 0] = Score(0, 1, math.inf) if diverged else evaluate(model, held_out(part, length))
    common = {"task": setting.task, "model": run.model, "variant": run.variant, "rate": run.rate, "seed": run.seed}
    cost = {"parameters": count_parameters(model), "steps": setting.steps, "seconds": seconds}
    return [
        {**common, "part": part, "length": length, "accuracy": found.accuracy, "nats": found.loss_nats, **cost}
        for (part, length), found in scores.items()
    ]


def train_all(runs: Iterable[Run], workers: int = 2, device: str = "cpu") -> list[dict[str, Any]]:
    """The rows of all runs, in the order of the runs, trained in `workers` processes at once, one thread each."""
    return [row for rows in run_all(partial(train, device=device), runs, workers) for row in rows]


def best_rates(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """The rate of each (task, model) that did best on validation: by accuracy, then by cross-entropy."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if row["part"] == "validation" and not row["variant"]:
            key = row["task"], row["model"]
            if key not in best or (-row["accuracy"], row["nats"]) < (-best[key]["accuracy"], best[key]["nats"]):
                best[key] = row
    return {key: row["rate"] for key, row in best.items()}


# What a pass costs ----------------------------------------------------------------------------------------------------

COST = {"head": "labelling", "vocab_size": 64, "output_dim": 64, "num_layers": 2}
"""The models whose cost is measured label each token of a text over 64 tokens; the Transformer is 64 wide."""


def cost_width(model: str, causal: bool = True) -> Any:
    """The width at which a model to measure is as large as the Transformer; finding it takes a second."""
    return _width(model, causal, 64, _items(COST), _items(_cost_machine(causal)))


def _cost_machine(causal: bool) -> dict[str, Any]:
    return {"chunk": 128 if causal else None}


def cost_model(model: str, causal: bool = True, width: Any = None) -> nn.Module:
    """A model to measure, of `cost_width`. NSM has 16 states, and causally it writes every 128 tokens."""
    width = cost_width(model, causal) if width is None else width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _of_width(model, width, causal, COST, _cost_machine(causal))


def training_pass(model: str, T: int, causal: bool = True, width: Any = None) -> Callable[[], None]:
    """A function that goes forward and backward over one sequence of T tokens."""
    network = cost_model(model, causal, width)
    inputs = torch.randint(COST["vocab_size"], (1, T), generator=torch.Generator().manual_seed(0))

    def once() -> None:
        network.zero_grad()
        loss_of(network, Batch(inputs, inputs)).backward()

    return once


def stream_from(model: str, T: int) -> Callable[[], None]:
    """A function that reads one token more, T tokens having been read."""
    network, generator = cost_model(model), torch.Generator().manual_seed(0)
    inputs = torch.randint(COST["vocab_size"], (1, T), generator=generator)
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
