"""From codes to automata: the machine that codes make, its minimum, and whether it is the machine that made the data.

A recurrent machine with K codes is a table already: `Automaton(start, transition [K, V], output [K])`. A transformer's
codes give one by vote over runs (`vote`). `minimise` brings an automaton to its one smallest form, `compare` decides
whether two do the same on every string, or finds a shortest string on which they part.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nsm_support.checks import Shape, check
from nsm_support.crystalline.automata import UNASKED, UNDEFINED, Automaton, Transducer, refine, table_edges


class Verdict(NamedTuple):
    """Whether an automaton does what the true machine does, on every string."""

    equivalent: bool
    num_states: int  # of the smallest form of the automaton
    counter_example: list[int] | None  # a shortest string after which the two differ, of those the first; None if none


class Vote(NamedTuple):
    """What codes on runs say of an automaton with K + 1 states; K is the one before the first token."""

    automaton: Automaton
    agreement: float  # share of the observed steps that go where the automaton goes
    output_agreement: float  # share of the observed outputs that are the automaton's
    untouched: Tensor  # (K + 1, V) bool: cells of observed states that no run touched; the automaton is undefined there


class Intervention(NamedTuple):
    """What an edit of the codes did to each prediction, float64 [N]."""

    moved: Tensor  # total variation distance from the prediction without the edit, 0 … 1
    gained: Tensor  # change of the probability of what was wanted, −1 … 1


def _check(automaton: Automaton | Transducer, name: str = "automaton") -> Automaton:
    """The automaton as such, or a ValueError that says what does not fit."""
    if not isinstance(automaton, Automaton | Transducer):
        kind = type(automaton).__name__
        raise ValueError(f"{name} is a {kind}; accepted is an Automaton, a Transducer or a `predictive_automaton`")
    start, transition, output = int(automaton.start), automaton.transition, automaton.output
    states = len(transition)
    whole = not (transition.is_floating_point() or output.is_floating_point())
    fits = whole and transition.ndim == 2 and output.shape == (states,)
    check(name, fits, "integer [S, V] and [S]", transition=Shape(transition.shape), output=Shape(output.shape))
    low, high = (transition.min().item(), transition.max().item()) if transition.numel() else (0, 0)
    fits = 0 <= start < states and UNDEFINED <= low <= high < states
    check(name, fits, f"0 to {states - 1}, and UNDEFINED for no next state", start=start, lowest=low, highest=high)
    return Automaton(start, transition, output)


def reachable(automaton: Automaton | Transducer) -> Automaton:
    """The part that strings reach, numbered in the order of the shortest strings (shorter first, then by tokens).
    Raises ValueError if the automaton does not fit together.
    """
    start, transition, output = _check(automaton)
    rows, numbers, order = transition.tolist(), {start: 0}, [start]
    for state in order:  # grows under the loop
        for following in rows[state]:
            if following != UNDEFINED and following not in numbers:
                numbers[following] = len(order)
                order.append(following)
    number = torch.full((len(rows) + 1,), UNDEFINED)  # the last entry is that of UNDEFINED itself
    number[order] = torch.arange(len(order))
    return Automaton(0, number[transition[order]], output[order])


def minimise(automaton: Automaton | Transducer) -> Automaton:
    """The smallest automaton that does the same on every string, in the numbering of `reachable`.

    Where every cell is defined, it is the one minimal Moore machine: automata are equivalent exactly if this form of them is
    equal. An undefined cell counts as a behaviour of its own. A start that is `UNASKED` joins a state that goes on as it does,
    if there is one, as it is asked for nothing else. Raises ValueError if the automaton does not fit together, or a state other
    than the start is `UNASKED`.
    """
    start, transition, output = reachable(automaton)
    _check_asked(start, transition, output, "automaton")
    number = torch.tensor(refine(output.tolist(), table_edges(transition)))
    first = torch.full((int(number.max()) + 1,), len(number)).scatter_reduce_(0, number, torch.arange(len(number)), "amin")
    transition = torch.cat([number, torch.tensor([UNDEFINED])])[transition[first]]
    start, output = int(number[start]), output[first]
    if output[start] == UNASKED:
        alike = (transition == transition[start]).all(1) & (output != UNASKED)
        start = int(alike.long().argmax()) if alike.any() else start
    return reachable(Automaton(start, transition, output))


def _check_asked(start: int, transition: Tensor, output: Tensor, name: str) -> None:
    unasked = output == UNASKED
    if (unasked.sum() > 1) or (unasked.any() and (not unasked[start] or (transition == start).any())):
        found = f"{name}: {int(unasked.sum())} of the states that strings reach are UNASKED"
        raise ValueError(f"{found}; the start alone may be, if no string leads back to it")


def unasked_start(automaton: Automaton | Transducer) -> Automaton:
    """The same automaton with a start of its own, which is asked nothing: only what follows a first token counts."""
    start, transition, output = _check(automaton)
    extended = torch.cat([transition, transition[start : start + 1]])
    return Automaton(len(output), extended, torch.cat([output, torch.tensor([UNASKED])]))


def compare(learned: Automaton | Transducer, true: Automaton | Transducer) -> Verdict:
    """Decide whether an automaton is equivalent to the true machine: equal outputs after every string that `true` defines.

    The pairs of states that strings lead to are visited breadth first (Hopcroft and Karp 1971): if the outputs of each pair are
    equal, the automata are equivalent; the first pair that differs ends a shortest counter-example. Where `learned` is
    undefined and `true` is not, they differ. The empty string counts, unless one of the starts is `UNASKED` (see
    `unasked_start`). Raises ValueError if the alphabets differ or an automaton does not fit together.
    """
    learned, true = _check(learned, "learned"), _check(true, "true")
    alphabets = [automaton.transition.shape[1] for automaton in (learned, true)]
    check("compare", alphabets[0] == alphabets[1], "one alphabet", learned=alphabets[0], true=alphabets[1])
    for name, automaton in (("learned", learned), ("true", true)):
        _check_asked(*reachable(automaton), name)
    states, begin = len(minimise(learned).output), (learned.start, true.start)
    rows, outputs = (learned.transition.tolist(), true.transition.tolist()), (learned.output.tolist(), true.output.tolist())
    strings: dict[tuple[int, int], list[int]] = {begin: []}  # a shortest string to each pair of states
    queue = [begin]
    for code, state in queue:  # grows under the loop
        output, wanted = outputs[0][code], outputs[1][state]
        if code == UNDEFINED or (output != wanted and UNASKED not in (output, wanted)):
            return Verdict(False, states, strings[code, state])
        for token, pair in enumerate(zip(rows[0][code], rows[1][state], strict=True)):
            if pair[1] != UNDEFINED and pair not in strings:
                strings[pair] = [*strings[code, state], token]
                queue.append(pair)
    return Verdict(True, states, None)


def run(automaton: Automaton | Transducer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """States and outputs after each token, int64 [B, T] each, of tokens [B, T]; UNDEFINED from where there is no next state.
    Raises ValueError if a token lies outside the alphabet.
    """
    start, transition, output = _check(automaton)
    vocabulary = transition.shape[1]
    _check_range("run", "tokens", tokens, vocabulary)
    table = torch.cat([transition, torch.full((1, vocabulary), UNDEFINED)])  # row −1: once undefined, always
    state, states = torch.full((len(tokens),), start), []
    for token in tokens.T:
        state = table[state, token]
        states.append(state)
    visited = torch.stack(states, 1)
    return visited, torch.cat([output, torch.tensor([UNDEFINED])])[visited]


def vote(codes: Tensor, tokens: Tensor, outputs: Tensor, num_codes: int, vocab_size: int) -> Vote:
    """The automaton that codes on runs vote for: after a code and a token, the commonest next code.

    The state before the first token is the code's number `num_codes`, which is `UNASKED`. Ties go to the lower number.

    Args:
        codes: [B, T] code at each position, after its token [B, T] was read; 0 … num_codes − 1. Where several codes are on
            at once, number the sets that occur (`torch.unique(hard_codes.flatten(0, 1), dim=0, return_inverse=True)`).
        outputs: [B, T] what each position stands for: the target of an acceptor, or of a generator the output of `run` on
            its `predictive_automaton`; classes from 0.

    Raises ValueError if the shapes differ or a number lies out of range.
    """
    shapes = {"codes": Shape(codes.shape), "tokens": Shape(tokens.shape), "outputs": Shape(outputs.shape)}
    fits = codes.shape == tokens.shape == outputs.shape and codes.ndim == 2 and codes.numel()
    check("vote", fits, "one shape [B, T]", **shapes)
    _check_range("vote", "codes", codes, num_codes)
    _check_range("vote", "tokens", tokens, vocab_size)
    _check_range("vote", "outputs", outputs, None)
    before = torch.cat([torch.full_like(codes[:, :1], num_codes), codes[:, :-1]], 1)
    cells = (num_codes + 1) * vocab_size
    steps = _counts(before * vocab_size + tokens, codes, cells, num_codes).view(num_codes + 1, vocab_size, num_codes)
    emitted = _counts(codes, outputs, num_codes, int(outputs.max()) + 1)
    (votes, transition), (output_votes, output) = steps.max(2), emitted.max(1)
    seen = steps.sum(2)
    observed = torch.cat([emitted.sum(1) > 0, torch.tensor([True])])
    output = torch.cat([output.masked_fill(~observed[:-1], UNASKED), torch.tensor([UNASKED])])
    automaton = Automaton(num_codes, transition.masked_fill(seen == 0, UNDEFINED), output)
    agreement, output_agreement = (votes.sum() / seen.sum()).item(), (output_votes.sum() / emitted.sum()).item()
    return Vote(automaton, agreement, output_agreement, observed[:, None] & (seen == 0))


def _check_range(owner: str, name: str, values: Tensor, size: int | None) -> None:
    low, high = (values.min().item(), values.max().item()) if values.numel() else (0, 0)
    fits = low >= 0 and (size is None or high < size or not values.numel())
    check(owner, fits, f"0 to {'any class' if size is None else size - 1}", **{f"{name} from": low, "to": high})


def _counts(row: Tensor, column: Tensor, rows: int, columns: int) -> Tensor:
    """How often each pair occurs, [rows, columns]."""
    return torch.bincount((row * columns + column).flatten(), minlength=rows * columns).view(rows, columns)


def intervention(before: Tensor, after: Tensor, wanted: Tensor) -> Intervention:
    """What switching codes did to predictions of the next state or token.

    Compare the code in question with a random code by `statistics.paired_difference(of_code.gained, of_random.gained)`,
    over units that are independent.

    Args:
        before, after: [N, C] probabilities without and with the edit.
        wanted: [N, C] bool, the outcomes that the edit is to bring about.

    Raises ValueError if the shapes differ or a row is no distribution.
    """
    fits = before.shape == after.shape == wanted.shape and before.ndim == 2 and wanted.dtype == torch.bool
    shapes = {name: Shape(given.shape) for name, given in (("before", before), ("after", after), ("wanted", wanted))}
    check("intervention", fits, "one shape [N, C], wanted as bool", **shapes)
    before, after = before.double(), after.double()
    for name, rows in (("before", before), ("after", after)):
        if not rows.numel() or rows.min() < 0 or (rows.sum(1) - 1).abs().max() > 1e-3:
            raise ValueError(f"intervention: a row of {name} is no distribution; probabilities of sum 1 are accepted")
    change = after - before
    return Intervention(change.abs().sum(1) / 2, (change * wanted).sum(1))
