"""Trainings of crystalline transformers on strings of a machine, and how their codes align with its states."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nsm_support.crystalline.automata import FiniteStateMachine, FSMConfig, HiddenMarkovModel, Machine, make_machine
from nsm_support.crystalline.codes.alignment import Measure, by_bottleneck, contingency, held_out_alignment
from nsm_support.crystalline.codes.bottleneck import commitment_loss, compression_loss
from nsm_support.crystalline.codes.transformer import CrystallineConfig, CrystallineTransformer, Info
from nsm_support.studies.protocol import FittedRun, Scores
from nsm_support.tasks import Score, score

HELD_OUT_SEEDS = {"validation": 10**6 + 2, "test": 10**6 + 3}
KINDS = ("states", "after")  #: which state of a string codes are compared with


class Strings(NamedTuple):
    """Strings of a machine [B, T]. `states` emitted the tokens, `after` are those that the tokens led to."""

    tokens: Tensor
    targets: Tensor
    states: Tensor
    after: Tensor


def sample_strings(machine: Machine, generator: Generator, batch_size: int, length: int) -> Strings:
    """Strings [batch_size, length] with the states before and after each token."""
    tokens, targets, states = machine.sample_batch(generator, batch_size, length + 1)
    after = states[:, 1:] if isinstance(machine, HiddenMarkovModel) else states[:, :-1]  # a transducer's states are those after
    return Strings(tokens[:, :-1], targets[:, :-1], states[:, :-1], after)


def held_out_strings(machine: Machine, part: str, size: int, length: int) -> Strings:
    """The "validation" or "test" strings of a machine: the same for every run."""
    return sample_strings(machine, Generator().manual_seed(HELD_OUT_SEEDS[part]), size, length)


@cache
def _machine(machine: str | FSMConfig) -> Machine:
    return make_machine(machine) if isinstance(machine, str) else FiniteStateMachine(machine)


_held_out = cache(held_out_strings)


@dataclass(frozen=True, kw_only=True, slots=True)
class CodesRun(FittedRun[CrystallineTransformer, Strings]):
    """One training of a transformer.

    The history holds `temperature` and `entropy` (noise-free, over ln K), means over the bottlenecks, and `accuracy` and
    `cross_entropy` on validation strings. The tensors of the result are, for "states" and "after" and each bottleneck,
    `after, block 0, attn`, … [records, K, S], how often code and state met on the validation strings; and `untrained` and
    `aligned`, by "states" and "after" a `HeldOut`: bottleneck (by `choose_by`) and labels are chosen on validation strings
    and reported on test strings. Rows: `part` ("untrained", "test"), `accuracy`, `cross_entropy` on test strings.
    """

    model: CrystallineConfig
    machine: str | FSMConfig = "fsm"  #: a name of `automata.MACHINES`, or the sizes of a `FiniteStateMachine`
    length: int = 32  #: T
    compress: float = 0.01  #: weight of the compression loss, mean over bottlenecks
    commit: float = 0.25  #: weight of the commitment loss, mean over bottlenecks
    held_out: int = 200  #: strings of each of the two held-out splits
    choose_by: Measure = "ami"  #: what the best bottleneck is best in
    readings: Callable[[CrystallineTransformer, list[Info]], Mapping[str, float]] | None = None  #: more of a record

    def build(self) -> CrystallineTransformer:
        return CrystallineTransformer(self.model).to(self.device)

    def sample_batch(self, generator: Generator, size: int) -> Strings:
        return Strings(*(part.to(self.device) for part in sample_strings(_machine(self.machine), generator, size, self.length)))

    def loss(self, model: CrystallineTransformer, batch: Strings) -> Tensor:
        """Cross-entropy + λ₁ · mean compression + λ₂ · mean commitment over the bottlenecks."""
        logits, infos = model(batch.tokens)
        every = list(by_bottleneck(infos).values())
        zero = torch.zeros((), device=logits.device)
        compression = sum((compression_loss(info["soft_codes"]) for info in every), zero) / len(every)
        commitment = sum((commitment_loss(info["input"], info["output"]) for info in every), zero) / len(every)
        prediction = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        return prediction + self.compress * compression + self.commit * commitment

    def before_step(self, step: int, model: CrystallineTransformer) -> None:
        model.anneal(step / max(self.steps - 1, 1))

    def _read(self, model: CrystallineTransformer, part: str) -> tuple[Strings, Score, list[Info]]:
        strings = _held_out(_machine(self.machine), part, self.held_out, self.length)
        logits, infos = model(strings.tokens.to(self.device))
        return strings, score(logits.cpu(), strings.targets), infos

    def evaluate(self, model: CrystallineTransformer) -> Mapping[str, float | Tensor]:
        strings, scored, infos = self._read(model, "validation")
        every, states = by_bottleneck(infos), _machine(self.machine).num_states
        temperatures = torch.stack([bottleneck.temperature for _, bottleneck in model.bottlenecks()])
        return {
            "accuracy": scored.accuracy,
            "cross_entropy": scored.loss_nats,
            "entropy": torch.stack([info["entropy"] for info in every.values()]).mean().item(),
            "temperature": temperatures.mean().item(),
            **(self.readings(model, infos) if self.readings else {}),
            **{
                f"{kind}, {name}": contingency(info["hard_codes"].cpu(), getattr(strings, kind), states)
                for kind in KINDS
                for name, info in every.items()
            },
        }

    def score(self, model: CrystallineTransformer, trained: bool) -> Scores:
        part, name = ("test", "aligned") if trained else ("untrained", "untrained")
        (validation, _, chosen), (test, scored, reported) = (self._read(model, split) for split in ("validation", "test"))
        states, measure = _machine(self.machine).num_states, self.choose_by
        aligned = {
            kind: held_out_alignment(
                (chosen, getattr(validation, kind)), (reported, getattr(test, kind)), states, measure=measure, permutations=19
            )
            for kind in KINDS
        }
        return Scores([{"part": part, "accuracy": scored.accuracy, "cross_entropy": scored.loss_nats}], {name: aligned})
