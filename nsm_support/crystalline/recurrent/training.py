"""Training recurrent crystalline machines, many seeds side by side.

Two things make the training work where plain gradients stop half-way. **Self-paced length**: each machine begins with
short strings and gets one token more whenever an update's loss is low enough (a curriculum of growing strings: Zaremba and
Sutskever 2014, arXiv:1410.4615, where the clock sets the pace). **Revival**: a code that is not used is re-initialised, with
noise, from a used code that leaves the outputs undecided, as two states may share it. Neither looks at the true machine's states.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.optim import Adam

from nsm_support.checks import check, check_sizes
from nsm_support.crystalline.automata import Automaton, Transducer
from nsm_support.crystalline.recurrent.model import START, CrystallineRecurrent, Objective
from nsm_support.training import TrainingConfig, learning_rate_at

STREAM = 32  #: batches drawn at once
DEAD = 0.1  #: a code with less than this share of the average use may be revived
REVIVED = 4  #: at most so many at once
NOISE = 0.5  #: length of the noise on a revived code, over the length of the code that it is copied from
SETTLED = 0.8  #: share of the training after which no code is revived
UNDECIDED = 0.01  #: nats; if this and the next output are less undecided on average, no code is revived


@dataclass(frozen=True, kw_only=True, slots=True)
class RecurrentTraining:
    """How machines are trained. Raises ValueError naming what does not fit."""

    steps: int = 800
    batch_size: int = 32
    max_length: int = 20  #: tokens of the longest strings
    min_length: int = 2  #: tokens of the first strings
    pace: float = 0.15  #: share of ln C, the loss of a guess; less loss than that, and a machine's next strings grow by a token
    learning_rate: float = 0.01
    objective: Objective = "likelihood"
    revive_every: int = 5  #: updates from one revival to the next; 0 for none
    record_every: int = 50  #: updates from one record of the history to the next

    def __post_init__(self) -> None:
        check_sizes(self, "steps", "batch_size", "min_length", "record_every")
        check(self, self.max_length >= self.min_length, "at least min_length", "max_length", "min_length")
        check(self, self.pace > 0 and self.learning_rate > 0, "above 0", "pace", "learning_rate")
        check(self, self.revive_every >= 0, "0 or more", "revive_every")


class History(NamedTuple):
    """What E machines were at R records: the first before the training, the last after it."""

    steps: Tensor  # (R,): updates made so far
    nats: Tensor  # (R, E): loss per output in the next batch
    lengths: Tensor  # (R, E): tokens of the machine's strings
    entropy: Tensor  # (R, E): of P(next code | code, token) where strings lead, over ln K; NaN without codes
    revived: Tensor  # (R, E): codes re-initialised so far
    transition: Tensor  # (R, E, K, V): the hard machines
    output: Tensor  # (R, E, K)

    def automaton(self, record: int, machine: int) -> Automaton:
        return Automaton(START, self.transition[record, machine], self.output[record, machine])


def _batches(machine: Transducer, generator: Generator, config: RecurrentTraining) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens [B, T] and outputs [B, T + 1], that of the empty string first, without end."""
    while True:
        drawn = machine.sample_batch(generator, STREAM * config.batch_size, config.max_length)
        outputs = with_empty(machine, drawn.targets)
        yield from zip(drawn.tokens.split(config.batch_size), outputs.split(config.batch_size), strict=True)


def with_empty(machine: Transducer, targets: Tensor) -> Tensor:
    """Targets [..., T] → [..., T + 1], led by the output of the empty string."""
    return torch.cat([machine.output[machine.start].expand(*targets.shape[:-1], 1), targets], -1)


def train(
    model: CrystallineRecurrent, machine: Transducer, generators: Sequence[Generator], config: RecurrentTraining
) -> History:
    """Train each of the E machines on strings of its own, in place.

    Machine e sees its own generator and nothing of the others (gradients are clipped machine by machine), so that alone it
    becomes the same machine, up to the rounding of sums in batches of another size. Raises ValueError if the generators are not
    E, or the model has other tokens or outputs than the machine; FloatingPointError if a loss is not finite.
    """
    given = {"generators": len(generators), "vocab_size": machine.vocab_size, "output_dim": machine.output_dim}
    sizes = {"generators": len(model), "vocab_size": model.config.vocab_size, "output_dim": model.config.output_dim}
    check("train", given == sizes, f"{sizes}", **given)
    device = model.codebook.device
    optimizer = Adam(model.parameters(), betas=(0.9, 0.99))
    schedule = TrainingConfig(steps=config.steps, learning_rate=config.learning_rate)
    streams = [_batches(machine, generator, config) for generator in generators]
    length = torch.full((len(model),), config.min_length, device=device)
    usage = torch.zeros(len(model), model.config.num_codes, device=device)
    enough = config.pace * math.log(machine.output_dim)
    revived, records = torch.zeros(len(model), dtype=torch.int64), []
    for step in range(config.steps + 1):
        longest = int(length.max())
        tokens, targets = (torch.stack(part).to(device) for part in zip(*map(next, streams), strict=True))
        relaxed = model.relaxed(tokens[..., :longest], targets[..., : longest + 1], config.objective)
        within = torch.arange(longest + 1, device=device) <= length[:, None]  # (E, T + 1): each one's own strings
        counted = within.to(relaxed.nats)
        nats = (relaxed.nats.mean(1) * counted).sum(1) / counted.sum(1)  # (E)
        if not nats.isfinite().all():
            raise FloatingPointError(f"train: at update {step} the losses are {nats.tolist()}")
        mass = None if relaxed.beliefs is None else torch.einsum("ebtk,et->ek", relaxed.beliefs.detach(), counted)
        if step % config.record_every == 0 or step == config.steps:
            records.append((step, nats.detach(), length, _entropy(model, mass), revived.clone(), *model.tables()))
        if step == config.steps:
            break
        optimizer.zero_grad()
        nats.sum().backward()
        _clip(model)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, schedule)
        optimizer.step()
        length = (length + (nats < enough)).clamp(max=config.max_length)
        if mass is not None and config.revive_every:
            usage += mass
            if (step + 1) % config.revive_every == 0:
                if step < SETTLED * config.steps:
                    revived += revive(model, usage, generators, optimizer)
                usage.zero_()
    steps, *rest = zip(*records, strict=True)
    return History(torch.tensor(steps), *map(torch.stack, rest))


def _clip(model: CrystallineRecurrent) -> None:
    """Scale each machine's gradient to a norm of at most 1."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.cat([gradient.flatten(1) for gradient in gradients], 1).norm(dim=1)
    for gradient in gradients:
        gradient /= norm.clamp(min=1.0).view(-1, *[1] * (gradient.ndim - 1))


@torch.no_grad()
def _entropy(model: CrystallineRecurrent, mass: Tensor | None) -> Tensor:
    """H/ln K of the softened transitions [E], codes weighted by their use [E, K]."""
    if mass is None:
        return torch.full_like(model.log_scale[:, 0, 0], math.nan)
    row = torch.special.entr(model.transition_logits().softmax(-1)).sum(-1).mean(-1)  # (E, K)
    return (row * mass).sum(1) / mass.sum(1) / math.log(model.config.num_codes)


@torch.no_grad()
def revive(model: CrystallineRecurrent, usage: Tensor, generators: Sequence[Generator], optimizer: Adam) -> Tensor:
    """Re-initialise dead codes near used ones that leave the outputs undecided, with noise; how many, int64 [E].

    A code is drawn with the probability of its use times the entropy of its output and of the next one: in a
    deterministic machine both are 0, so that such a code stands for several states, and a second one can take over some.

    Args:
        usage: [E, K], belief that went to each code of late.
        optimizer: its memory of a dead code becomes that of a code without history.
    """
    share = usage / usage.sum(1, keepdim=True)
    read = model.output_logits(model.codebook).softmax(-1)  # (E, K, C)
    following = torch.bmm(model.transition_logits().softmax(-1).flatten(1, 2), read)  # (E, K·V, C): the next output
    entropy = torch.special.entr(following).sum(-1).view(*share.shape, -1).mean(-1) + torch.special.entr(read).sum(-1)
    score, revived = (share * entropy).cpu(), torch.zeros(len(model), dtype=torch.int64)
    state, codebook = optimizer.state[model.codebook], model.codebook
    for e, generator in enumerate(generators):
        dead = (share[e].cpu() < DEAD / share.shape[1]).nonzero().flatten()
        dead = dead[dead != START][: min(REVIVED, int((score[e] > 0).sum()))]
        if not len(dead) or score[e].sum() < UNDECIDED:
            continue
        source = torch.multinomial(score[e], len(dead), generator=generator)
        noise = torch.randn(len(dead), codebook.shape[2], generator=generator).to(codebook) / codebook.shape[2] ** 0.5
        near = codebook[e, source]
        codebook[e, dead] = near + NOISE * near.norm(dim=-1, keepdim=True) * noise
        if state:
            state["exp_avg"][e, dead] = 0
            state["exp_avg_sq"][e, dead] = state["exp_avg_sq"][e, source]
        revived[e] = len(dead)
    return revived
