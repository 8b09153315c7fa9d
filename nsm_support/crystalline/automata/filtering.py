"""The best that any model can do on a machine, exactly: forward filtering, and the counters that stand beside it.

A belief is what a string tells of the state: P(state | tokens). Forward filtering follows it (the forward pass of Baum and
Petrie 1966): bₜ ∝ bₜ₋₁ T⁽ˣ⁾, with T⁽ˣ⁾ᵢⱼ = P(token x, next state j | state i); the best prediction is bₜ · readout.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nsm_support.checks import check_sizes
from nsm_support.crystalline.automata.machines import UNDEFINED, Automaton, Machine
from nsm_support.crystalline.automata.transducers import Transducer
from nsm_support.tasks import Control

BELIEF_LIMIT = 20_000
"""Most beliefs that are enumerated. A machine with more has its optimum from `predict` on a sample."""
ALIKE = 10
"""Decimals to which two probabilities have to agree to be one and the same."""


def predict(machine: Machine, tokens: Tensor) -> Tensor:
    """The optimal prediction: log P(target | tokens so far), natural, float64 [B, T, C], for tokens [B, T].

    `tasks.score` takes it as it is. What cannot be has −∞. Raises ValueError for a string that the machine cannot make.
    """
    process = machine.process(tokens.shape[1])
    belief, logs = process.start.expand(len(tokens), -1), []
    for t, token in enumerate(tokens.T):
        flow = belief[:, process.source] * process.probability * (process.token == token[:, None])  # (B, E)
        belief = torch.zeros_like(belief).index_add_(1, process.target, flow)
        total = belief.sum(1, keepdim=True)
        if not (total > 0).all():
            row = int((total <= 0).flatten().nonzero()[0])
            why = f"no state that its first {t} tokens leave possible emits the token {int(token[row])}"
            raise ValueError(f"predict: {machine.name} cannot make string {row}: {why}")
        belief = belief / total
        logs.append((belief @ process.readout).log())
    return torch.stack(logs, 1)


class Beliefs(NamedTuple):
    """All K beliefs that strings lead to; 0 is the one before the first token."""

    beliefs: Tensor  # (K, S)
    probability: Tensor  # (K, V): of the next token; 0 throughout where the enumeration stopped
    transition: Tensor  # (K, V): the next belief, UNDEFINED where the token is impossible or the enumeration stopped
    prediction: Tensor  # (K, C): of the target


def beliefs(machine: Machine, length: int | None = None) -> Beliefs:
    """Enumerate the beliefs that strings of up to `length` tokens lead to; None goes on until no new one is found.
    Raises ValueError if there are more than `BELIEF_LIMIT`.
    """
    process = machine.process(1 if length is None else length)
    states, vocabulary = machine.num_states, machine.vocab_size
    numbers = {process.start.round(decimals=ALIKE).numpy().tobytes(): 0}
    found, probability, transition = [process.start], [], []
    frontier, depth = 0, 0
    while frontier < len(found) and depth != length:
        known, depth = len(found), depth + 1
        for block in torch.stack(found[frontier:]).split(256):
            flow = block[:, process.source] * process.probability  # (block, E)
            joint = flow.new_zeros(len(block), vocabulary * states)
            joint.index_add_(1, process.token * states + process.target, flow)
            joint = joint.view(-1, vocabulary, states)
            total = joint.sum(2)  # (block, V)
            following = torch.full(total.shape, UNDEFINED)
            for row, token in (total > 0).nonzero().tolist():
                belief = joint[row, token] / total[row, token]
                key = (belief.round(decimals=ALIKE) + 0.0).numpy().tobytes()  # + 0.0: no negative zero
                if key not in numbers:
                    numbers[key] = len(found)
                    found.append(belief)
                following[row, token] = numbers[key]
            if len(found) > BELIEF_LIMIT:
                found_so_far = f"beliefs: {machine.name} has more than {BELIEF_LIMIT:,} beliefs after {depth} tokens"
                raise ValueError(f"{found_so_far}; a shorter length is accepted, and `predict` scores samples of any")
            probability.append(total)
            transition.append(following)
        frontier = known
    unexplored = len(found) - frontier
    probability.append(torch.zeros(unexplored, vocabulary, dtype=torch.float64))
    transition.append(torch.full((unexplored, vocabulary), UNDEFINED))
    every = torch.stack(found)
    return Beliefs(every, torch.cat(probability), torch.cat(transition), every @ process.readout)


class Optimum(NamedTuple):
    """What the best predictor scores at each position in expectation over all strings, float64 [T]."""

    accuracy: Tensor
    cross_entropy: Tensor  # nats


def optimum(machine: Machine, length: int) -> Optimum:
    """The Bayes optimum at each of `length` positions, exactly: no string is drawn, beliefs are enumerated.

    At position t the target is predicted from the tokens up to t. A model may pass it on a sample by chance alone; beyond
    sampling error it is a leak. Raises ValueError for a length below 1, or a machine with too many beliefs (see `beliefs`).
    """
    check_sizes("optimum", length=length)
    found = beliefs(machine, length)
    best, nats = found.prediction.max(1).values, torch.special.entr(found.prediction).sum(1)
    source, token = (found.transition != UNDEFINED).nonzero(as_tuple=True)
    target, probability = found.transition[source, token], found.probability[source, token]
    mass, accuracy, cross_entropy = torch.eye(len(best), dtype=torch.float64)[0], [], []
    for _ in range(length):
        mass = torch.zeros_like(mass).index_add_(0, target, mass[source] * probability)
        accuracy.append(mass @ best)
        cross_entropy.append(mass @ nats)
    return Optimum(torch.stack(accuracy), torch.stack(cross_entropy))


def controls(machine: Machine, length: int) -> list[Control]:
    """What stands beside a model on strings of a length, each exact over all strings and all positions alike.

    The commonest target; the best that the last token alone can do (a bigram table, in hindsight); the Bayes optimum.
    Raises ValueError as `optimum`.
    """
    best = optimum(machine, length)
    process = machine.process(length)
    flow = process.occupancy(length)[process.source] * process.probability  # (E,)
    joint = torch.zeros(machine.vocab_size, machine.output_dim, dtype=torch.float64)
    joint.index_add_(0, process.token, flow[:, None] * process.readout[process.target])  # P(token, target)
    shares, entropy = joint.sum(0), torch.special.entr
    bigram = (entropy(joint).sum() - entropy(joint.sum(1)).sum()).item()
    return [
        Control("chance: the commonest target", shares.max().item(), entropy(shares).sum().item()),
        Control("counter: the last token", joint.max(1).values.sum().item(), bigram),
        Control("optimum: forward filtering", best.accuracy.mean().item(), best.cross_entropy.mean().item()),
    ]


def predictive_automaton(machine: Machine) -> Automaton:
    """What has to be known of a string to predict as well as can be, as a Moore machine.

    Of a transducer it is the machine itself. Of a generator its states are the beliefs, its outputs number the different
    distributions of the next token, and a token that cannot come leads nowhere (UNDEFINED). `extraction.run` on a sample gives
    the predictive state after each token, which `states`, the state that emitted it, is not. Raises ValueError if the beliefs
    are too many (see `beliefs`).
    """
    if isinstance(machine, Transducer):
        return Automaton(machine.start, machine.transition, machine.output)
    found = beliefs(machine)
    distinct, output = (found.prediction.round(decimals=ALIKE) + 0.0).unique(dim=0, return_inverse=True)
    # Numbered in the order in which they first come up, so that the numbers do not depend on how floats sort.
    first = torch.full((len(distinct),), len(output)).scatter_reduce_(0, output, torch.arange(len(output)), "amin")
    return Automaton(0, found.transition, first.argsort().argsort()[output])
