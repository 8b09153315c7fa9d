"""Machines that read strings: the Tomita languages, parity, modular counters, permutation groups."""

import math

import torch
from torch import Tensor

from nsm_support.checks import check, check_choice, check_sizes
from nsm_support.crystalline.automata.machines import Machine, Process, Sample
from nsm_support.tasks import WordProblem

CLOSED_SHARE = 1 / 3
"""Share of all positions that states without a way out are to hold (see `Transducer`)."""
LOWEST_WEIGHT = -20.0
"""Least logarithm of the weight of a token that leads where there is no way back."""


class Transducer(Machine):
    """A machine that reads: the target is the output of the state that the token led to, and `states` is that state.

    The strings are drawn so that they visit what there is to see. Where every state can be reached from every other,
    tokens are uniform. Otherwise some tokens lead where there is no way back (one 0 ends 1* for ever), and uniform
    strings would soon be all alike. Such a token weighs r where the others weigh 1, and r ≤ 1 is chosen for the length
    so that the states that cannot be left hold `CLOSED_SHARE` of all positions (r = 1 if no r can bring that about).
    So the distribution of tokens depends on the state and the length, and on nothing else; every token is possible
    everywhere.

    Args:
        start: number of the first state.
        transition: [S, V] int64, the next state. output: [S] int64, class of each state, 0 … C−1.

    Raises ValueError if the table does not fit.
    """

    def __init__(self, name: str, start: int, transition: Tensor, output: Tensor):
        states = len(transition)
        if transition.ndim != 2 or not transition.numel() or transition.min() < 0 or transition.max() >= states:
            raise ValueError(f"{name}: transition {list(transition.shape)} is to hold states 0 to {states - 1}, [S, V]")
        if output.shape != (states,) or output.min() < 0 or not 0 <= start < states:
            raise ValueError(f"{name}: start {start}, output {list(output.shape)}; {states} states are accepted, classes from 0")
        self.name, self.start, self.transition, self.output = name, start, transition.long(), output.long()
        self.num_states, self.vocab_size = transition.shape
        self.output_dim = int(output.max()) + 1
        self._processes: dict[int, Process] = {}

    def token_probabilities(self, length: int) -> Tensor:
        """P(token | state) [S, V] in strings of a length."""
        return self.process(length).probability.view(self.num_states, self.vocab_size)

    def process(self, length):
        check_sizes(self.name, length=length)
        if length not in self._processes:
            self._processes[length] = self._balanced(length)
        return self._processes[length]

    def _weighted(self, leaving: Tensor, weight: float) -> Process:
        states, tokens = self.transition.shape
        weights = torch.where(leaving, weight, 1.0).double()
        return Process(
            start=torch.eye(states)[self.start],
            source=torch.arange(states).repeat_interleave(tokens),
            token=torch.arange(tokens).repeat(states),
            target=self.transition.flatten(),
            probability=(weights / weights.sum(1, keepdim=True)).flatten(),
            readout=torch.eye(self.output_dim)[self.output],
        )

    def _balanced(self, length: int) -> Process:
        from scipy.sparse.csgraph import connected_components

        edges = torch.eye(self.num_states)[self.transition].sum(1).numpy()  # (S, S): tokens that lead from i to j
        component = torch.from_numpy(connected_components(edges, connection="strong")[1]).long()
        leaving = component[self.transition] != component[:, None]  # (S, V): no way back
        left = torch.zeros_like(component).index_add_(0, component, leaving.any(1).long())[component] > 0  # (S,)

        def share(log_weight: float) -> float:
            return self._read(self._weighted(leaving, math.exp(log_weight)), length)[~left].sum().item()

        low, high = LOWEST_WEIGHT, 0.0
        if not left.any() or share(low) >= CLOSED_SHARE:
            return self._weighted(leaving, 1.0)
        for _ in range(30):  # the share grows with the weight, and is below even at 1 where high never moves
            middle = (low + high) / 2
            low, high = (low, middle) if share(middle) > CLOSED_SHARE else (middle, high)
        return self._weighted(leaving, math.exp(high))

    def sample_batch(self, generator, batch_size, length):
        check_sizes(self.name, batch_size=batch_size, length=length)
        tokens, _, states = self.process(length).walk(generator, batch_size, length)
        return Sample(tokens, self.output[states], states)

    def occupancy(self, length):
        return self._read(self.process(length), length)

    @staticmethod
    def _read(process: Process, length: int) -> Tensor:
        """Share of `length` tokens after which each state is reached, [S]; the start has read nothing."""
        return (process.occupancy(length + 1) * (length + 1) - process.start) / length


TOMITA = {
    1: (((1, 0), (1, 1)), (0,)),
    2: (((2, 1), (0, 2), (2, 2)), (0,)),
    3: (((0, 1), (2, 0), (3, 4), (2, 3), (4, 4)), (0, 1, 3)),
    4: (((1, 0), (2, 0), (3, 0), (3, 3)), (0, 1, 2)),
    5: (((1, 2), (0, 3), (3, 0), (2, 1)), (0,)),
    6: (((1, 2), (2, 0), (0, 1)), (0,)),
    7: (((0, 1), (2, 1), (2, 3), (4, 3), (4, 4)), (0, 1, 2, 3)),
}
"""Minimal automata of the seven languages: for each state what follows 0 and 1, and the states that accept; start 0."""


def tomita(number: int) -> Transducer:
    """One of seven languages over 0 and 1 (Tomita 1982); the output is 1 if the string so far belongs to it.

    1: 1*. 2: (10)*. 3: no odd run of 1s has an odd run of 0s anywhere after it. 4: no 000. 5: an even number of 0s and of 1s.
    6: the numbers of 0s and 1s differ by a multiple of 3. 7: 0*1*0*1*. The empty string belongs to all. Raises ValueError for
    another number.
    """
    check_choice("tomita", TOMITA, number=number)
    transition, accepting = TOMITA[number]
    output = torch.zeros(len(transition), dtype=torch.int64)
    output[list(accepting)] = 1
    return Transducer(f"tomita{number}", 0, torch.tensor(transition), output)


def modular_counter(modulus: int) -> Transducer:
    """Strings over 0 and 1 whose number of 1s is a multiple of the modulus; the output is 1 if the string so far is.
    Raises ValueError for a modulus below 2.
    """
    check("modular_counter", modulus >= 2, "2 or more", modulus=modulus)
    state = torch.arange(modulus)
    return Transducer(f"mod{modulus}", 0, torch.stack([state, (state + 1) % modulus], 1), (state == 0).long())


def permutation_group(name: str) -> Transducer:
    """Words of two generators of a group, "parity", "s3", "a5" or "s5"; the output is the number of the product so far.

    The tables are those of `nsm_support.tasks.WordProblem`; parity's element 1 is an odd number of 1s.
    """
    steps = WordProblem(name).steps
    return Transducer(name, 0, steps, torch.arange(len(steps)))
