"""The recurrent crystalline machine: what it computes, what it learns, and that a seed is alone among others."""

import dataclasses
import itertools
import math

import pytest
import torch

from nsm_support.crystalline.automata import Transducer, make_machine
from nsm_support.crystalline.automata.extraction import compare, run
from nsm_support.crystalline.recurrent.model import OBJECTIVES, START, TINY, CrystallineRecurrent, RecurrentConfig
from nsm_support.crystalline.recurrent.training import RecurrentTraining, revive, train, with_empty

SMALL = RecurrentConfig(vocab_size=3, output_dim=4, num_codes=5, dim=6, hidden=7, scale_init=3.0)


def randoms(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def strings(machines: int, strings: int, length: int, tokens: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(tokens, (machines, strings, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model() -> CrystallineRecurrent:
    return CrystallineRecurrent(SMALL, randoms(0, 1)).double()


@pytest.mark.parametrize("length", [1, 63])
def test_the_hard_pass_is_the_network_and_is_its_table(length):
    model = CrystallineRecurrent(SMALL, randoms(*range(4))).double()
    tokens = strings(4, 50, length)
    fast, slow = model(tokens), model.forward_reference(tokens)
    assert torch.equal(fast.codes, slow.codes) and len(fast.codes.unique()) > 1
    torch.testing.assert_close(fast.logits, slow.logits)
    for e, automaton in enumerate(model.automata()):
        states, outputs = run(automaton, tokens[e])
        assert torch.equal(states, fast.codes[e]) and torch.equal(outputs, fast.logits[e].argmax(-1))


def test_one_step_is_the_stated_formula(model):
    e, k, x = 1, 2, 1
    with torch.no_grad():
        model.out_bias.normal_(generator=torch.Generator().manual_seed(3))
    c = model.codebook[e]
    z = model.out[e].T @ torch.relu(model.into[e].T @ c[k] + model.token[e, x]) + model.out_bias[e, 0]
    expected = torch.stack([3.0 * torch.dot(z, c_j) / (z.norm() * c_j.norm()) for c_j in c])
    torch.testing.assert_close(model.transition_logits()[e, k, x], expected)
    assert model.tables()[0][e, k, x] == expected.argmax()


def test_a_run_can_start_from_any_code(model):
    tokens = strings(2, 5, 1)[..., 0]
    start = torch.tensor([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
    codes = model(tokens[..., None], start).codes[..., 0]
    table = model.tables()[0]
    assert all(codes[e, b] == table[e, start[e, b], tokens[e, b]] for e in range(2) for b in range(5))
    assert torch.equal(codes, model.forward_reference(tokens[..., None], start).codes[..., 0])


def brute_force(model, tokens, targets, e, heard):
    """Losses [T + 1] of one string by summing over every path of codes."""
    step, read = model.transition_logits()[e].softmax(-1), model.output_logits(model.codebook)[e].softmax(-1)
    K, total = len(read), []
    for t in range(len(tokens) + 1):
        joint = past = 0.0
        for path in itertools.product(range(K), repeat=t):
            path = (START, *path)
            weight = math.prod(step[path[i], tokens[i], path[i + 1]] for i in range(t))
            before = math.prod(read[path[i], targets[i]] for i in range(t)) if heard else 1.0
            past, joint = past + weight * before, joint + weight * before * read[path[t], targets[t]]
        total.append(-(joint / past).log())
    return torch.stack(total)


@pytest.mark.parametrize("objective", ["likelihood", "marginal"])
def test_losses_are_the_sum_over_all_paths_in_value_and_gradient(model, objective):
    tokens, targets = strings(2, 1, 4, seed=1), strings(2, 1, 5, 4, seed=2)
    relaxed = model.relaxed(tokens, targets, objective)
    slow = torch.stack([brute_force(model, tokens[e, 0], targets[e, 0], e, objective == "likelihood") for e in range(2)])
    torch.testing.assert_close(relaxed.nats[:, 0], slow)
    torch.testing.assert_close(relaxed.beliefs.sum(-1), torch.ones_like(relaxed.nats))
    parameters = list(model.parameters())
    fast = torch.autograd.grad(relaxed.nats.sum(), parameters)
    for a, b in zip(fast, torch.autograd.grad(slow.sum(), parameters), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_gradients_are_those_of_finite_differences_of_the_soft_path(model, objective):
    """Straight through, the hard path itself has no gradient: its own is that of hard values moved by soft differences."""
    tokens, targets = strings(2, 2, 3, seed=4), strings(2, 2, 4, 4, seed=5)
    frozen = model.transition_logits().detach()
    offset = torch.nn.functional.one_hot(frozen.argmax(-1), 5).double() - frozen.softmax(-1)  # hard − soft, held fixed

    def loss():
        if objective != "straight_through":
            return model.relaxed(tokens, targets, objective).nats.sum()
        step = (model.transition_logits().softmax(-1) + offset).flatten(2)  # soft differences about the hard value
        read = model.output_logits(model.codebook).softmax(-1)
        total = 0.0
        for e in range(2):
            for b in range(2):
                belief = torch.eye(5, dtype=torch.float64)[START]
                for t in range(4):
                    if t:
                        belief = belief @ step[e].unflatten(1, (3, 5))[:, tokens[e, b, t - 1]]
                    total = total - (belief @ read[e, :, targets[e, b, t]]).clamp(min=TINY).log()
        return total

    value = model.relaxed(tokens, targets, objective).nats.sum()
    torch.testing.assert_close(value, loss())
    value.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert objective == "continuous" and name == "log_scale"
            continue
        flat, grads = parameter.detach().view(-1), parameter.grad.view(-1)
        for i in range(0, len(flat), max(1, len(flat) // 5)):
            kept, ends = flat[i].item(), []
            for shift in (1e-6, -1e-6):
                flat[i] = kept + shift
                ends.append(loss().item())
            flat[i] = kept
            assert grads[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-6), name


def test_straight_through_takes_the_hard_path(model):
    tokens, targets = strings(2, 8, 9), strings(2, 8, 10, 4, seed=2)
    beliefs = model.relaxed(tokens, targets, "straight_through").beliefs
    torch.testing.assert_close(beliefs.amax(-1), torch.ones(2, 8, 10, dtype=torch.float64))
    assert torch.equal(beliefs[:, :, 1:].argmax(-1), model(tokens).codes)
    assert model.relaxed(tokens, targets, "marginal").beliefs[:, :, 1:].amax(-1).max() < 0.999


def test_without_codes_the_state_is_the_cell_itself(model):
    tokens = strings(2, 4, 7)
    states = model.continuous(tokens)
    state = model.codebook[1, START]
    for t in range(7):
        z = model.out[1].T @ torch.relu(model.into[1].T @ state + model.token[1, tokens[1, 2, t]]) + model.out_bias[1, 0]
        state = z / z.norm() * math.sqrt(6)
        torch.testing.assert_close(states[1, 2, t + 1], state)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_a_seed_beside_others_is_the_seed_alone(objective):
    """Up to rounding: sums run in another order in a batch of another size, so that bits may differ."""
    machine, config = make_machine("tomita3"), RecurrentTraining(steps=12, batch_size=8, pace=0.6, objective=objective)
    sizes = RecurrentConfig(vocab_size=2, output_dim=2, num_codes=8, dim=6, hidden=8)
    found = []
    for seeds in ((3, 4, 5), (4,)):
        generators = randoms(*seeds)
        model = CrystallineRecurrent(sizes, generators)
        found.append((model, train(model, machine, generators, config)))
    (many, first), (alone, second) = found
    for a, b in zip(many.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a[1:2], b, rtol=1e-4, atol=1e-5)
    assert torch.equal(first.lengths[:, 1:2], second.lengths) and torch.equal(first.revived[:, 1:2], second.revived)
    assert (many.codebook[0] - many.codebook[1]).abs().max() > 0.1
    assert first.revived[-1, 1] > 0 or objective == "continuous"
    assert len(first.lengths[-1].unique()) > 1 or objective != "likelihood", "the test needs machines at different lengths"


def test_strings_grow_with_success_only():
    machine, found = make_machine("tomita1"), {}
    for pace in (1e-9, 100.0):
        generators = randoms(0)
        model = CrystallineRecurrent(RecurrentConfig(vocab_size=2, output_dim=2), generators)
        config = RecurrentTraining(steps=10, pace=pace, min_length=3, max_length=9, record_every=2)
        found[pace] = train(model, machine, generators, config).lengths[:, 0].tolist()
    assert found == {1e-9: [3] * 6, 100.0: [3, 5, 7, 9, 9, 9]}


def test_the_empty_string_is_taught():
    """Acceptance of nothing at all is an output like any other: the empty string belongs to parity's complement too."""
    machine = make_machine("parity")
    odd = Transducer("odd", 0, machine.transition, 1 - machine.output)
    assert with_empty(odd, torch.tensor([[0, 1]])).tolist() == [[1, 0, 1]]
    generators = randoms(0, 1)
    model = CrystallineRecurrent(RecurrentConfig(vocab_size=2, output_dim=2), generators)
    train(model, odd, generators, RecurrentTraining(steps=200))
    assert [compare(one, odd).equivalent for one in model.automata()] == [True, True]


def test_dead_codes_are_laid_beside_the_undecided_one():
    generators = randoms(0, 1)
    model = CrystallineRecurrent(dataclasses.replace(SMALL, num_codes=6), generators)
    optimizer = torch.optim.Adam(model.parameters())
    model.codebook.grad = torch.ones_like(model.codebook)
    optimizer.step()
    with torch.no_grad():  # every output is decided, but that of code 3; every code goes to code 1
        model.readout.zero_()
        model.readout[:, 0, 0] = 200.0
        model.codebook[:, :, 0] = 1.0
        model.codebook[:, 3, 0] = 0.0
        model.log_scale.fill_(math.log(200.0))
        model.out.zero_()
        model.out_bias.copy_(model.codebook[:, 1:2])
    before = model.codebook.detach().clone()
    usage = torch.tensor([[0.0, 0.4, 0.0, 0.4, 0.2, 0.0], [1 / 6] * 6])
    assert revive(model, usage, generators, optimizer).tolist() == [1, 0], "one code is undecided, so one is laid there"
    changed = (model.codebook != before).any(-1)
    assert changed.tolist() == [[False, False, True, False, False, False], [False] * 6], "the start stays, though unused"
    state = optimizer.state[model.codebook]
    assert (state["exp_avg"][0, 2] == 0).all() and (state["exp_avg"][0, 3] != 0).all()
    for seed in range(10):  # beside code 3 whatever is drawn, though code 1 is used as much
        with torch.no_grad():
            model.codebook.copy_(before)
        assert revive(model, usage, randoms(seed, 1), optimizer).tolist() == [1, 0]
        far = (model.codebook[0, 2] - before[0]).norm(dim=-1)
        assert far.argmin() == 3 and 0.1 < far[3] / before[0, 3].norm() < 1.0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m: RecurrentConfig(vocab_size=0, output_dim=2), "RecurrentConfig: vocab_size = 0; accepted is a whole number"),
        (lambda m: CrystallineRecurrent(SMALL, []), "accepted is one for each machine"),
        (lambda m: m(strings(3, 2, 4)), r"tokens \[3, 2, 4\]; \[E=2, B, T\]"),
        (lambda m: m(strings(2, 2, 4, 9, seed=1)), "0 to 2, is accepted"),
        (lambda m: m(strings(2, 2, 4), torch.full((2, 2), 5)), "0 to 4, are accepted"),
        (lambda m: m(strings(2, 2, 4), torch.zeros(2, 3, dtype=torch.int64)), r"start \[2, 3\]"),
        (lambda m: m.relaxed(strings(2, 2, 4), strings(2, 2, 4), "likelihood"), r"targets = \[2, 2, 4\]; .*T \+ 1=5"),
        (
            lambda m: m.relaxed(strings(2, 2, 4), strings(2, 2, 5), "hard"),
            "objective = 'hard'; accepted is one of 'likelihood', 'marg",
        ),
        (lambda m: RecurrentTraining(steps=0), "RecurrentTraining: steps = 0; accepted is a whole number"),
        (lambda m: RecurrentTraining(max_length=1), "max_length = 1, min_length = 2; accepted is at least min_length"),
        (lambda m: RecurrentTraining(pace=0.0), "pace = 0.0"),
        (
            lambda m: train(m, make_machine("parity"), randoms(0, 1), RecurrentTraining()),
            "train: generators = 2, vocab_size = 2, ",
        ),
    ],
)
def test_bad_input_is_refused(model, function, message):
    with pytest.raises(ValueError, match=message):
        function(model)


def test_a_loss_that_is_not_finite_stops_the_training():
    generators = randoms(0)
    model = CrystallineRecurrent(RecurrentConfig(vocab_size=2, output_dim=2), generators)
    with torch.no_grad():
        model.codebook[0, 1] = math.nan
    with pytest.raises(FloatingPointError, match="at update 0 the losses are"):
        train(model, make_machine("parity"), generators, RecurrentTraining(steps=1))
