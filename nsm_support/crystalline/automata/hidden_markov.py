"""Machines that make strings of their own: two FSMs, whose states own or share their tokens, and TokFSM."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from nsm_support.checks import check, check_sizes
from nsm_support.crystalline.automata.machines import UNDEFINED, Machine, Process, Sample


class HiddenMarkovModel(Machine):
    """A machine whose strings are its own: the target is the next token, the state the one that emitted the token.

    `start`, `source`, `token`, `target` and `probability` are those of its `Process`.
    """

    def __init__(
        self, name: str, start: Tensor, source: Tensor, token: Tensor, target: Tensor, probability: Tensor, vocab_size: int
    ):
        self.name, self.num_states, self.vocab_size, self.output_dim = name, len(start), vocab_size, vocab_size
        self.emission = torch.zeros(len(start), vocab_size, dtype=torch.float64)  #: [S, V], P(token | state)
        self.emission.index_put_((source, token), probability.double(), accumulate=True)
        self._process = Process(start, source, token, target, probability, self.emission)
        self.start = self._process.start  #: [S], distribution of the first state

    def process(self, length):
        return self._process

    def sample_batch(self, generator, batch_size, length):
        check_sizes(self.name, batch_size=batch_size, length=length)
        tokens, states, _ = self._process.walk(generator, batch_size, length + 1)
        return Sample(tokens[:, :-1], tokens[:, 1:], states[:, :-1])

    def occupancy(self, length):
        return self._process.occupancy(length)


@dataclass(frozen=True, kw_only=True, slots=True)
class FSMConfig:
    """Sizes of a machine whose states emit tokens uniformly. Raises ValueError for sizes that do not fit."""

    num_states: int = 10
    tokens_per_state: int = 3
    vocab_size: int = 30
    seed: int = 42  #: of the table that decides the next state, and of which tokens a state has

    def __post_init__(self) -> None:
        check_sizes(self, "num_states", "tokens_per_state", "vocab_size")
        check(self, self.vocab_size >= self.tokens_per_state, "tokens_per_state or more", "vocab_size", "tokens_per_state")


class TableMachine(HiddenMarkovModel):
    """A generator whose next state is a table of state and token; tokens of a state are equally likely.

    `start` [S] is the distribution of the first state, `transition` [S, V] int64 the table; UNDEFINED is for no such token.
    """

    def __init__(self, name: str, config: FSMConfig, start: Tensor, transition: Tensor):
        self.config, self.transition = config, transition
        source, token = (transition != UNDEFINED).nonzero(as_tuple=True)
        probability = torch.full(source.shape, 1 / config.tokens_per_state, dtype=torch.float64)
        target = transition[source, token]
        super().__init__(name, start, source, token, target, probability, config.vocab_size)

    @property
    def transition_matrix(self) -> NDArray[np.float64]:
        """P(next state | state) [S, S]: the table averaged over the tokens of the state."""
        return self._process.matrix().numpy()

    def generate_batch(self, batch_size: int, length: int, generator: Generator | None = None) -> Sample:
        """Inputs, targets, states, [batch_size, length] each. Without a generator, torch's global one is drawn from."""
        return self.sample_batch(generator, batch_size, length)


class FiniteStateMachine(TableMachine):
    """State i owns the tokens i·m … i·m+m−1, so that a token tells the state that emitted it.

    The start is uniform; the table is drawn, row by row, from Python's `random.Random(config.seed)`. As no token is shared, a
    bigram table already predicts as well as can be: accuracy 1/m, cross-entropy ln m. Raises ValueError if the vocabulary is
    too small for tokens that are not shared.
    """

    def __init__(self, config: FSMConfig):
        states, owned = config.num_states, config.tokens_per_state
        accepted = f"{states * owned} or more, {owned} tokens for each of {states} states (AmbiguousFSM shares tokens)"
        check(self, config.vocab_size >= states * owned, accepted, vocab_size=config.vocab_size)
        table = random.Random(config.seed)
        transition = torch.full((states, config.vocab_size), UNDEFINED)
        for state in range(states):
            for token in range(state * owned, (state + 1) * owned):
                transition[state, token] = table.randint(0, states - 1)
        super().__init__("fsm", config, torch.full((states,), 1 / states, dtype=torch.float64), transition)


class AmbiguousFSM(TableMachine):
    """A machine whose states share tokens, so that a token alone does not tell the state: it must be tracked.

    Each state has m tokens, no two states the same set, so that no two predict alike. The j-th token of every state leads by
    the j-th of m permutations of the states, of which the first is one cycle: all states are visited, in the long run equally
    often. The start is state 0, so that the tokens decide the state, and the optimum is accuracy 1/m and cross-entropy ln m, as
    with `FiniteStateMachine`; but no table of the last few tokens reaches it. Raises ValueError if there are too few sets of
    tokens, or so many tokens that none has to be shared.
    """

    def __init__(self, config: FSMConfig):
        states, owned, vocabulary = config.num_states, config.tokens_per_state, config.vocab_size
        accepted = f"below {states * owned}, so that tokens are shared, with a set of {owned} for each of {states} states"
        check(self, vocabulary < states * owned and math.comb(vocabulary, owned) >= states, accepted, vocab_size=vocabulary)
        table = random.Random(config.seed)
        sets: dict[frozenset[int], list[int]] = {}
        while len(sets) < states:
            tokens = table.sample(range(vocabulary), owned)
            sets.setdefault(frozenset(tokens), tokens)
        cycle = table.sample(range(states), states)
        following = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
        permutations: list[Any] = [following, *(table.sample(range(states), states) for _ in range(owned - 1))]
        transition = torch.full((states, vocabulary), UNDEFINED)
        for state, tokens in enumerate(sets.values()):
            for token, permutation in zip(tokens, permutations, strict=True):
                transition[state, token] = permutation[state]
        super().__init__("ambiguous", config, torch.eye(states)[0], transition)


class FirstTransition(NamedTuple):
    """How well a model knows the edges of TokFSM after reading one node."""

    accuracy: float  #: share of the true edges among as many of the likeliest next nodes, mean over nodes
    mass: float  #: probability of a next node that is a true neighbour, mean over nodes
    probabilities: Tensor  # (N, N): P(next node | node), float64; rows may sum to less than 1, as a model may predict no node


class TokFSM(HiddenMarkovModel):
    """A random walk on a graph whose nodes are spelt in shared digits (Tamkin, Taufeeque and Goodman 2023,
    arXiv:2310.17230, section 3; tables are made as in the authors' code).

    Strings begin with the token `base`; then come nodes, each of them `digits` digits, the highest first: 100 nodes of two
    digits share 10 digits, and the vocabulary is 11. The first node is uniform, the next one of `num_edges` neighbours.

    The hidden state is a node and one of its digits: node · digits + place, and num_nodes · digits for the beginning.
    `nodes(states)` gives the node; where `completes(states)`, a node has just been spelt, so that the tokens tell it, and the
    target begins a transition. Elsewhere the node is not known yet, and no code can tell it. Raises ValueError for sizes below
    1, a base below 2, or more edges than nodes.
    """

    def __init__(self, *, num_nodes: int = 100, num_edges: int = 10, base: int = 10, seed: int = 42):
        check_sizes("TokFSM", num_nodes=num_nodes, num_edges=num_edges)
        check("TokFSM", base >= 2, "2 or more", base=base)
        check("TokFSM", num_edges <= num_nodes, f"at most {num_nodes}, the nodes", num_edges=num_edges)
        self.num_nodes, self.num_edges, self.base = num_nodes, num_edges, base
        self.digits = 1
        while base**self.digits < num_nodes:
            self.digits += 1
        table = np.random.default_rng(seed)
        chosen = [table.choice(num_nodes, size=num_edges, replace=False) for _ in range(num_nodes)]
        self.edges = torch.zeros(num_nodes, num_nodes, dtype=torch.bool)  #: [N, N], whether j may follow i
        self.edges.scatter_(1, torch.from_numpy(np.stack(chosen)), True)
        powers = base ** torch.arange(self.digits).flip(0)
        self.spelling = torch.arange(num_nodes)[:, None] // powers % base  #: [N, digits]
        first = torch.arange(num_nodes) * self.digits  # the hidden state of a node's first digit
        before, after = self.edges.nonzero(as_tuple=True)
        within = torch.arange(num_nodes * self.digits).view(num_nodes, self.digits)[:, :-1].flatten()
        start = torch.eye(num_nodes * self.digits + 1)[-1]
        shares = torch.tensor([1 / num_nodes, 1, 1 / num_edges], dtype=torch.float64)
        super().__init__(
            "tokfsm",
            start,
            source=torch.cat([torch.full_like(first, len(start) - 1), within, first[before] + self.digits - 1]),
            token=torch.cat([torch.full_like(first, base), self.spelling[:, :-1].flatten(), self.spelling[before, -1]]),
            target=torch.cat([first, within + 1, first[after]]),
            probability=shares.repeat_interleave(torch.tensor([num_nodes, len(within), len(before)])),
            vocab_size=base + 1,
        )

    @property
    def transition_matrix(self) -> NDArray[np.float64]:
        """P(next node | node) [N, N]."""
        return (self.edges.double() / self.num_edges).numpy()

    def nodes(self, states: Tensor) -> Tensor:
        """The node that a hidden state [...] belongs to; `num_nodes` for the beginning."""
        return states // self.digits

    def completes(self, states: Tensor) -> Tensor:
        """Whether a hidden state [...] emits the last digit of a node: bool [...]."""
        return (states % self.digits == self.digits - 1) & (states < self.num_nodes * self.digits)

    def first_transition(self, log_probabilities: Callable[[Tensor], Tensor]) -> FirstTransition:
        """Ask a model for the node that follows each node, as the authors' tutorial does.

        Args:
            log_probabilities: of the next token, [M, T, V], for tokens [M, T]. It is called once, with the beginning, a
                node, and all but the last digit of another: N · base^(digits − 1) strings of 2 · digits tokens.
        """
        nodes, digits = self.num_nodes, self.digits
        shown = self.base ** (digits - 1)
        ahead = torch.arange(shown)[:, None] // self.base ** torch.arange(digits - 1).flip(0) % self.base
        read, begin = self.spelling.repeat_interleave(shown, 0), torch.full((nodes * shown, 1), self.base)
        prompts = torch.cat([begin, read, ahead.repeat(nodes, 1)], 1)
        logs = log_probabilities(prompts)[:, digits:].double().view(nodes, shown, digits, -1)  # of each digit ahead
        read = logs[:, :, :-1].gather(3, ahead.expand(nodes, -1, -1)[..., None]).sum((2, 3))  # (N, shown)
        joint = (read[..., None] + logs[:, :, -1, : self.base]).flatten(1)[:, :nodes].exp()  # (N, N)
        likeliest = joint.topk(self.num_edges, dim=1).indices
        accuracy = self.edges.gather(1, likeliest).double().mean().item()
        return FirstTransition(accuracy, (joint * self.edges).sum(1).mean().item(), joint)
