"""Automata from codes: minimum, equivalence and votes, against enumeration, table filling and automata-lib."""

import itertools

import pytest
import torch
from automata.fa.dfa import DFA
from hypothesis import given, settings
from hypothesis import strategies as st

from nsm_support.crystalline.automata import (
    UNASKED,
    UNDEFINED,
    Automaton,
    Transducer,
    make_machine,
    modular_counter,
    predictive_automaton,
    tomita,
)
from nsm_support.crystalline.automata.extraction import (
    Verdict,
    compare,
    intervention,
    minimise,
    reachable,
    run,
    unasked_start,
    vote,
)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(seed: int, states: int, tokens: int, classes: int) -> Automaton:
    generator = random(seed)
    transition = torch.randint(states, (states, tokens), generator=generator)
    return Automaton(0, transition, torch.randint(classes, (states,), generator=generator))


def disguised(machine: Automaton | Transducer, seed: int, copies: int = 3, spare: int = 4) -> Automaton:
    """The same machine in other codes: every state several times, edges to any of the copies, codes never used."""
    generator, states, tokens = random(seed), *machine.transition.shape
    copy = torch.randint(copies, (copies, states, tokens), generator=generator)
    transition = (copy * states + machine.transition).flatten(0, 1)
    extra = torch.randint(copies * states + spare, (spare, tokens), generator=generator)
    automaton = Automaton(
        machine.start,
        torch.cat([transition, extra]),
        torch.cat([machine.output.repeat(copies), torch.zeros(spare, dtype=torch.int64)]),
    )
    return permuted(automaton, torch.randperm(copies * states + spare, generator=generator))


def permuted(automaton: Automaton, to: torch.Tensor) -> Automaton:
    """Code i renamed to `to[i]`."""
    back = to.argsort()
    named = torch.cat([to, torch.tensor([UNDEFINED])])
    return Automaton(int(to[automaton.start]), named[automaton.transition[back]], automaton.output[back])


def answer(automaton: Automaton | Transducer, string) -> int:
    state = int(automaton.start)
    for token in string:
        state = int(automaton.transition[state, token])
        if state == UNDEFINED:
            return UNDEFINED
    return int(automaton.output[state])


def first_difference(one: Automaton, other: Automaton, length: int) -> list[int] | None:
    """By trying all strings, shorter ones first, then in the order of their tokens."""
    for size in range(length + 1):
        for string in itertools.product(range(one.transition.shape[1]), repeat=size):
            if answer(one, string) != answer(other, string):
                return list(string)
    return None


def as_dfa(automaton: Automaton | Transducer) -> DFA:
    transition = automaton.transition.tolist()
    symbols = [str(token) for token in range(len(transition[0]))]
    return DFA(
        states=set(range(len(transition))),
        input_symbols=set(symbols),
        initial_state=int(automaton.start),
        transitions={state: dict(zip(symbols, row, strict=True)) for state, row in enumerate(transition)},
        final_states={state for state, output in enumerate(automaton.output.tolist()) if output == 1},
    )


def same(one: Automaton, other: Automaton) -> bool:
    return one.start == other.start and torch.equal(one.transition, other.transition) and torch.equal(one.output, other.output)


def test_a_hand_built_automaton_comes_back():
    # Even number of 1s in six codes: 4 and 1 are even, 0 and 3 odd; 2 and 5 are never reached.
    codes = Automaton(4, torch.tensor([[3, 1], [4, 0], [5, 5], [0, 4], [1, 3], [2, 4]]), torch.tensor([0, 1, 1, 0, 1, 0]))
    smallest = minimise(codes)
    assert smallest.start == 0 and smallest.transition.tolist() == [[0, 1], [1, 0]] and smallest.output.tolist() == [1, 0]
    assert compare(codes, modular_counter(2)) == Verdict(True, 2, None)
    # In the order of the shortest strings: λ → 4, "0" → 1, "1" → 3, "01" → 0.
    assert reachable(codes).transition.tolist() == [[1, 2], [0, 3], [3, 0], [2, 1]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 3), st.integers(1, 3))
def test_minimise_is_idempotent_and_names_do_not_matter(seed, states, tokens, classes):
    automaton = drawn(seed, states, tokens, classes)
    smallest = minimise(automaton)
    assert same(minimise(smallest), smallest)
    renamed = permuted(automaton, torch.randperm(states, generator=random(seed + 1)))
    assert same(minimise(renamed), smallest)
    assert compare(renamed, automaton) == (True, len(smallest.output), None)
    assert same(minimise(disguised(automaton, seed)), smallest)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 10), st.integers(1, 10))
def test_automata_lib_says_the_same(seed, states, others):
    one, other = drawn(seed, states, 2, 2), drawn(seed + 1, others, 2, 2)
    left, right = as_dfa(one), as_dfa(other)
    verdict = compare(one, other)
    assert verdict.equivalent == (left == right)
    assert verdict.num_states == len(left.minify().states)
    assert compare(disguised(one, seed), one).equivalent and as_dfa(disguised(one, seed)) == left
    if not verdict.equivalent:
        difference = left ^ right
        assert len(verdict.counter_example) == difference.minimum_word_length()
        assert difference.accepts_input("".join(map(str, verdict.counter_example)))


def test_a_planted_fault_is_found_by_the_shortest_string():
    true = modular_counter(5)
    faulty = true.transition.clone()
    faulty[4, 1] = 1  # the fifth 1 is counted as the first
    assert compare(Automaton(0, faulty, true.output), true) == (False, 2, [1, 1, 1, 1, 1])
    faulty = true.transition.clone()
    faulty[3, 0] = 2  # a 0 is lost after three 1s: seen when the two that follow are not enough
    assert compare(Automaton(0, faulty, true.output), true) == (False, 5, [1, 1, 1, 0, 1, 1])
    wrong = true.output.clone()
    wrong[2] = 1
    assert compare(Automaton(0, true.transition, wrong), true).counter_example == [1, 1]
    assert compare(Automaton(3, true.transition, true.output), true).counter_example == []


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4), st.integers(1, 2), st.integers(2, 3))
def test_counter_examples_are_the_first_of_the_shortest(seed, states, others, tokens, classes):
    one, other = drawn(seed, states, tokens, classes), drawn(seed + 1, others, tokens, classes)
    # Two automata of n and m states that differ do so within n + m − 2 tokens.
    expected = first_difference(one, other, states + others - 2)
    verdict = compare(one, other)
    assert verdict.equivalent == (expected is None) and verdict.counter_example == expected


def test_what_is_asked_before_the_first_token():
    true = tomita(1)
    # The start is a code of its own with the wrong output; no string comes back to it.
    codes = Automaton(2, torch.tensor([[0, 0], [0, 1], [0, 1]]), torch.tensor([0, 1, 0]))
    assert compare(codes, true) == (False, 3, [])
    assert compare(unasked_start(codes), true) == (True, 2, None)
    assert compare(codes, unasked_start(true)) == (True, 3, None)
    assert same(minimise(unasked_start(codes)), minimise(true)), "an unasked start joins the state that goes on alike"
    assert len(minimise(unasked_start(Automaton(2, torch.tensor([[0, 0], [0, 1], [1, 0]]), codes.output))).output) == 3
    with pytest.raises(ValueError, match="1 of the states that strings reach are UNASKED; the start alone may be"):
        minimise(Automaton(0, torch.tensor([[0, 1], [1, 1]]), torch.tensor([UNASKED, 1])))
    with pytest.raises(ValueError, match="learned: 2 of the states"):
        compare(Automaton(0, torch.tensor([[1, 1], [1, 1]]), torch.tensor([UNASKED, UNASKED])), true)


def test_undefined_cells():
    true = tomita(2)
    partial = true.transition.clone()
    partial[1, 0] = UNDEFINED
    codes = Automaton(0, partial, true.output)
    assert compare(codes, true) == (False, 3, [1, 0]), "it does not know what the true machine knows"
    assert compare(true, codes).equivalent, "strings that the true machine does not define are not asked"
    assert run(codes, torch.tensor([[1, 0, 1], [1, 1, 0]]))[0].tolist() == [[1, UNDEFINED, UNDEFINED], [1, 2, 2]]
    assert run(codes, torch.tensor([[1, 0, 1], [1, 1, 0]]))[1].tolist() == [[0, UNDEFINED, UNDEFINED], [0, 0, 0]]
    ones = Automaton(1, torch.tensor([[0, 0], [0, UNDEFINED]]), torch.tensor([0, 1]))  # 1*, but it cannot read the 1
    assert compare(ones, tomita(1)) == (False, 2, [1])
    # States that differ in nothing but an undefined cell are not merged.
    assert len(minimise(Automaton(0, torch.tensor([[1], [UNDEFINED]]), torch.tensor([0, 0]))).output) == 2


@pytest.mark.parametrize("name", ["tomita3", "tomita7", "mod5", "s3", "a5"])
def test_votes_over_runs_give_the_machine(name):
    machine = make_machine(name)
    codes = disguised(machine, seed=3, copies=2)
    tokens, targets, _ = machine.sample_batch(random(), 1_000, 40)
    found = vote(run(codes, tokens)[0], tokens, targets, len(codes.output), 2)
    assert found.agreement == found.output_agreement == 1.0 and not found.untouched.any()
    assert compare(found.automaton, machine) == (True, machine.num_states, None)


def test_votes_are_counted():
    # Codes 0 and 1 swap at token 1; in one of twenty steps a 0 leads to code 2 by mistake, which has output 1 as code 1.
    codes = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 1, 1], [0, 0, 2, 1, 1], [1, 1, 0, 0, 1]])
    tokens = torch.tensor([[0, 1, 0, 1, 0], [1, 1, 0, 1, 0], [0, 0, 0, 1, 0], [1, 0, 1, 0, 1]])
    found = vote(codes, tokens, (codes > 0).long(), num_codes=4, vocab_size=2)
    U = UNDEFINED
    assert found.automaton.start == 4
    assert found.automaton.transition.tolist() == [[0, 1], [1, 0], [U, 1], [U, U], [0, 1]]
    assert found.automaton.output.tolist() == [0, 1, 1, UNASKED, UNASKED]
    assert found.agreement == pytest.approx(19 / 20) and found.output_agreement == 1.0
    assert found.untouched.nonzero().tolist() == [[2, 0]], "code 3 was never seen, code 2 not at 0"
    assert compare(found.automaton, modular_counter(2)).equivalent is False, "its outputs are the other way round"
    parity = make_machine("parity")
    assert compare(found.automaton, parity) == (True, 2, None)
    noisy = vote(codes, tokens, torch.where(torch.arange(20).view(4, 5) == 7, 1, (codes > 0).long()), 4, 2)
    assert noisy.output_agreement == pytest.approx(19 / 20) and torch.equal(noisy.automaton.output, found.automaton.output)


@pytest.mark.parametrize("name", ["fsm", "ambiguous"])
def test_codes_of_a_generator_are_checked_on_the_strings_it_can_make(name):
    machine = make_machine(name)
    true = predictive_automaton(machine)
    tokens = machine.sample_batch(random(), 3_000, 32).tokens
    beliefs, classes = run(true, tokens)
    renamed = torch.randperm(len(true.output) + 3, generator=random(1))
    found = vote(renamed[beliefs], tokens, classes, len(renamed), machine.vocab_size)
    assert found.untouched.any() and found.agreement == 1.0, "tokens that a state does not have are never read"
    assert compare(found.automaton, true).equivalent
    # Two predictive states in one code: the verdict names a legal string after which they part.
    merged = torch.where(beliefs == 2, 1, beliefs)
    learned = vote(merged, tokens, classes, len(true.output), machine.vocab_size).automaton
    verdict = compare(learned, true)
    assert not verdict.equivalent and answer(true, verdict.counter_example) != UNDEFINED
    assert answer(learned, verdict.counter_example) != answer(true, verdict.counter_example)


def test_interventions_measure_what_moved_and_where_to():
    before = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    after = torch.tensor([[0.0, 0.5, 0.5], [0.2, 0.3, 0.5]])
    wanted = torch.tensor([[False, False, True], [True, False, False]])
    found = intervention(before, after, wanted)
    torch.testing.assert_close(found.moved, torch.tensor([0.5, 0.0], dtype=torch.float64))
    torch.testing.assert_close(found.gained, torch.tensor([0.5, 0.0], dtype=torch.float64))
    torch.testing.assert_close(intervention(before, after, ~wanted).gained, torch.tensor([-0.5, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: minimise(Automaton(0, torch.tensor([[0, 2], [0, 1]]), torch.tensor([0, 1]))), "highest = 2; accepted is 0 to 1"),
        (
            lambda: reachable(Automaton(0, torch.tensor([[0], [1]]), torch.tensor([0]))),
            r"\[2, 1\], output = \[1\]; accepted is integer",
        ),
        (lambda: compare(tomita(1), make_machine("fsm")), "true is a FiniteStateMachine; accepted is an Automaton"),
        (lambda: compare(drawn(0, 2, 3, 2), tomita(1)), "compare: learned = 3, true = 2; accepted is one alphabet"),
        (lambda: vote(*torch.zeros(3, 2, 4).long(), 0, 2), "vote: codes from = 0, to = 0; accepted is 0 to -1"),
        (
            lambda: vote(*torch.zeros(2, 2, 4).long(), torch.zeros(2, 3).long(), 1, 2),
            r"outputs = \[2, 3\]; accepted is one shape \[B, T\]",
        ),
        (
            lambda: vote(*torch.zeros(2, 2, 4).long(), torch.full((2, 4), -100), 1, 2),
            "outputs from = -100, to = -100; accepted is 0 to any class",
        ),
        (lambda: intervention(torch.ones(1, 2), torch.ones(1, 2) / 2, torch.ones(1, 2).bool()), "a row of before is no distr"),
        (lambda: intervention(*torch.ones(3, 1, 2) / 2), "wanted as bool"),
    ],
)
def test_errors_say_what_is_accepted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
