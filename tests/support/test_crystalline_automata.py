"""Machines against definitions written another way; optima against enumeration of all strings and all hidden paths."""

import itertools
import math
import re
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsm_support.crystalline.automata import (
    MACHINES,
    UNDEFINED,
    AmbiguousFSM,
    FiniteStateMachine,
    FSMConfig,
    HiddenMarkovModel,
    Process,
    TokFSM,
    Transducer,
    beliefs,
    controls,
    make_machine,
    optimum,
    predict,
    predictive_automaton,
    survey,
    tomita,
)
from nsm_support.crystalline.automata.extraction import run
from nsm_support.crystalline.automata.machines import _cumulative
from nsm_support.crystalline.automata.structure import classes_alike
from nsm_support.metrics import ngram_baseline
from nsm_support.tasks import WordProblem, score

LANGUAGES = tuple(f"tomita{number}" for number in range(1, 8))
TRANSDUCERS = (*LANGUAGES, "parity", "mod5", "s3", "a5", "s5")
PUBLISHED = [[1, 0, 4], [3, 3, 2], [1, 1, 6], [0, 0, 1], [3, 3, 0], [3, 6, 3], [7, 4, 0], [2, 6, 5]]
"""Next states of the seed's machine of 8 states, 3 tokens and seed 42, as its prototype makes them."""


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def machines():
    return {name: make_machine(name) for name in MACHINES}


def hidden_markov(seed: int, states: int = 3, tokens: int = 2) -> HiddenMarkovModel:
    """A random machine with every edge there is, so that the next state is drawn too, and a tenth of them missing."""
    generator = np.random.default_rng(seed)
    source, token, target = np.indices((states, tokens, states)).reshape(3, -1)
    probability = generator.dirichlet(np.full(tokens * states, 0.5), size=states).ravel()
    kept = (generator.random(len(source)) > 0.1) | (token == target)  # no state loses all
    probability = np.where(kept, probability + 1e-3, 0)
    probability /= np.bincount(source, probability)[source]
    start = generator.dirichlet(np.ones(states))
    tensors = (torch.from_numpy(np.ascontiguousarray(x)) for x in (start, source, token, target, probability))
    return HiddenMarkovModel("random", *tensors, vocab_size=tokens)


def brute_force(machine: HiddenMarkovModel, length: int) -> dict[tuple[int, ...], float]:
    """P(string) of all strings of a length, by summing over every hidden path, one at a time."""
    edges = defaultdict(list)
    process = machine.process(length)
    for edge in zip(*(x.tolist() for x in (process.source, process.token, process.target, process.probability)), strict=True):
        edges[edge[0]].append(edge[1:])
    strings: dict[tuple[int, ...], float] = defaultdict(float)

    def extend(state: int, string: tuple[int, ...], probability: float) -> None:
        if len(string) == length:
            strings[string] += probability
            return
        for token, target, chance in edges[state]:
            if chance > 0:
                extend(target, (*string, token), probability * chance)

    for state, chance in enumerate(machine.start.tolist()):
        extend(state, (), chance)
    return strings


@pytest.mark.parametrize("name", MACHINES)
def test_every_machine_keeps_the_protocol(machines, name):
    machine = machines[name]
    assert machine.name == name
    sample, again = machine.sample_batch(random(), 7, 9), machine.sample_batch(random(), 7, 9)
    for values, same, size in zip(sample, again, (machine.vocab_size, machine.output_dim, machine.num_states), strict=True):
        assert values.dtype == torch.int64 and values.shape == (7, 9) and torch.equal(values, same)
        assert values.min() >= 0 and values.max() < size
    assert not torch.equal(sample.tokens, machine.sample_batch(random(1), 7, 9).tokens)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    machine.sample_batch(random(), 7, 9)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    with pytest.raises(ValueError, match=f"{name}: length = 0; accepted is a whole number, at least 1"):
        machine.sample_batch(random(), 7, 0)


@pytest.mark.parametrize("name", TRANSDUCERS)
def test_a_transducer_follows_its_table(machines, name):
    machine = machines[name]
    tokens, targets, states = machine.sample_batch(random(), 50, 30)
    before = torch.cat([torch.full((50, 1), machine.start), states[:, :-1]], 1)
    assert torch.equal(machine.transition[before, tokens], states) and torch.equal(machine.output[states], targets)


def test_rounding_never_draws_what_is_impossible():
    rows = torch.tensor([[0, 1 / 3, 1 / 3, 1 / 3, 0], [0.1] * 3 + [0.7, 0], [1, 0, 0, 0, 0]], dtype=torch.float64)
    cumulative = _cumulative(rows)
    for level in (0.0, 1 - 2**-53):
        assert (rows.gather(1, (cumulative <= level).sum(1)[:, None]) > 0).all(), level
    assert (cumulative <= 0.25).sum(1).tolist() == [1, 2, 0]


def seeds_machine(**sizes) -> FiniteStateMachine:
    return FiniteStateMachine(FSMConfig(**({"num_states": 8, "tokens_per_state": 3, "vocab_size": 24, "seed": 42} | sizes)))


def test_the_seeds_machine_is_the_published_one():
    fsm = seeds_machine()
    for state, following in enumerate(PUBLISHED):
        assert fsm.transition[state, 3 * state : 3 * state + 3].tolist() == following
        assert (fsm.transition[state] == UNDEFINED).sum() == 21
    expected = np.zeros((8, 8))
    for state, following in enumerate(PUBLISHED):
        for target in following:
            expected[state, target] += 1 / 3
    np.testing.assert_allclose(fsm.transition_matrix, expected)
    np.testing.assert_allclose(fsm.start, 1 / 8)
    np.testing.assert_allclose(FiniteStateMachine(FSMConfig()).transition_matrix.sum(1), np.ones(10))


def test_the_seeds_machine_walks_its_table():
    fsm = seeds_machine()
    inputs, targets, states = fsm.generate_batch(400, 32, random())
    assert torch.equal(states, inputs // 3) and torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(torch.tensor(PUBLISHED)[states, inputs % 3], targets // 3)
    shares = inputs.flatten().bincount(minlength=24).view(8, 3) / states.flatten().bincount(minlength=8)[:, None]
    often = states.flatten().bincount(minlength=8) > 500
    assert (shares[often] - 1 / 3).abs().max() < 0.04
    assert (states[:, 0].bincount(minlength=8) / 400 - 1 / 8).abs().max() < 0.06


def test_ambiguous_tokens_are_shared_and_the_state_follows_from_them():
    machine = AmbiguousFSM(FSMConfig(num_states=8, tokens_per_state=3, vocab_size=6, seed=42))
    has = machine.transition != UNDEFINED
    assert has.sum(1).tolist() == [3] * 8 and len({tuple(row) for row in has.tolist()}) == 8
    assert (has.sum(0) >= 2).all(), "each token belongs to several states"
    tokens, targets, states = machine.sample_batch(random(), 300, 64)
    assert (states[:, 0] == 0).all() and has[states, tokens].all()
    assert torch.equal(machine.transition[states, tokens][:, :-1], states[:, 1:]) and torch.equal(tokens[:, 1:], targets[:, :-1])
    assert sorted(machine.process(1).target.tolist()) == sorted(list(range(8)) * 3), "permutations lead everywhere equally"


@pytest.fixture(scope="module")
def tokfsm() -> TokFSM:
    return make_machine("tokfsm")


def test_tokfsm_spells_a_walk_on_its_graph(tokfsm):
    assert tokfsm.edges.sum(1).tolist() == [10] * 100 and tokfsm.vocab_size == 11 and tokfsm.num_states == 201
    np.testing.assert_allclose(tokfsm.transition_matrix.sum(1), 1)
    tokens, targets, states = tokfsm.sample_batch(random(), 400, 63)
    assert (tokens[:, 0] == 10).all() and (tokens[:, 1:] < 10).all() and torch.equal(tokens[:, 1:], targets[:, :-1])
    assert tokfsm.completes(states).tolist() == [[t > 0 and t % 2 == 0 for t in range(63)]] * 400
    spelt = 10 * tokens[:, 1::2] + tokens[:, 2::2]  # (400, 31)
    assert torch.equal(tokfsm.nodes(states[:, 1::2]), spelt) and torch.equal(tokfsm.nodes(states[:, 2::2]), spelt)
    assert (tokfsm.nodes(states[:, 0]) == 100).all()
    assert tokfsm.edges[spelt[:, :-1], spelt[:, 1:]].all()
    used = torch.zeros(100, 100).index_put_((spelt[:, :-1].flatten(), spelt[:, 1:].flatten()), torch.ones(()), accumulate=True)
    assert (used[tokfsm.edges] > 0).double().mean() > 0.99, "all ten neighbours come"


def test_tokfsm_in_another_base_has_as_many_digits_as_it_needs():
    machine = TokFSM(num_nodes=5, num_edges=2, base=2, seed=1)
    assert machine.digits == 3 and machine.vocab_size == 3
    assert machine.spelling.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0]]
    tokens, _, states = machine.sample_batch(random(), 60, 13)
    spelt = tokens[:, 1:].unflatten(1, (-1, 3)) @ torch.tensor([4, 2, 1])
    assert torch.equal(machine.nodes(states[:, 3::3]), spelt) and machine.completes(states[:, 3::3]).all()
    assert machine.edges[spelt[:, :-1], spelt[:, 1:]].all()
    found = machine.first_transition(lambda prompts: from_filter(machine, prompts))
    assert found.accuracy == 1.0 and found.mass == pytest.approx(1)


def from_filter(machine, prompts):
    """The optimal predictor, also asked for strings that cannot be: there it answers uniformly."""
    log = torch.full((*prompts.shape, machine.vocab_size), -math.log(machine.vocab_size), dtype=torch.float64)
    for row, prompt in enumerate(prompts):
        for end in range(1, len(prompt) + 1):
            try:
                log[row, end - 1] = predict(machine, prompt[None, :end])[0, -1]
            except ValueError:
                break
    return log


def test_first_transition_of_known_predictors(tokfsm):
    torch.manual_seed(0)
    shown = []

    def model(true_edges, wrong):
        """A predictor that knows the edges, but for some nodes takes those of node 0."""
        edges = true_edges.clone()
        edges[wrong] = true_edges[0]
        joint = edges.double().view(100, 10, 10) / 10

        def log_probabilities(prompts):
            shown.append(prompts)
            node = prompts[:, 1] * 10 + prompts[:, 2]
            out = torch.zeros(*prompts.shape, 11, dtype=torch.float64)
            out[:, 2, :10] = joint[node].sum(2)
            out[:, 3, :10] = joint[node, prompts[:, 3]] / joint[node, prompts[:, 3]].sum(1, keepdim=True).clamp(min=1e-12)
            return out.log()

        return log_probabilities

    perfect = tokfsm.first_transition(model(tokfsm.edges, []))
    assert perfect.accuracy == 1.0 and perfect.mass == pytest.approx(1)
    np.testing.assert_allclose(perfect.probabilities, tokfsm.transition_matrix, atol=1e-12)
    assert len(shown) == 1 and shown[0].shape == (1_000, 4) and (shown[0][:, 0] == 10).all()
    wrong = [7, 23, 91]
    kept = (tokfsm.edges[wrong] & tokfsm.edges[0]).sum().item()
    found = tokfsm.first_transition(model(tokfsm.edges, wrong))
    assert found.accuracy == pytest.approx((97 * 10 + kept) / 1_000) and found.mass == pytest.approx((97 * 10 + kept) / 1_000)
    blind = tokfsm.first_transition(lambda prompts: torch.full((*prompts.shape, 11), -math.log(11)))
    assert blind.mass == pytest.approx(10 / 121)


def odd_after_odd(word: str) -> bool:
    """Whether an odd run of 1s has an odd run of 0s anywhere after it."""
    runs = [(token, len(list(group))) for token, group in itertools.groupby(word)]
    odd = [token for token, length in runs if length % 2]
    return "1" in odd and "0" in odd[odd.index("1") :]


MEMBER = {
    "tomita1": lambda w: "0" not in w,
    "tomita2": lambda w: re.fullmatch("(10)*", w) is not None,
    "tomita3": lambda w: not odd_after_odd(w),
    "tomita4": lambda w: "000" not in w,
    "tomita5": lambda w: w.count("0") % 2 == 0 and w.count("1") % 2 == 0,
    "tomita6": lambda w: (w.count("0") - w.count("1")) % 3 == 0,
    "tomita7": lambda w: re.fullmatch("0*1*0*1*", w) is not None,
    "mod5": lambda w: w.count("1") % 5 == 0,
    "parity": lambda w: w.count("1") % 2 == 1,
}


@pytest.mark.parametrize("name", MEMBER)
def test_languages_are_their_definitions(machines, name):
    words = torch.tensor(list(itertools.product((0, 1), repeat=11)))
    outputs = run(machines[name], words)[1].tolist()
    expected = {}
    for word, outputs_of_word in zip(words.tolist(), outputs, strict=True):
        text = "".join(map(str, word))
        for end in range(1, 12):
            prefix = text[:end]
            if prefix not in expected:
                expected[prefix] = MEMBER[name](prefix)
            assert outputs_of_word[end - 1] == expected[prefix], prefix
    assert machines[name].output[machines[name].start] == MEMBER[name]("")
    assert len(set(classes_alike(machines[name]).tolist())) == machines[name].num_states, "the table is minimal"


@pytest.mark.parametrize(("name", "elements"), [("parity", 2), ("s3", 6), ("a5", 60), ("s5", 120)])
def test_groups_answer_as_the_word_problems_do(machines, name, elements):
    machine = machines[name]
    task = WordProblem(name)
    words, targets = task.sample_batch(random(), 100, 37)
    assert torch.equal(run(machine, words)[1], targets)
    assert machine.output_dim == machine.num_states == elements == len(set(classes_alike(machine).tolist()))


@pytest.mark.parametrize("length", [20, 200])
@pytest.mark.parametrize("name", [*LANGUAGES, "mod5"])
def test_samples_show_both_classes_and_every_state(machines, name, length):
    machine = machines[name]
    sample = machine.sample_batch(random(), 4_000, length)
    share = sample.targets.double().mean().item()
    assert 0.19 < share < 0.81, f"members: {share}"
    states = sample.states.flatten().bincount(minlength=machine.num_states) / sample.states.numel()
    assert (states > 0.09).all(), states
    torch.testing.assert_close(states.double(), machine.occupancy(length), rtol=0, atol=0.012)
    assert (machine.token_probabilities(length) > 0).all()
    assert (sample.tokens[:, -1] == 0).double().mean().item() == pytest.approx(0.5, abs=0.35)


def test_a_token_without_a_way_back_is_rare_enough(machines):
    for length in (3, 20, 400):
        stop = machines["tomita1"].token_probabilities(length)[0, 0].item()
        dead = 1 - np.mean([(1 - stop) ** t for t in range(1, length + 1)])
        assert dead == pytest.approx(1 / 3, abs=1e-6)
        assert machines["tomita1"].token_probabilities(length)[1].tolist() == [0.5, 0.5], "nothing is left to spare"
    np.testing.assert_allclose(machines["tomita7"].token_probabilities(4), 0.5)  # few are dead after 4 uniform tokens
    ends = Transducer("ends", 0, torch.tensor([[1, 2], [1, 1], [3, 2], [3, 3]]), torch.tensor([0, 1, 0, 1]))
    np.testing.assert_allclose(ends.token_probabilities(9), 0.5)  # half of the strings end at once, whatever is done
    for name in ("tomita5", "tomita6", "mod5", "s5"):
        np.testing.assert_allclose(machines[name].token_probabilities(50), 0.5)


@pytest.mark.parametrize("seed", range(4))
def test_optimum_and_counters_equal_brute_force(seed):
    machine, length = hidden_markov(seed), 5
    strings = brute_force(machine, length + 1)
    assert sum(strings.values()) == pytest.approx(1)
    best, nats, pairs = np.zeros(length), np.zeros(length), np.zeros((2, 2))
    for t in range(1, length + 1):
        prefixes = defaultdict(lambda: np.zeros(2))
        for string, probability in strings.items():
            prefixes[string[:t]][string[t]] += probability
            pairs[string[t - 1], string[t]] += probability / length
        for prefix, joint in prefixes.items():
            conditional = joint / joint.sum()
            best[t - 1] += joint.max()
            nats[t - 1] -= sum(p * math.log(q) for p, q in zip(joint, conditional, strict=True) if p > 0)
            predicted = predict(machine, torch.tensor([prefix]))[0, -1].exp()
            np.testing.assert_allclose(predicted, conditional, atol=1e-12)
    found = optimum(machine, length)
    np.testing.assert_allclose(found.accuracy, best, atol=1e-9)
    np.testing.assert_allclose(found.cross_entropy, nats, atol=1e-9)
    chance, counter, top = controls(machine, length)
    assert top.accuracy == pytest.approx(best.mean()) and top.loss_nats == pytest.approx(nats.mean())
    assert counter.accuracy == pytest.approx(pairs.max(1).sum())
    conditional = pairs / pairs.sum(1, keepdims=True)
    assert counter.loss_nats == pytest.approx(-(pairs * np.log(np.maximum(conditional, 1e-300))).sum())
    assert chance.accuracy == pytest.approx(pairs.sum(0).max())
    assert chance.loss_nats == pytest.approx(-(pairs.sum(0) * np.log(pairs.sum(0))).sum())


def test_ceilings_of_the_seeds_machine_and_of_shared_tokens(machines):
    for name in ("fsm", "ambiguous"):
        found = optimum(machines[name], 32)
        np.testing.assert_allclose(found.accuracy, 1 / 3)
        np.testing.assert_allclose(found.cross_entropy, math.log(3))
    counter = {name: controls(machines[name], 32)[1] for name in ("fsm", "ambiguous")}
    assert counter["fsm"].accuracy == pytest.approx(1 / 3) and counter["fsm"].loss_nats == pytest.approx(math.log(3))
    assert counter["ambiguous"].accuracy < 0.32 and counter["ambiguous"].loss_nats > math.log(3) + 0.5
    tokens = [machines["ambiguous"].sample_batch(random(seed), 2_000, 128).tokens for seed in (0, 1)]
    assert ngram_baseline(*tokens, 6, order=5).cross_entropy > math.log(3) + 0.05, "five tokens do not tell the state"


def test_optimum_of_tokfsm_equals_counting_its_edges(tokfsm):
    found = optimum(tokfsm, 7)
    first = tokfsm.edges.view(100, 10, 10).sum(2).double().numpy() / 10  # P(first digit | node before)
    nats = -(first * np.log(np.maximum(first, 1e-300))).sum(1)
    node = np.full(100, 1 / 100)
    np.testing.assert_allclose(found.accuracy[0], 0.1)
    np.testing.assert_allclose(found.cross_entropy[:2], math.log(10))  # a first node is uniform, digit by digit
    for position in (2, 4, 6):
        np.testing.assert_allclose(found.accuracy[position], node @ first.max(1))
        np.testing.assert_allclose(found.cross_entropy[position], node @ nats)
        if position < 6:  # then the second digit: uniform over the neighbours that begin so
            np.testing.assert_allclose(found.cross_entropy[position + 1], math.log(10) - node @ nats)
            np.testing.assert_allclose(found.accuracy[position + 1], node @ (first > 0).sum(1) / 10)
        node = node @ tokfsm.transition_matrix


@pytest.mark.parametrize("name", TRANSDUCERS)
def test_transducers_can_be_predicted_without_error(machines, name):
    machine = machines[name]
    found = optimum(machine, 12)
    np.testing.assert_allclose(found.accuracy, 1, rtol=1e-14)
    assert (found.cross_entropy == 0).all()
    tokens, targets, _ = machine.sample_batch(random(), 20, 12)
    assert score(predict(machine, tokens), targets) == (240, 240, 0.0)


def test_beliefs_that_never_close_are_refused(monkeypatch):
    monkeypatch.setattr("nsm_support.crystalline.automata.filtering.BELIEF_LIMIT", 50)
    with pytest.raises(ValueError, match="random has more than 50 beliefs after 5 tokens; a shorter length is accepted"):
        beliefs(hidden_markov(0))


def test_survey_of_the_seeds_machine():
    fsm = seeds_machine()
    found = survey(fsm, 32)
    assert found.rare.nonzero().flatten().tolist() == [5] and not found.unreachable.any()
    assert found.classes.tolist() == list(range(8))
    state, total = np.full(8, 1 / 8), np.zeros(8)
    for _ in range(32):
        total, state = total + state / 32, state @ fsm.transition_matrix
    np.testing.assert_allclose(found.occupancy, total)
    assert found.majority_share == pytest.approx(0.2927548, abs=1e-7)


def chain(matrix: list[list[float]], start: list[float]) -> Process:
    dense = torch.tensor(matrix, dtype=torch.float64)
    source, target = (dense > 0).nonzero(as_tuple=True)
    readout = torch.ones(len(dense), 1)
    return Process(torch.tensor(start), source, torch.zeros_like(source), target, dense[source, target], readout)


def test_unreachable_and_rare_states_are_found():
    # State 3 has no way in; state 0, the start, none back.
    machine = Transducer("planted", 0, torch.tensor([[1, 2], [1, 2], [2, 1], [0, 3]]), torch.tensor([0, 1, 0, 1]))
    found = survey(machine, 10)
    assert found.unreachable.tolist() == [True, False, False, True] and not found.rare.any()
    assert found.occupancy[[0, 3]].tolist() == [0, 0] and found.occupancy.sum() == pytest.approx(1)
    assert survey(tomita(2), 50).unreachable.tolist() == [False] * 3, "the start of (10)* is entered again"
    start = torch.tensor([0.99, 0.01, 0.0], dtype=torch.float64)
    once = HiddenMarkovModel(
        "once", start, torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]), torch.tensor([0, 0, 2]), torch.ones(3), 2
    )
    assert survey(once, 1).rare.tolist() == [False, True, False] and survey(once, 1).unreachable.tolist() == [False, False, True]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_states_that_predict_alike_form_one_class(seed):
    machine = hidden_markov(seed)
    process = machine.process(1)
    # Every state twice; an edge goes to either copy, in shares of its own for each copy of the source.
    share = torch.rand(2, len(process.source), generator=random(seed), dtype=torch.float64)
    parts = [
        (process.source + 3 * i, process.token, process.target + 3 * j, process.probability * (share[i] if j else 1 - share[i]))
        for i in (0, 1)
        for j in (0, 1)
    ]
    doubled = HiddenMarkovModel(
        "doubled", torch.cat([machine.start, machine.start]) / 2, *map(torch.cat, zip(*parts, strict=True)), 2
    )
    single, double = classes_alike(machine).tolist(), classes_alike(doubled).tolist()
    assert double == single * 2
    strings, again = brute_force(machine, 4), brute_force(doubled, 4)
    assert strings.keys() == again.keys() and all(again[w] == pytest.approx(p, abs=1e-12) for w, p in strings.items())


def test_predictive_automaton_of_the_seeds_machine():
    fsm = seeds_machine()
    automaton = predictive_automaton(fsm)
    assert automaton.transition.shape == (9, 24) and len(set(automaton.output.tolist())) == 9
    tokens, targets, _ = fsm.generate_batch(300, 20, random())
    classes = run(automaton, tokens)[1]
    following = targets // 3  # the next state is what there is to predict
    pairs = set(zip(classes.flatten().tolist(), following.flatten().tolist(), strict=True))
    assert len(pairs) == 8, "one class a next state"
    assert predictive_automaton(tomita(4)).output.tolist() == [1, 1, 1, 0]
    numbers = predictive_automaton(make_machine("ambiguous")).output.tolist()
    assert numbers == list(range(8)), "distributions are numbered as they come up"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FSMConfig(num_states=0), "FSMConfig: num_states = 0; accepted is a whole number"),
        (lambda: FSMConfig(vocab_size=2), "vocab_size = 2, tokens_per_state = 3; accepted is tokens_per_state or more"),
        (lambda: seeds_machine(vocab_size=23), "FiniteStateMachine: vocab_size = 23; accepted is 24 or more"),
        (lambda: AmbiguousFSM(FSMConfig(num_states=8, vocab_size=4)), "a set of 3 for each of 8 states"),
        (lambda: TokFSM(num_edges=101), "num_edges = 101; accepted is at most 100"),
        (lambda: tomita(8), "tomita: number = 8; accepted is one of 1, 2, 3, 4, 5, 6, 7"),
        (lambda: Transducer("t", 0, torch.tensor([[0, 2], [0, 1]]), torch.zeros(2)), "t: transition .* states 0 to 1"),
        (lambda: Transducer("t", 2, torch.tensor([[0, 1], [0, 1]]), torch.zeros(2)), "t: start 2, .* 2 states are accepted"),
        (lambda: chain([[0.5, 0.4], [0, 1]], [1, 0]), "a state's edges sums to 0.9; probabilities of sum 1 are accepted"),
        (lambda: chain([[0, 1], [0, 1]], [1, 1]), "the start sums to 2"),
        (lambda: make_machine("tomita8"), r"'tomita8' is no machine; accepted are fsm, .*; did you mean 'tomita\d'\?"),
        (lambda: predict(seeds_machine(), torch.tensor([[0, 3], [0, 9]])), "fsm cannot make string 1: no state that its first 1"),
    ],
)
def test_errors_say_what_is_accepted(build, message):
    with pytest.raises(ValueError, match=message):
        build()
