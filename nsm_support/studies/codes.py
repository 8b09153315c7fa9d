"""One training of the crystallization pages, measured on the way: `train(run)`, which `nsm_support.workers` can call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsm_support.crystalline.automata import FiniteStateMachine, FSMConfig, HiddenMarkovModel, Machine, make_machine
from nsm_support.crystalline.codes.alignment import contingency, held_out_alignment
from nsm_support.crystalline.codes.losses import commitment_loss, compression_loss
from nsm_support.crystalline.codes.transformer import CrystallineConfig, CrystallineTransformer, Info
from nsm_support.tasks import score
from nsm_support.training import TrainingConfig, evaluating, fit


class Text(NamedTuple):
    """Strings of a machine [B, T]. `states` emitted the tokens (the original notebook's meaning), `after` follow them."""

    tokens: Tensor
    targets: Tensor
    states: Tensor
    after: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """All that decides a training."""

    model: CrystallineConfig
    machine: str | FSMConfig = "fsm"  #: a name of `automata.MACHINES`, or the sizes of a machine like the original's
    seed: int = 0  #: of the start, the batches and the noise
    length: int = 32  #: T
    batch_size: int = 32
    steps: int = 500
    learning_rate: float = 1e-3
    compress: float = 0.01  #: weight of the compression loss, mean over bottlenecks
    commit: float = 0.25  #: weight of the commitment loss, mean over bottlenecks
    records: int = 10  #: measurements on the way, besides that of the untrained network
    held_out: int = 200  #: strings of each of the two held-out splits
    choose_by: Literal["purity", "homogeneity", "completeness", "ami"] = "ami"  #: what the best bottleneck is best in
    measure: Callable[[CrystallineTransformer, list[Info]], Mapping[str, float]] | None = None  #: more of a record
    device: str = "cpu"


def draw(machine: Machine, generator: torch.Generator, batch_size: int, length: int) -> Text:
    """Strings [batch_size, length] with the states before and after each token."""
    tokens, targets, states = machine.sample_batch(generator, batch_size, length + 1)
    after = states[:, 1:] if isinstance(machine, HiddenMarkovModel) else states[:, :-1]  # a transducer's states are those after
    return Text(tokens[:, :-1], targets[:, :-1], states[:, :-1], after)


def held_out(machine: Machine, part: str, size: int, length: int) -> Text:
    """The "validation" or "test" strings of a machine: the same for every run."""
    return draw(machine, torch.Generator().manual_seed({"validation": 10**6 + 2, "test": 10**6 + 3}[part]), size, length)


def total_loss(model: CrystallineTransformer, text: Text, compress: float, commit: float) -> Tensor:
    """Cross-entropy + λ₁ · mean compression + λ₂ · mean commitment over the bottlenecks, as in the original's loop."""
    logits, infos = model(text.tokens)
    every = [one for info in infos for one in info.values()]
    compression = sum(compression_loss(one["soft_codes"]) for one in every) / len(every)
    commitment = sum(commitment_loss(one["input"], one["output"]) for one in every) / len(every)
    return F.cross_entropy(logits.flatten(0, 1), text.targets.flatten()) + compress * compression + commit * commitment


def train(run: Run) -> dict[str, Any]:
    """Train, and measure on held-out strings.

    Returns:
        history: a dict a record, the first of the untrained network. `step`, `train_loss` (NaN at first),
            `temperature` (mean over bottlenecks), `accuracy`, `cross_entropy` (validation strings, no noise), `entropy`
            (noise-free, mean over bottlenecks, over ln K), what `run.measure` says, and others of `training.History`.
        counts: for "states" and "after", for each bottleneck ("block 0, attn", …), N_ks [records, K, S] on the
            validation strings.
        aligned: for "states" and "after" a `HeldOut`: bottleneck (by `choose_by`) and labels chosen on validation, reported
            on test.
        untrained: the same of the network before training.
        accuracy, cross_entropy: of the trained network on the test strings.
        model: its state_dict, on the CPU.
    """
    machine = make_machine(run.machine) if isinstance(run.machine, str) else FiniteStateMachine(run.machine)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = CrystallineTransformer(run.model).to(run.device)
    splits = {part: held_out(machine, part, run.held_out, run.length) for part in ("validation", "test")}
    counts: dict[str, dict[str, list[Tensor]]] = {"states": {}, "after": {}}

    def look(model: CrystallineTransformer, part: str):
        logits, infos = model(splits[part].tokens.to(run.device))
        return score(logits.cpu(), splits[part].targets), infos

    def evaluate(model: CrystallineTransformer) -> dict[str, float]:
        scored, infos = look(model, "validation")
        every = {f"block {i}, {part}": one for i, info in enumerate(infos) for part, one in info.items()}
        for kind, found in counts.items():
            for name, one in every.items():
                codes = one["hard_codes"].cpu()
                table = contingency(codes, getattr(splits["validation"], kind), machine.num_states)
                found.setdefault(name, []).append(table)
        temperature = torch.stack([bottleneck.temperature for _, bottleneck in model.bottlenecks()]).mean()
        entropy = torch.stack([one["entropy"] for one in every.values()]).mean()
        return {
            "accuracy": scored.accuracy,
            "cross_entropy": scored.loss_nats,
            "entropy": entropy.item(),
            "temperature": temperature.item(),
            **(run.measure(model, infos) if run.measure else {}),
        }

    def aligned(model: CrystallineTransformer):
        with evaluating(model):
            (_, chosen), (_, reported) = (look(model, part) for part in ("validation", "test"))
        return {
            kind: held_out_alignment(
                (chosen, getattr(splits["validation"], kind)),
                (reported, getattr(splits["test"], kind)),
                machine.num_states,
                measure=run.choose_by,
                permutations=19,
            )
            for kind in counts
        }

    def sample(generator: torch.Generator, size: int) -> Text:
        return Text(*(tensor.to(run.device) for tensor in draw(machine, generator, size, run.length)))

    untrained = aligned(model)
    history = fit(
        model,
        sample,
        lambda model, text: total_loss(model, text, run.compress, run.commit),
        TrainingConfig(
            steps=run.steps,
            batch_size=run.batch_size,
            learning_rate=run.learning_rate,
            seed=run.seed,
            evaluation_interval=max(1, run.steps // run.records),
        ),
        evaluate=evaluate,
        on_step=lambda step, model, _: model.anneal(step / max(run.steps - 1, 1)),
    )
    with evaluating(model):
        scored, _ = look(model, "test")
    return {
        "history": history.records,
        "aligned": aligned(model),
        "untrained": untrained,
        "counts": {kind: {name: torch.stack(tables) for name, tables in found.items()} for kind, found in counts.items()},
        "accuracy": scored.accuracy,
        "cross_entropy": scored.loss_nats,
        "model": {name: value.cpu() for name, value in model.state_dict().items()},
    }
