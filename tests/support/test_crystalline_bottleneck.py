"""The bottleneck: codes against their definitions, gradients against finite differences, noise against the schedule."""

import math

import pytest
import torch
import torch.nn.functional as F

from nsm_support.crystalline.codes.bottleneck import (
    DECAY,
    Bottleneck,
    BottleneckConfig,
    commitment_loss,
    compression_loss,
    gumbel_like,
    spread_out,
)
from nsm_support.crystalline.codes.schedules import temperature_at
from tests.support.draws import draw


def bottleneck(dim=6, seed=0, laid=False, **config):
    """A bottleneck in float64 with random codes, which count as just laid if `laid` says so."""
    torch.manual_seed(seed)
    made = Bottleneck(dim, BottleneckConfig(**config)).double()
    if laid:
        made.passes.fill_(made.config.lay_every)
    return made


def definition(x, module):
    """Of one vector in evaluation: logits, the winners, and the output."""
    logits = torch.stack([module.log_scale.exp() * (x @ c) / (x.norm() * c.norm()) for c in module.codebook])
    winners = sorted(range(len(logits)), key=lambda i: -logits[i].item())[: module.config.num_codes_k]
    return logits, winners, sum(module.codebook[i] for i in winners) / len(winners)


@pytest.mark.parametrize(("T", "K", "k"), [(1, 1, 1), (1, 5, 1), (63, 7, 1), (63, 7, 3), (5, 4, 4)])
def test_evaluation_equals_definition(T, K, k):
    module, x = bottleneck(codebook_size=K, num_codes_k=k).eval(), draw(2, T, 6)
    output, info = module(x)
    for b in range(2):
        for t in range(T):
            logits, winners, expected = definition(x[b, t], module)
            torch.testing.assert_close(output[b, t], expected)
            torch.testing.assert_close(info["soft_codes"][b, t], logits.softmax(0))
            assert info["hard_codes"][b, t].nonzero().flatten().tolist() == sorted(winners)
    assert info["input"] is x and info["output"] is output
    p = info["soft_codes"]
    torch.testing.assert_close(info["entropy"], -(p * p.log()).sum(-1).mean() / max(math.log(K), 1e-9) if K > 1 else p.sum() * 0)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("training", [False, True])
def test_hard_codes_are_ones_at_exactly_k_codes(k, training):
    module = bottleneck(codebook_size=7, num_codes_k=k, laid=True).train(training)
    x = torch.cat([draw(3, 4, 6), torch.zeros(3, 1, 6, dtype=torch.float64)], 1)  # zeros are like every code
    hard = module(x)[1]["hard_codes"]
    assert hard.unique().tolist() == [0, 1] and (hard.sum(-1) == k).all()


@pytest.mark.parametrize("k", [1, 3])
def test_lookup_is_the_forward_pass(k):
    module, x = bottleneck(codebook_size=9, num_codes_k=k).eval(), draw(2, 33, 6)
    indices, output = module.lookup(x)
    expected, info = module(x)
    torch.testing.assert_close(output, expected)
    assert torch.equal(torch.zeros_like(info["hard_codes"]).scatter(-1, indices, 1), info["hard_codes"])


def test_evaluation_has_no_noise_and_leaves_everything_as_it_was():
    module, x = bottleneck(codebook_size=7, temp_init=5.0).eval(), draw(2, 9, 6)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    first, second = module(x), module(x)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][key], second[1][key]) for key in first[1])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_choice_in_training_is_a_draw_from_the_softmax_at_the_temperature():
    """How often each code wins, against softmax(l/τ), at two temperatures of one schedule; argmax at τ = 0."""
    module = bottleneck(codebook_size=4, scale_init=2.0, laid=True)
    x = draw(1, 6).expand(20_000, 6)
    for temperature in (2.0, 0.5):
        module._temperature.fill_(temperature)
        codebook = module.codebook.clone()
        logits = module.logits(x[:1])[0]
        shares = module(x)[1]["hard_codes"].mean(0)
        module.codebook.copy_(codebook)  # without the step towards x
        torch.testing.assert_close(shares, (logits / temperature).softmax(0).detach(), atol=0.015, rtol=0)
    module._temperature.fill_(0.0)
    assert torch.equal(module(x)[1]["hard_codes"].argmax(-1), logits.argmax().expand(20_000))


def test_soft_codes_do_not_feel_the_temperature():
    module, x = bottleneck(codebook_size=7, laid=True), draw(2, 9, 6)
    found = []
    for temperature in (3.0, 0.1):
        module.codebook.copy_(draw(7, 6, seed=5))
        module._temperature.fill_(temperature)
        found.append(module(x)[1])
    assert torch.equal(found[0]["soft_codes"], found[1]["soft_codes"]) and torch.equal(*(one["entropy"] for one in found))
    assert not torch.equal(found[0]["hard_codes"], found[1]["hard_codes"])


@pytest.mark.parametrize("schedule", ["linear", "learned"])
def test_straight_through_gradient_is_that_of_the_soft_path(schedule):
    """Backward of the hard output against finite differences of x, and of x + Σ_k softmax(l + τ g)_k c_k."""
    module = bottleneck(codebook_size=5, schedule=schedule, laid=True)
    x, pull = draw(3, 6), draw(3, 6, seed=9)
    module._follow = lambda x, nearest: None  # codes stay where they are
    theta = module.log_temperature if schedule == "learned" else None

    def soft_path(moved, shift):
        torch.manual_seed(3)
        noise = gumbel_like(module.logits(x))
        value = moved
        if schedule == "learned":
            temperature = (10 * (theta + shift)).exp()
            value = moved + (module.logits(x) + temperature * noise).softmax(-1) @ module.codebook
        return (value * pull).sum()

    inputs = x.clone().requires_grad_()
    torch.manual_seed(3)
    output, info = module(inputs)
    torch.testing.assert_close(output.detach(), info["hard_codes"] @ module.codebook)  # the value is hard
    (output * pull).sum().backward()
    step = 1e-6
    with torch.no_grad():
        for i in range(3):
            for j in range(6):
                moved = torch.zeros_like(x)
                moved[i, j] = step
                slope = (soft_path(x + moved, 0.0) - soft_path(x - moved, 0.0)) / (2 * step)
                torch.testing.assert_close(inputs.grad[i, j], slope, atol=1e-6, rtol=1e-5)
        if theta is not None:
            slope = (soft_path(x, step) - soft_path(x, -step)) / (2 * step)
            assert slope.abs() > 1e-3
            torch.testing.assert_close(theta.grad, slope, atol=1e-6, rtol=1e-5)


def test_codes_follow_the_inputs_nearest_to_them():
    module, x = bottleneck(codebook_size=3, laid=True), draw(50, 6)
    before, nearest = module.codebook.clone(), module.logits(x).argmax(-1)
    module(x)
    for code in range(3):
        mine = x[nearest == code]
        expected = DECAY * before[code] + (1 - DECAY) * mine.mean(0) if len(mine) else before[code]
        torch.testing.assert_close(module.codebook[code], expected)
    assert module.usage.tolist() == nearest.bincount(minlength=3).tolist()
    share = nearest.bincount(minlength=3).double() / 50
    assert module.perplexity == pytest.approx(math.exp(-sum(p * math.log(p) for p in share.tolist() if p)))


def test_codes_are_laid_on_inputs_when_the_time_comes_and_not_before():
    module = bottleneck(codebook_size=4, lay_every=3)
    centres = 5 * draw(4, 6)
    for number in (1, 2, 3):
        before = module.codebook.clone()
        x = centres.repeat(8, 1) + 0.01 * draw(32, 6, seed=number)
        output, _ = module(x)
        if number < 3:
            assert torch.equal(output, x) and not module.initialised
        else:
            assert module.initialised and not torch.equal(output, x)
            near = F.cosine_similarity(module.codebook[:, None], centres, dim=-1)
            assert sorted(near.argmax(1).tolist()) == [0, 1, 2, 3] and near.amax(1).min() > 0.999
        assert not torch.equal(module.codebook, before)


def test_dead_codes_revive_and_live_ones_stay():
    module = bottleneck(codebook_size=4, lay_every=10, temp_init=0.0)
    old, new = 5 * torch.eye(6, dtype=torch.float64)[:2], 5 * torch.eye(6, dtype=torch.float64)[2:4]
    for _ in range(19):  # laid at the tenth pass on two places: two codes suffice
        module(old.repeat(50, 1) + 1e-3 * torch.randn(100, 6, dtype=torch.float64))
    both = torch.cat([old, new])
    module.codebook[:2], module.codebook[2:] = old, -old  # two that are nearest to nothing
    module.usage.copy_(torch.tensor([500.0, 500.0, 2.0, 0.0]))
    module(both.repeat(25, 1))  # the twentieth pass
    near = F.cosine_similarity(module.codebook[:, None], both, dim=-1)
    assert near[:2].argmax(1).tolist() == [0, 1] and sorted(near[2:].argmax(1).tolist()) == [2, 3]
    assert near.amax(1).min() > 0.999
    assert module.usage.sum() == 100, "counting starts anew"


def test_spread_out_finds_small_far_clusters():
    """One point in a hundred lies apart: drawing at random would miss it, as often as not."""
    points = torch.cat([draw(1, 6) + 1e-3 * draw(99, 6, seed=1), -draw(1, 6)])
    for seed in range(20):
        torch.manual_seed(seed)
        assert 99 in spread_out(points, 2, points[:0]).tolist()
        assert spread_out(points, 1, points[:1]).tolist() == [99]


def test_spread_out_takes_the_candidate_that_leaves_least():
    """The first candidate drawn is as good as any by its distance; the one that covers a crowd is better than a stray."""
    crowd, stray = draw(1, 6), draw(1, 6, seed=2)
    points = torch.cat([crowd + 1e-3 * draw(80, 6, seed=1), stray + 1e-3 * draw(20, 6, seed=3)])
    for seed in range(20):
        torch.manual_seed(seed)
        assert spread_out(points, 1, points[:0]).item() < 80


def test_no_more_codes_are_laid_than_there_are_places():
    """Three clusters and eight dead codes: three are laid, and where all is stood for, none is."""
    centres = 5 * draw(3, 6)
    points = centres.repeat(20, 1) + 1e-3 * draw(60, 6, seed=1)
    drawn = spread_out(points, 8, points[:0])
    assert sorted((drawn % 3).tolist()) == [0, 1, 2]
    assert len(spread_out(points, 8, centres)) == 0
    module = bottleneck(codebook_size=8, lay_every=1)
    before = module.codebook.clone()
    module(points)
    assert (module.codebook != before).any(1).sum() == 3


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("linear", [2.0, 1.55, 1.1, 0.2]),
        ("cosine", [2.0, 1.1 + 0.9 * math.cos(math.pi / 4), 1.1, 0.2]),
        ("exponential", [2.0, 2.0 * 0.1**0.25, math.sqrt(0.4), 0.2]),
        ("none", [2.0, 2.0, 2.0, 2.0]),
    ],
)
def test_schedules(schedule, values):
    assert [temperature_at(p, schedule, 2.0, 0.2) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(values)


def test_losses_are_their_formulas():
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(compression_loss(p).item(), math.log(2) / 2)
    compression_loss(p).backward()
    assert p.grad.isfinite().all(), "also where a probability is 0"
    even = torch.full((2, 3, 8), 1 / 8)
    torch.testing.assert_close(compression_loss(even).item(), math.log(8))
    x, y = draw(2, 3, 4).requires_grad_(), draw(2, 3, 4, seed=1).requires_grad_()
    loss = commitment_loss(x, y)
    torch.testing.assert_close(loss, ((x - y) ** 2).sum() / 24)
    loss.backward()
    assert y.grad is None
    torch.testing.assert_close(x.grad, (2 * (x - y) / 24).detach())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: bottleneck(num_codes_k=9, codebook_size=8),
            r"num_codes_k = 9, codebook_size = 8; accepted is 1 … codebook_size",
        ),
        (lambda: bottleneck(scale_init=0.0), "scale_init = 0.0; accepted is above 0"),
        (
            lambda: bottleneck(schedule="stepwise"),
            "schedule = 'stepwise'; accepted .*linear.*, .*cosine.*, .*exponential.*, .*learned",
        ),
        (lambda: bottleneck(schedule="exponential", temp_min=0.0), "temperatures above 0 are accepted|above 0"),
        (lambda: bottleneck()(draw(2, 7)), r"x = \[2, 7\]; accepted is \[..., D=6\]"),
        (lambda: temperature_at(1.5, "linear", 2.0, 0.1), r"progress = 1\.5; .*0 .*1"),
        (lambda: temperature_at(0.5, "learned", 2.0, 0.1), "learned"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
