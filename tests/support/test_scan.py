"""Scans against their definitions, token by token, in value and in gradient."""

from functools import partial

import pytest
import torch

from nsm_support.mixers import scan
from nsm_support.mixers.scan import selective_scan, selective_scan_reference, ssd_scan, ssd_scan_reference
from tests.support.draws import draw

LENGTHS = (1, 63, 64, 200)
SIZES = ((1, 1, 1), (3, 5, 4), (2, 40, 16))  # batch, channels, N


def selective_inputs(batch, channels, N, T, rate=1.0):
    """u, delta, A, B, C, D and an initial state; `rate` is the largest product of delta and A."""
    shapes = (batch, channels, T), (batch, channels, T), (channels, N), (batch, N, T), (batch, N, T), (channels,)
    u, delta, A, B, C, D = (draw(*shape, seed=i) for i, shape in enumerate(shapes))
    return [u, delta.sigmoid(), -rate * A.sigmoid(), B, C, D, draw(batch, channels, N, seed=6)]


def ssd_inputs(batch, heads, P, N, T, groups=None, rate=1.0):
    group = () if groups is None else (groups,)
    shapes = (batch, T, heads, P), (batch, T, heads), (heads,), (batch, T, *group, N), (batch, T, *group, N), (heads,)
    x, delta, A, B, C, D = (draw(*shape, seed=i) for i, shape in enumerate(shapes))
    return [x, delta.sigmoid(), -rate * A.sigmoid(), B, C, D, draw(batch, heads, P, N, seed=6)]


def run(function, inputs, **options):
    return function(*inputs[:6], initial_state=inputs[6], return_last_state=True, **options)


def assert_same(fast, slow, inputs, rtol=1e-9, **options):
    """Values, last states, and the gradients of all seven inputs."""
    inputs = [x.requires_grad_() for x in inputs]
    got, wanted = run(fast, inputs, **options), run(slow, inputs)
    pulls = [draw(*x.shape, seed=8 + i).to(x.dtype) for i, x in enumerate(wanted)]
    grads = [torch.autograd.grad(outputs, inputs, pulls) for outputs in (got, wanted)]
    names = ["y", "last state", "u", "delta", "A", "B", "C", "D", "initial state"]
    for name, a, b in zip(names, (*got, *grads[0]), (*wanted, *grads[1]), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        scale = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * scale, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(params=["one step at a time", "chunks side by side", "many segments", "as measured"])
def layout(request, monkeypatch):
    """All the ways in which tokens are laid out, at sizes small enough for a test."""
    # elements of a step, elements of a segment, fewest and most steps of a chunk
    sizes = {
        "one step at a time": (1, 1_000_000, 1, 1_000_000),
        "chunks side by side": (4_000, 1_000_000, 1, 7),
        "many segments": (2_000, 4_000, 1, 3),
    }
    if request.param in sizes:
        step, segment, shortest, longest = sizes[request.param]
        monkeypatch.setattr(scan, "ON_CPU", (step, segment))
        monkeypatch.setattr(scan, "SHORTEST", shortest)
        monkeypatch.setattr(scan, "LONGEST", longest)
    return request.param


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("size", SIZES)
def test_selective_scan_is_its_definition(size, T, layout):
    assert_same(selective_scan, selective_scan_reference, selective_inputs(*size, T))


SCANS = {
    "Mamba": (selective_scan, selective_scan_reference, lambda T: selective_inputs(2, 5, 4, T, rate=2.0)),
    "Mamba-2": (ssd_scan, ssd_scan_reference, lambda T: ssd_inputs(2, 4, 3, 5, T, groups=2, rate=2.0)),
}


@pytest.mark.parametrize("name", SCANS)
def test_many_tokens(name):
    """Double precision is the definition to rounding; single is within 1e-6 of its largest value, gradients within 1e-5."""
    fast, slow, make = SCANS[name]
    inputs = [x.float().double() for x in make(500)]  # the same numbers in both precisions
    assert_same(fast, slow, inputs)
    results = []
    for function, dtype in ((fast, torch.float32), (slow, torch.float64)):
        given = [x.detach().to(dtype).requires_grad_() for x in inputs]
        outputs = run(function, given)
        pulls = [draw(*x.shape, seed=8 + i).float().to(dtype) for i, x in enumerate(outputs)]
        results.append([*outputs, *torch.autograd.grad(outputs, given, pulls)])
    for i, (got, wanted) in enumerate(zip(*results, strict=True)):
        assert (got - wanted).abs().max() <= (1e-6 if i < 2 else 1e-5) * wanted.abs().max(), i


@pytest.mark.parametrize("rate", [1e-6, 1e-2, 50.0, 5_000.0])
def test_selective_scan_of_slow_and_of_instant_decay(rate, layout):
    inputs = selective_inputs(2, 5, 3, 65, rate)
    assert_same(selective_scan, selective_scan_reference, inputs)
    single = [x.detach().float() for x in inputs]
    y, last = run(selective_scan, single)
    truth, last_truth = run(selective_scan_reference, [x.detach() for x in inputs])
    for got, wanted in ((y, truth), (last, last_truth)):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def test_no_decay_is_a_running_sum(layout):
    u, delta, A, B, C, *_ = selective_inputs(2, 5, 3, 65)
    y = selective_scan(u, delta, A * 0, B, C)
    torch.testing.assert_close(y, torch.einsum("bcnt,bnt->bct", torch.einsum("bct,bnt->bcnt", delta * u, B).cumsum(-1), C))


@pytest.mark.parametrize("position", [0, 15, 16, 63, 64, 99])
def test_selective_scan_is_causal_to_the_bit(position, layout):
    u, delta, A, B, C, D, state = (x.float() for x in selective_inputs(2, 40, 16, 100))
    before = selective_scan(u, delta, A, B, C, D, initial_state=state)
    for changed in (u, delta, B, C):
        changed = changed[..., position]
        kept = changed.clone()
        changed += 0.5
        after = selective_scan(u, delta, A, B, C, D, initial_state=state)
        changed.copy_(kept)
        assert torch.equal(after[..., :position], before[..., :position])
        assert not torch.equal(after[..., position], before[..., position])


def test_any_memory_layout_and_what_is_not_needed(layout):
    """Transposed views, inputs without gradient, a scan that only its last state leaves."""
    inputs = [x.mT.contiguous().mT if x.dim() == 3 else x for x in selective_inputs(2, 5, 4, 33)]
    assert_same(selective_scan, selective_scan_reference, inputs)
    u = inputs[0].detach().requires_grad_()
    rest = [x.detach() for x in inputs[1:]]
    grads = [torch.autograd.grad(run(f, [u, *rest])[1].sum(), u)[0] for f in (selective_scan, selective_scan_reference)]
    torch.testing.assert_close(*grads)


def test_the_two_outputs_are_the_inputs_dtype_or_the_wider():
    inputs = selective_inputs(2, 5, 4, 9)
    assert run(selective_scan, [x.float() for x in inputs])[0].dtype == torch.float32
    mixed = [inputs[0].float(), *inputs[1:]]
    torch.testing.assert_close(run(selective_scan, mixed), run(selective_scan_reference, mixed))
    assert run(selective_scan, mixed)[0].dtype == torch.float64


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize(("groups", "chunk"), [(None, 64), (1, 16), (2, 7), (4, 1), (2, 1_000)])
def test_ssd_scan_is_its_definition(groups, chunk, T):
    assert_same(ssd_scan, ssd_scan_reference, ssd_inputs(2, 4, 3, 5, T, groups), chunk=chunk)


@pytest.mark.parametrize("rate", [1e-6, 1e-2, 50.0, 5_000.0])
def test_ssd_scan_of_slow_and_of_instant_decay(rate):
    inputs = ssd_inputs(2, 4, 3, 5, 65, rate=rate)
    assert_same(ssd_scan, ssd_scan_reference, inputs, chunk=16)
    y = run(ssd_scan, [x.detach().float() for x in inputs])[0]
    truth = run(ssd_scan_reference, [x.detach() for x in inputs])[0]
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5 * truth.abs().max().item())


def test_one_large_decay_costs_the_ssd_scan_no_digits():
    """A million at the second token, then next to nothing: what came after it must keep single precision."""
    inputs = [x.float() for x in ssd_inputs(1, 2, 3, 5, 40)]
    inputs[1] = inputs[1] * 1e-3
    inputs[1][:, 1] = 1e6
    inputs[0][:, 1] = 0  # or what this token writes would hide the rest
    y = run(ssd_scan, inputs)[0]
    truth = run(ssd_scan_reference, [x.double() for x in inputs])[0]
    torch.testing.assert_close(y[:, 2:].double(), truth[:, 2:], rtol=1e-4, atol=1e-5 * truth[:, 2:].abs().max().item())


@pytest.mark.parametrize("position", [0, 15, 16, 99])
def test_ssd_scan_is_causal_to_the_bit(position):
    x, delta, A, B, C, D, state = (v.float() for v in ssd_inputs(2, 4, 8, 16, 100))
    before = ssd_scan(x, delta, A, B, C, D, chunk=16, initial_state=state)
    for changed in (x, delta, B, C):
        kept = changed[:, position].clone()
        changed[:, position] += 0.5
        after = ssd_scan(x, delta, A, B, C, D, chunk=16, initial_state=state)
        changed[:, position] = kept
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position], before[:, position])


@pytest.mark.parametrize(
    ("function", "index", "change", "message"),
    [
        (selective_scan, 0, lambda x: x[..., :0], r"u = \[2, 5, 0\]; accepted is at least one token"),
        (selective_scan, 1, lambda x: x[..., 1:], r"delta = \[2, 5, 6\]; accepted is \[B=2, C=5, T=7\]"),
        (selective_scan, 5, lambda x: x[:, None], r"D = \[5, 1\]; accepted is \[C=5\]"),
        (selective_scan, 6, lambda x: x[..., :1], r"initial_state = \[2, 5, 1\]; accepted is \[B=2, C=5, N=4\]"),
        (selective_scan, 0, lambda x: x.long(), "dtype = torch.int64; accepted is real floats"),
        (ssd_scan, 1, lambda x: x.mT, r"delta = \[2, 4, 7\]; accepted is \[B=2, T=7, H=4\]"),
        (ssd_scan, 3, lambda x: x[:, :, None].expand(-1, -1, 3, -1), r"C = \[2, 7, 5\]; accepted is \[B=2, T=7, G=3, N=5\]"),
        (ssd_scan, 6, lambda x: x.mT, r"initial_state = \[2, 4, 5, 3\]; accepted is \[B=2, H=4, P=3, N=5\]"),
        (partial(ssd_scan, chunk=1.5), 0, lambda x: x, r"chunk = 1\.5; accepted is a whole number"),
    ],
)
def test_what_does_not_fit_is_named(function, index, change, message):
    inputs = selective_inputs(2, 5, 4, 7) if function is selective_scan else ssd_inputs(2, 4, 3, 5, 7)
    inputs[index] = change(inputs[index])
    with pytest.raises(ValueError, match=message):
        run(function, inputs)
    with pytest.raises(ValueError, match="heads = 4, groups = 3; accepted is groups of equal size"):
        run(ssd_scan, ssd_inputs(2, 4, 3, 5, 7, groups=3))
