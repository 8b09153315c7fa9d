"""Which states a machine visits and which of them predict alike."""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from nsm_support.crystalline.automata.machines import Machine
from nsm_support.crystalline.automata.transducers import Transducer

RARE = 0.1
"""Below this share of the even share 1/S a state is practically unvisited."""


class Survey(NamedTuple):
    """The states of a machine, each tensor [S]."""

    occupancy: Tensor  # share of each state among the labels of samples of the length, exact
    unreachable: Tensor  # bool: no string visits the state
    rare: Tensor  # bool: visited, but at less than `RARE`/S of the positions
    classes: Tensor  # number of the class of states that predict alike

    @property
    def majority_share(self) -> float:
        """Share of the commonest state: the purity that knowing nothing gives."""
        return self.occupancy.max().item()


def refine(labels: list[int], edges: Iterable[tuple[int, int, int, float]]) -> list[int]:
    """The coarsest partition of states, finer than the labels, in which alike states go on alike (Moore 1956).

    States stay together if each token leads them into each class with the same probability (for a table: into the same
    class). Where a state and a token decide the next state, those are exactly the states with the same future;
    otherwise they surely have the same future (Larsen and Skou 1991).

    Args:
        labels: of S states.
        edges: source, token, target and probability of each; a missing token differs from any other.

    Returns:
        The number of the class of each state, in the order of its first state.
    """
    edges, count = list(edges), 0
    while True:
        onward: list[dict[tuple[int, int], float]] = [defaultdict(float) for _ in labels]
        for source, token, target, probability in edges:
            onward[source][token, labels[target]] += probability
        numbers: dict = {}
        labels = [
            numbers.setdefault((label, frozenset((key, round(mass, 9)) for key, mass in ahead.items())), len(numbers))
            for label, ahead in zip(labels, onward, strict=True)
        ]
        if len(numbers) == count:
            return labels
        count = len(numbers)


def classes_alike(machine: Machine) -> Tensor:
    """The class of each state [S]: states of one class predict alike, whatever comes."""
    if isinstance(machine, Transducer):  # the table alone counts, not how often tokens are drawn
        return torch.tensor(refine(machine.output.tolist(), table_edges(machine.transition)))
    process = machine.process(1)
    parts = (process.source, process.token, process.target, process.probability)
    return torch.tensor(refine([0] * machine.num_states, zip(*(part.tolist() for part in parts), strict=True)))


def table_edges(transition: Tensor) -> list[tuple[int, int, int, float]]:
    """The edges of a table [S, V]; a negative entry is none."""
    states, tokens = (transition >= 0).nonzero(as_tuple=True)
    return [(*edge, 1.0) for edge in zip(states.tolist(), tokens.tolist(), transition[states, tokens].tolist(), strict=True)]


def survey(machine: Machine, length: int) -> Survey:
    """Which states strings of a length visit, how often, and which of them predict alike. Raises ValueError for a length below
    1.
    """
    process = machine.process(length)
    adjacent, visited = process.matrix() > 0, process.start > 0
    for _ in range(machine.num_states):
        visited = visited | adjacent[visited].any(0)
    if isinstance(machine, Transducer):
        visited = adjacent[visited].any(0)  # a label stands after a token: the start counts if a string leads back to it
    occupancy = machine.occupancy(length)
    rare = visited & (occupancy < RARE / machine.num_states)
    return Survey(occupancy, ~visited, rare, classes_alike(machine))
