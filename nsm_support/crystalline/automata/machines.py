"""What every machine is: a hidden Markov process that draws strings, and what is asked at each of their tokens.

Letters: S states, V tokens, C classes of a target, E edges of a process, B strings, T tokens of a string.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from nsm_support.checks import check_sizes

UNDEFINED = -1  #: the next state where an automaton has none
UNASKED = -1  #: the output of an automaton's start, if nothing is asked before the first token


class Sample(NamedTuple):
    """Strings of a machine, int64 [B, T] each: the tokens, what is to be predicted after each, the true states."""

    tokens: Tensor
    targets: Tensor
    states: Tensor


class Automaton(NamedTuple):
    """A Moore machine (Moore 1956): the state after a string decides its output. A `Transducer` may stand for one."""

    start: int
    transition: Tensor  # (S, V) int64: the next state, UNDEFINED where there is none
    output: Tensor  # (S,) int64: class of the state; UNASKED is for a start that no string leads back to


def _cumulative(probability: Tensor) -> Tensor:
    """Cumulative distributions [..., N], exactly 1 from the last possible outcome on, whatever rounding did."""
    possible = probability > 0
    after = possible.flip(-1).cumsum(-1).flip(-1) - possible.long() == 0  # nothing possible comes later
    return probability.cumsum(-1).masked_fill(after, 1.0)


class Process:
    """A hidden Markov process by its edges: from a state, by a token, to a state, with a probability.

    One form for every machine. A state may have several edges of one token (TokFSM, where the next state is drawn) or
    one (all others). In matrices, T⁽ˣ⁾ᵢⱼ = P(token x, next state j | state i), the labelled transition matrices of a
    hidden Markov process.

    Args:
        start: [S] distribution of the state that emits the first token.
        source, token, target: [E] int64.
        probability: [E], P(token, target | source); those of one source sum to 1.
        readout: [S, C], distribution of what is asked after a token, given the state that the token led to.

    Raises ValueError if the start, the edges of a state or a row of the readout are no distribution.
    """

    def __init__(self, start: Tensor, source: Tensor, token: Tensor, target: Tensor, probability: Tensor, readout: Tensor):
        self.start, self.probability, self.readout = start.double(), probability.double(), readout.double()
        self.num_states = len(start)
        total = torch.zeros_like(self.start).index_add_(0, source, self.probability)
        for name, mass in (("the start", self.start.sum()), ("a state's edges", total), ("a readout", self.readout.sum(1))):
            if not torch.allclose(mass, torch.ones_like(mass), rtol=0, atol=1e-9):
                worst = mass.flatten()[(mass - 1).abs().argmax()]
                raise ValueError(f"Process: {name} sums to {worst.item():.6g}; probabilities of sum 1 are accepted")
        if min(self.start.min(), self.probability.min(), self.readout.min()) < 0:
            raise ValueError("Process: a probability is below 0; 0 to 1 is accepted")
        order = source.argsort(stable=True)
        self.source, self.token, self.target = source[order], token[order], target[order]
        self.probability = self.probability[order]
        # Edges of each state side by side, (S, most edges of a state), to draw one at once for a whole batch.
        number = source.bincount(minlength=self.num_states)
        place = torch.arange(len(source)) - (number.cumsum(0) - number)[self.source]
        self._edges = torch.zeros(self.num_states, int(number.max()), dtype=torch.int64)
        self._edges[self.source, place] = torch.arange(len(source))
        self._cumulative = torch.zeros(self._edges.shape, dtype=torch.float64)
        self._cumulative[self.source, place] = self.probability
        self._cumulative, self._start = _cumulative(self._cumulative), _cumulative(self.start)

    def matrix(self) -> Tensor:
        """P(next state | state) [S, S], whatever the token."""
        square = self.probability.new_zeros(self.num_states, self.num_states)
        return square.index_put_((self.source, self.target), self.probability, accumulate=True)

    def occupancy(self, length: int) -> Tensor:
        """Share of `length` tokens that each state emits, [S]: the mean of P(state) over the positions, exactly."""
        matrix, state, total = self.matrix(), self.start, torch.zeros_like(self.start)
        for _ in range(length):
            total, state = total + state, state @ matrix
        return total / length

    def walk(self, generator: Generator | None, batch_size: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw strings: tokens, the states that emitted them, the states that they led to, int64 [B, T] each.

        All randomness comes from the generator; None is torch's global one.
        """
        check_sizes("walk", batch_size=batch_size, length=length)
        drawn = torch.rand(length + 1, batch_size, 1, dtype=torch.float64, generator=generator)
        state, chosen = (self._start <= drawn[0]).sum(1), []
        for level in drawn[1:]:
            chosen.append(self._edges[state, (self._cumulative[state] <= level).sum(1)])
            state = self.target[chosen[-1]]
        edges = torch.stack(chosen, 1)  # (B, T)
        return self.token[edges], self.source[edges], self.target[edges]


class Machine:
    """A machine that makes strings. All tensors are on the CPU."""

    name: str
    num_states: int
    vocab_size: int
    output_dim: int

    def process(self, length: int) -> Process:
        """The hidden Markov process that strings of a length are drawn from."""
        raise NotImplementedError

    def sample_batch(self, generator: Generator | None, batch_size: int, length: int) -> Sample:
        """Strings [batch_size, length] with targets and states; all randomness comes from the generator. Raises ValueError if a
        size is below 1.
        """
        raise NotImplementedError

    def occupancy(self, length: int) -> Tensor:
        """Share of each state among the `states` of samples of a length, [S], exactly."""
        raise NotImplementedError
