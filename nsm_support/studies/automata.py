"""What trained recurrent machines have become: proofs, longer strings, the control without codes, codes written from outside.

A study is one machine with all of its seeds, side by side in one batch and in one process, so that studies run beside
each other.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nsm_support.crystalline.automata import UNDEFINED, Automaton, Transducer, make_machine
from nsm_support.crystalline.automata.extraction import Verdict, compare, vote
from nsm_support.crystalline.recurrent.model import CrystallineRecurrent, RecurrentConfig
from nsm_support.crystalline.recurrent.training import History, RecurrentTraining, train

FRESH = 2**40  #: seed of the strings that machines are tested on
CLUSTERED = 500  #: strings whose states are clustered, where there are no codes


class Study(NamedTuple):
    """One machine, all of its seeds: what `study` is to do."""

    machine: str
    seeds: tuple[int, ...]
    training: RecurrentTraining
    num_codes: int
    factor: int = 10  #: how much longer than in training the long test strings are
    strings: int = 200  #: of each test
    device: str = "cpu"


class Findings(NamedTuple):
    """What came of a study. Lists and rows hold one entry a seed; accuracies are shares of right outputs on fresh strings."""

    study: Study
    model: CrystallineRecurrent
    history: History
    verdicts: list[Verdict]
    accuracy: Tensor  # (E,): on strings as long as the longest in training
    accuracy_long: Tensor  # (E,): on strings `factor` times as long
    accuracy_soft: Tensor  # (E,): on these, by the relaxed table, never rounded to one code; without codes the same as before
    seconds: float  # of training


def build(machine: Transducer, num_codes: int, generators: Sequence[Generator]) -> CrystallineRecurrent:
    """Untrained machines with as many tokens and outputs as the true one."""
    config = RecurrentConfig(vocab_size=machine.vocab_size, output_dim=machine.output_dim, num_codes=num_codes)
    return CrystallineRecurrent(config, generators)


def study(run: Study) -> Findings:
    """Train one machine's seeds side by side, prove or refute each, and test them on longer strings."""
    machine = make_machine(run.machine)
    generators = [torch.Generator().manual_seed(seed) for seed in run.seeds]
    model = build(machine, run.num_codes, generators).to(run.device)
    begin = time.perf_counter()
    history = train(model, machine, generators, run.training)
    seconds, codes = time.perf_counter() - begin, run.training.objective != "continuous"
    fresh, accuracies = torch.Generator().manual_seed(FRESH), []
    for length in (run.training.max_length, run.factor * run.training.max_length):
        tokens, targets, _ = (part.to(run.device) for part in machine.sample_batch(fresh, run.strings, length))
        many = tokens.expand(len(model), -1, -1)
        said = model(many).logits.argmax(-1) if codes else say_continuous(model, many)
        accuracies.append((said == targets).double().mean((1, 2)).cpu())
    accuracies.append((say_soft(model, many) == targets).double().mean((1, 2)).cpu() if codes else accuracies[1])
    automata = model.automata() if codes else [clustered(model, machine, e, g) for e, g in enumerate(generators)]
    return Findings(run, model.cpu(), history, [compare(one, machine) for one in automata], *accuracies, seconds)


@torch.no_grad()
def say_soft(model: CrystallineRecurrent, tokens: Tensor) -> Tensor:
    """The likeliest output [E, B, T] of the relaxed machines on tokens [E, B, T]."""
    unheard = F.pad(torch.zeros_like(tokens), (1, 0))  # the marginal beliefs do not depend on outputs
    beliefs = model.relaxed(tokens, unheard, "marginal").beliefs[:, :, 1:]
    read = model.output_logits(model.codebook).softmax(-1)  # (E, K, C)
    return torch.bmm(beliefs.flatten(1, 2), read).argmax(-1).view(tokens.shape)


@torch.no_grad()
def say_continuous(model: CrystallineRecurrent, tokens: Tensor) -> Tensor:
    """The output [E, B, T] of the control without codes on tokens [E, B, T]."""
    return model.output_logits(model.continuous(tokens)[:, :, 1:].flatten(1, 2)).argmax(-1).view(tokens.shape)


@torch.no_grad()
def clustered(
    model: CrystallineRecurrent, machine: Transducer, e: int, generator: Generator, strings: int = CLUSTERED, length: int = 20
) -> Automaton:
    """The automaton of control number e: its states clustered into K by k-means, transitions and outputs by vote.

    As automata have been read out of networks since Giles et al. (1992); the outputs that vote are the network's own. Where
    no string showed a transition, it is the network's own step from the middle of the cluster.
    """
    from sklearn.cluster import KMeans

    tokens = machine.sample_batch(generator, strings, length).tokens
    many = tokens.to(model.codebook.device).expand(len(model), -1, -1)
    states, K, V = model.continuous(many)[e].cpu(), model.config.num_codes, machine.vocab_size
    found = KMeans(K, n_init=1, random_state=0).fit(states[:, 1:].flatten(0, 1).numpy())
    codes = torch.from_numpy(found.labels_).long().view(tokens.shape)
    automaton = vote(codes, tokens, say_continuous(model, many)[e].cpu(), K, V).automaton
    middles = torch.cat([torch.from_numpy(found.cluster_centers_), states[:1, 0]]).repeat_interleave(V, 0)  # ((K+1)·V, D)
    from_middle = model.step_continuous(
        middles.to(many.device).expand(len(model), -1, -1),
        torch.arange(V, device=many.device).repeat(K + 1).expand(len(model), -1),
    )
    own = torch.from_numpy(found.predict(from_middle[e].cpu().numpy())).long().view(K + 1, V)
    return automaton._replace(transition=torch.where(automaton.transition == UNDEFINED, own, automaton.transition))


class Moved(NamedTuple):
    """Share of futures that are, output by output, those of the wanted state [E], by what was written."""

    chosen: Tensor  # the code that stands for the wanted state
    random: Tensor  # a random one of the codes in use
    untouched: Tensor  # nothing


@torch.no_grad()
def move(model: CrystallineRecurrent, machine: Transducer, generator: Generator, strings: int = 200, length: int = 20) -> Moved:
    """Write another state's code into the machines in the middle of a string, and compare what follows.

    A state's code is the one that is commonest in it on one set of strings. On a second set the true machine is put into
    another, random state after `length` tokens, the learned ones into that state's code; then both read `length` random
    tokens. A future is right if all of its outputs are those of the true machine from the wanted state.
    """
    E, K, S = len(model), model.config.num_codes, machine.num_states
    first, second = (machine.sample_batch(generator, strings, length) for _ in range(2))
    codes = model(first.tokens.expand(E, -1, -1)).codes
    counts = torch.stack([torch.bincount((one * S + first.states).flatten(), minlength=K * S) for one in codes]).view(E, K, S)
    visited = counts.sum((0, 1)).nonzero().flatten()  # by the same strings in every machine
    place = torch.randint(len(visited), (strings,), generator=generator)
    there = visited[place] == second.states[:, -1]
    wanted = visited[(place + there) % len(visited)]  # not the state that it is in
    used = (counts.sum(2) > 0).double()  # (E, K)
    starts = {
        "chosen": counts.argmax(1)[:, wanted],
        "random": torch.multinomial(used, strings, replacement=True, generator=generator),
        "untouched": model(second.tokens.expand(E, -1, -1)).codes[..., -1],
    }
    tokens = torch.randint(machine.vocab_size, (strings, length), generator=generator)
    state, truth = wanted, [machine.output[wanted]]
    for token in tokens.T:
        state = machine.transition[state, token]
        truth.append(machine.output[state])
    truth = torch.stack(truth, 1)  # (B, T + 1)
    output, shares = model.tables()[1], {}
    for name, start in starts.items():
        codes = torch.cat([start[..., None], model(tokens.expand(E, -1, -1), start).codes], 2)
        said = output.gather(1, codes.flatten(1)).view(codes.shape)
        shares[name] = (said == truth).all(2).double().mean(1)
    return Moved(**shares)
