"""Trainings of recurrent machines: proofs, longer strings, the control without codes, states written from outside.

One run holds all seeds of a machine, trained side by side in one batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nsm_support.crystalline.automata import UNDEFINED, Automaton, Transducer, make_machine
from nsm_support.crystalline.automata.extraction import compare, vote
from nsm_support.crystalline.recurrent.model import CrystallineRecurrent, RecurrentConfig
from nsm_support.crystalline.recurrent.training import RecurrentTraining, train
from nsm_support.studies.protocol import Row, Run, Scores

TEST_SEED = 2**40
CLUSTERED = 500  #: strings whose states are clustered, where there are no codes


class SeededMachines(CrystallineRecurrent):
    """Machines that keep the generators which they were drawn from: training and clustering draw on."""

    def __init__(self, config: RecurrentConfig, generators: Sequence[Generator]):
        super().__init__(config, generators)
        self.generators = list(generators)


def build_machines(machine: Transducer, num_codes: int, seeds: Sequence[int]) -> SeededMachines:
    """Untrained machines, one a seed, with as many tokens and outputs as the true one."""
    config = RecurrentConfig(vocab_size=machine.vocab_size, output_dim=machine.output_dim, num_codes=num_codes)
    return SeededMachines(config, [Generator().manual_seed(seed) for seed in seeds])


@dataclass(frozen=True, kw_only=True, slots=True)
class RecurrentRun(Run[SeededMachines]):
    """The training of one machine, all of its seeds at once.

    Rows: one a seed, with the `Verdict` of its automaton (`equivalent`, `num_states`, `counter_example`), and shares of
    right outputs on fresh strings: `accuracy`, on strings as long as the longest in training; `accuracy_long`, on strings
    `factor` times as long; `accuracy_soft`, on these, by the relaxed table, never rounded to one code (without codes the
    same as before). The tensors are those of a `recurrent.training.History`.
    """

    machine: str
    seeds: tuple[int, ...]
    training: RecurrentTraining
    num_codes: int
    seed: int = TEST_SEED  #: of the test strings, the same for all machines
    factor: int = 10  #: how much longer than in training the long test strings are
    strings: int = 200  #: of each test
    device: str = "cpu"

    def labels(self) -> Row:
        return {"machine": self.machine, "objective": self.training.objective}

    def true_machine(self) -> Transducer:
        """The machine that makes the strings. Raises ValueError if it is no transducer."""
        machine = make_machine(self.machine)
        if not isinstance(machine, Transducer):
            raise ValueError(f"RecurrentRun: machine {self.machine!r} asks for no outputs; a transducer is accepted")
        return machine

    def build(self) -> SeededMachines:
        return build_machines(self.true_machine(), self.num_codes, self.seeds).to(self.device)

    def train(self, model: SeededMachines) -> Scores:
        return Scores(tensors=train(model, self.true_machine(), model.generators, self.training)._asdict())

    def score(self, model: SeededMachines, trained: bool) -> Scores:
        if not trained:
            return Scores()
        machine, generator = self.true_machine(), Generator().manual_seed(self.seed)
        has_codes, accuracies = self.training.objective != "continuous", []
        for length in (self.training.max_length, self.factor * self.training.max_length):
            sample = machine.sample_batch(generator, self.strings, length)
            tokens, targets = sample.tokens.to(self.device).expand(len(model), -1, -1), sample.targets.to(self.device)
            outputs = model(tokens).logits.argmax(-1) if has_codes else predict_continuous(model, tokens)
            accuracies.append((outputs == targets).double().mean((1, 2)).tolist())
        if has_codes:
            soft = (predict_relaxed(model, tokens) == targets).double().mean((1, 2)).tolist()
            automata = model.automata()
        else:
            soft = accuracies[1]
            automata = [cluster_automaton(model, machine, e, g) for e, g in enumerate(model.generators)]
        names = ("accuracy", "accuracy_long", "accuracy_soft")
        rows = [
            {"seed": seed, **compare(automaton, machine)._asdict(), **dict(zip(names, shares, strict=True))}
            for seed, automaton, *shares in zip(self.seeds, automata, *accuracies, soft, strict=True)
        ]
        return Scores(rows)


@torch.no_grad()
def predict_relaxed(model: CrystallineRecurrent, tokens: Tensor) -> Tensor:
    """The likeliest output [E, B, T] of the relaxed machines on tokens [E, B, T]."""
    targets = F.pad(torch.zeros_like(tokens), (1, 0))  # any: the marginal beliefs do not depend on outputs
    beliefs = model.relaxed(tokens, targets, "marginal").beliefs
    assert beliefs is not None
    read = model.output_logits(model.codebook).softmax(-1)  # (E, K, C)
    return torch.bmm(beliefs[:, :, 1:].flatten(1, 2), read).argmax(-1).view(tokens.shape)


@torch.no_grad()
def predict_continuous(model: CrystallineRecurrent, tokens: Tensor) -> Tensor:
    """The output [E, B, T] of the control without codes on tokens [E, B, T]."""
    return model.output_logits(model.continuous(tokens)[:, :, 1:].flatten(1, 2)).argmax(-1).view(tokens.shape)


@torch.no_grad()
def cluster_automaton(
    model: CrystallineRecurrent, machine: Transducer, e: int, generator: Generator, strings: int = CLUSTERED, length: int = 20
) -> Automaton:
    """The automaton of control number e: its states clustered into K by k-means, transitions and outputs by vote.

    As automata have been read out of networks since Giles et al. (1992); the outputs that vote are the network's own. Where
    no string showed a transition, it is the network's own step from the middle of the cluster.
    """
    from sklearn.cluster import KMeans

    tokens = machine.sample_batch(generator, strings, length).tokens
    expanded = tokens.to(model.codebook.device).expand(len(model), -1, -1)
    states, K, V = model.continuous(expanded)[e].cpu(), model.config.num_codes, machine.vocab_size
    clusters = KMeans(K, n_init=1, random_state=0).fit(states[:, 1:].flatten(0, 1).numpy())
    codes = torch.from_numpy(clusters.labels_).long().view(tokens.shape)
    automaton = vote(codes, tokens, predict_continuous(model, expanded)[e].cpu(), K, V).automaton
    middles = torch.cat([torch.from_numpy(clusters.cluster_centers_), states[:1, 0]]).repeat_interleave(V, 0)  # ((K+1)·V, D)
    read = torch.arange(V, device=expanded.device).repeat(K + 1).expand(len(model), -1)
    following = model.step_continuous(middles.to(expanded.device).expand(len(model), -1, -1), read)
    own = torch.from_numpy(clusters.predict(following[e].cpu().numpy())).long().view(K + 1, V)
    return automaton._replace(transition=torch.where(automaton.transition == UNDEFINED, own, automaton.transition))


class Futures(NamedTuple):
    """Share of futures that are, output by output, those of the wanted state [E], by what was written."""

    chosen: Tensor  # the code that stands for the wanted state
    random: Tensor  # a random one of the codes in use
    untouched: Tensor  # nothing


@torch.no_grad()
def futures_after_writing(
    model: CrystallineRecurrent, machine: Transducer, generator: Generator, strings: int = 200, length: int = 20
) -> Futures:
    """Write another state's code into the machines in the middle of a string, and compare what follows.

    A state's code is the one that is commonest in it on one set of strings. On a second set the true machine is put into
    another, random state after `length` tokens, the learned ones into that state's code; then both read `length` random
    tokens. A future is right if all of its outputs are those of the true machine from the wanted state.
    """
    E, K, S = len(model), model.config.num_codes, machine.num_states
    first, second = (machine.sample_batch(generator, strings, length) for _ in range(2))
    codes = model(first.tokens.expand(E, -1, -1)).codes
    counts = torch.stack([torch.bincount((own * S + first.states).flatten(), minlength=K * S) for own in codes]).view(E, K, S)
    visited = counts.sum((0, 1)).nonzero().flatten()  # by the same strings in every machine
    drawn = torch.randint(len(visited), (strings,), generator=generator)
    wanted = visited[(drawn + (visited[drawn] == second.states[:, -1])) % len(visited)]  # not the state that it is in
    used = (counts.sum(2) > 0).double()  # (E, K)
    starts = {
        "chosen": counts.argmax(1)[:, wanted],
        "random": torch.multinomial(used, strings, replacement=True, generator=generator),
        "untouched": model(second.tokens.expand(E, -1, -1)).codes[..., -1],
    }
    tokens = torch.randint(machine.vocab_size, (strings, length), generator=generator)
    state, outputs = wanted, [machine.output[wanted]]
    for token in tokens.T:
        state = machine.transition[state, token]
        outputs.append(machine.output[state])
    truth = torch.stack(outputs, 1)  # (B, T + 1)
    table, shares = model.tables()[1], {}
    for name, start in starts.items():
        codes = torch.cat([start[..., None], model(tokens.expand(E, -1, -1), start).codes], 2)
        learned = table.gather(1, codes.flatten(1)).view(codes.shape)
        shares[name] = learned.eq(truth).all(2).double().mean(1)
    return Futures(**shares)
