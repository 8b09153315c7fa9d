"""One training loop for every model of the book: config in, history out, resumable at any step.

`fit` draws batches from a sampler, steps AdamW (Loshchilov and Hutter 2019) under a cosine schedule with warmup, and
keeps what it measured in a `History`. A run that is killed and resumed from its checkpoint ends, bit for bit,
where it would have ended (same machine, same number of threads). Files are written whole or not at all.
"""

import io
import math
import os
import pickle
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from nsm_support.checks import check, check_sizes
from nsm_support.files import write_whole


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: damaged, or of another run. The message says which and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How to train: everything that decides a run besides model and data. Raises ValueError naming a wrong field."""

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3  #: the highest, after the warmup; it ends near 0
    warmup: float = 0.05  #: share of the steps over which the learning rate rises linearly
    weight_decay: float = 0.01  #: of parameters with two or more dimensions, unless their `no_weight_decay` is set
    gradient_clip: float = 1.0  #: largest norm of the whole gradient; `math.inf` switches clipping off
    evaluation_interval: int = 100  #: steps from one record of the history to the next
    seed: int = 0  #: of the batches, and of dropout and noise in the model
    checkpoint: str | os.PathLike[str] | None = None  #: file that the run is kept in and resumed from, if any
    checkpoint_interval: int = 200  #: steps from one checkpoint to the next; the last step always writes one

    def __post_init__(self) -> None:
        check_sizes(self, "steps", "batch_size", "evaluation_interval", "checkpoint_interval")
        for name in ("learning_rate", "gradient_clip"):
            check(self, getattr(self, name) > 0, "above 0", name)
        for name in ("warmup", "weight_decay"):
            check(self, 0 <= getattr(self, name) < 1, "a number from 0 to below 1", name)


@dataclass(slots=True)
class History:
    """What a run measured: a record at step 0 (the untrained model), one every interval, and one at the end.

    Each holds `step` (updates made so far), `train_loss` (mean over the steps since the last record; NaN at step
    0), `learning_rate` (of the last update), `seconds` (of training so far, without evaluation), and what `evaluate`
    returned. `resumed_at` is the step of the checkpoint that the run went on from, 0 for a run in one piece.
    """

    records: list[dict[str, float]] = field(default_factory=list)
    resumed_at: int = 0

    def frame(self):
        """The records as a `pandas.DataFrame`, one row each."""
        import pandas

        return pandas.DataFrame(self.records)


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Learning rate of update `step` (0 … steps − 1): linear warmup, then half a cosine that is 0 at `steps`."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.steps - warmup)))


@contextmanager
def _keep_modes(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Dropout and noise off and no gradient inside; the modes that the model had, afterwards."""
    with _keep_modes(model), torch.no_grad():
        yield model.eval()


def _keep_random_state():
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


def fit(
    model: nn.Module,
    sample_batch: Callable[[Generator, int], Any],
    loss_function: Callable[[nn.Module, Any], Tensor],
    config: TrainingConfig,
    *,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    on_step: Callable[[int, nn.Module, Optimizer], None] | None = None,
) -> History:
    """Train `model` in place and say how it went.

    Inside, the global random state is the run's own (dropout and noise draw from it, seeded by the config); afterwards it is the
    caller's again, as are the model's train or eval modes. Evaluation cannot disturb the run. A progress bar goes to stdout,
    unless the pipeline runs the page (environment variable NSM_BOOK_RUN).

    If `config.checkpoint` exists, the run goes on from there, or is at its end at once: remove the file to train afresh. It knows
    the config, not the code or the data: keep it where a change of those removes it.

    Args:
        model: trained on the device it is on.
        sample_batch: (generator, batch_size) → batch; all its randomness comes from the generator, which is on the CPU.
        loss_function: (model, batch) → scalar loss.
        evaluate: model → named numbers, called under `evaluating` at every record.
        on_step: called before each update with (step, model, optimiser), for schedules of temperature and the like. What it sets
            has to follow from the step or live in the model's buffers, else a resumed run lacks it.

    Raises FloatingPointError if loss or gradient is not finite, naming the step, which is not taken; CheckpointError if the
    checkpoint is damaged or belongs to another config or model; ValueError or RuntimeError if `evaluate` returns no numbers,
    `forward` made a parameter, or none can be trained.
    """
    path = Path(config.checkpoint) if config.checkpoint is not None else None
    progress = tqdm(total=config.steps, file=sys.stdout, leave=False, disable="NSM_BOOK_RUN" in os.environ)
    with _keep_modes(model), _keep_random_state(), progress:
        model.train()
        run = _Run(model, config)
        if path is not None and path.exists():
            run.resume(path)
        else:
            run.record(evaluate)
        progress.update(run.step)
        while run.step < config.steps:
            if on_step is not None:
                on_step(run.step, model, run.optimizer)
            loss = run.update(sample_batch, loss_function)
            last = run.step == config.steps
            if last or run.step % config.evaluation_interval == 0:
                run.record(evaluate)
            if path is not None and (last or run.step % config.checkpoint_interval == 0):
                run.save(path)
            progress.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            progress.update()
    return run.history


class _Run:
    """The state of one run: all that a checkpoint holds."""

    def __init__(self, model: nn.Module, config: TrainingConfig):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError(f"fit: {type(model).__name__} has no parameter that requires a gradient")
        decays = {id(p): p.ndim >= 2 and not getattr(p, "no_weight_decay", False) for p in trained}
        matrices, plain = ([p for p in trained if decays[id(p)] == wide] for wide in (True, False))
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": plain, "weight_decay": 0.0}]
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trained)
        self.optimizer = AdamW(groups, weight_decay=config.weight_decay, fused=fused)
        self.model, self.config, self.history = model, config, History()
        self.identity = {name: value for name, value in asdict(config).items() if not name.startswith("checkpoint")}
        self.generator = torch.Generator().manual_seed(config.seed)
        torch.manual_seed(int(torch.empty((), dtype=torch.int64).random_(generator=self.generator)))
        self.step, self.loss_sum, self.loss_count, self.seconds, self.rate = 0, 0.0, 0, 0.0, 0.0

    def update(self, sample_batch, loss_function) -> float:
        start = time.perf_counter()
        loss = loss_function(self.model, sample_batch(self.generator, self.config.batch_size))
        self.optimizer.zero_grad()
        loss.backward()
        held = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        known = {id(parameter) for parameter in held}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in known:
                advice = "make it in the model's __init__, or give it to the optimiser in on_step"
                raise RuntimeError(f"fit: {name} was made after the optimiser, which would not train it: {advice}")
        value, norm = loss.item(), nn.utils.clip_grad_norm_(held, self.config.gradient_clip).item()
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise FloatingPointError(f"fit: at step {self.step} the loss is {value}, its gradient {norm}: not taken")
        self.rate = learning_rate_at(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.step()
        self.step, self.loss_sum, self.loss_count = self.step + 1, self.loss_sum + value, self.loss_count + 1
        self.seconds += time.perf_counter() - start
        return value

    def record(self, evaluate) -> None:
        loss = self.loss_sum / self.loss_count if self.loss_count else math.nan
        record = {"step": self.step, "train_loss": loss, "learning_rate": self.rate, "seconds": self.seconds}
        self.loss_sum, self.loss_count = 0.0, 0
        if evaluate is not None:
            with _keep_random_state(), evaluating(self.model):
                measured = dict(evaluate(self.model))
            if taken := record.keys() & measured.keys():
                raise ValueError(f"fit: evaluate returned {sorted(taken)}, names of the loop's own; choose others")
            for name, value in measured.items():
                try:
                    record[name] = float(value)
                except (TypeError, ValueError, RuntimeError) as error:
                    kind = type(value).__name__
                    raise ValueError(f"fit: evaluate returned {name!r}, a {kind}; each has to be one number") from error
        self.history.records.append(record)

    def save(self, path: Path) -> None:
        state: dict[str, Any] = {"config": self.identity, "records": self.history.records}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state["random"] = [self.generator.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state_all()]
        state["counters"] = [self.step, self.loss_sum, self.loss_count, self.seconds, self.rate]
        _write_tensors(path, state)

    def resume(self, path: Path) -> None:
        state = _read_tensors(path, "config")
        was, now = state["config"], self.identity
        if changed := [name for name in sorted({*was, *now}) if was.get(name) != now.get(name)]:
            changes = ", ".join(f"{name} = {was.get(name)!r}, not {now.get(name)!r}" for name in changed)
            raise CheckpointError(f"{path} belongs to another run, of {changes}: remove it or name another file")
        _load_state(self.model, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        batches, noise, noise_cuda = state["random"]
        self.generator.set_state(batches)
        torch.set_rng_state(noise)
        torch.cuda.set_rng_state_all(noise_cuda)
        self.step, self.loss_sum, self.loss_count, self.seconds, self.rate = state["counters"]
        self.history = History(state["records"], resumed_at=self.step)


def save_model(path: str | os.PathLike[str], model: nn.Module, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a trained model for other pages, with what `load_model` needs to build it again.

    Raises TypeError if the metadata holds more than numbers, strings, tensors, and lists, tuples and dicts of these.
    """
    _write_tensors(Path(path), {"metadata": dict(metadata or {}), "state": model.state_dict()})


def load_model(path: str | os.PathLike[str], build: Callable[[dict[str, Any]], nn.Module]) -> nn.Module:
    """Read a model that `save_model` wrote, in eval mode, on the device that `build` puts it on.

    `build` takes the metadata and returns the model with fresh weights: `lambda data: SimpleNSM(**data["config"])`. Raises
    CheckpointError if the file is damaged, of another kind, or does not fit the model that was built.
    """
    content = _read_tensors(Path(path), "metadata")
    model = build(content["metadata"])
    _load_state(model, content["state"], Path(path))
    return model.eval()


def _load_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path} belongs to another model than this {type(model).__name__}: {error}") from error


def _write_tensors(path: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        torch.load(io.BytesIO(buffer.getbuffer()), weights_only=True)
    except Exception as error:
        raise TypeError(f"{path}: only tensors, numbers, strings and lists and dicts of them can be kept") from error
    write_whole(path, buffer.getbuffer())


def _read_tensors(path: Path, kind: str) -> dict[str, Any]:
    """The content of a file that `_write_tensors` wrote; its kind is told by the key that it must hold."""
    data = path.read_bytes()
    try:
        if zipfile.ZipFile(io.BytesIO(data)).testzip() is not None:  # torch.load does not look at the checksums
            raise zipfile.BadZipFile("a checksum does not fit")
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its own words advise to read the file without this check
        reason = "it holds more than tensors, numbers and text, so it was not opened"
        raise CheckpointError(f"{path} is damaged or no checkpoint ({reason}): remove it and run again") from None
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint ({error}): remove it and run again") from error
    if kind not in content:
        raise CheckpointError(f"{path} is a file of another kind: it has no {kind!r}")
    return content
