"""Routing: weights, reading and writing against their definitions."""

import math

import pytest
import torch

from nsm_support.nsm import TokenToStateRouter, read_write, read_write_reference, write
from nsm_support.nsm.routing import routing_weights
from tests.support.draws import draw


@pytest.fixture
def router():
    torch.manual_seed(0)
    return TokenToStateRouter(16, 12, 5).double()


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 5), (63, 7)])
def test_fast_path_equals_definition(T, S, top_k):
    q, k, vs, vt, bias = (draw(*s, seed=i) for i, s in enumerate([(T, 8), (S, 8), (S, 8), (T, 8), (S,)]))
    tensors = [x.requires_grad_() for x in (q, k, vs, vt, bias)]
    fast = [x[0] for x in read_write(q[None], k[None], vs[None], vt[None], bias, 0.7, top_k)]
    slow = read_write_reference(q, k, vs, vt, bias, 0.7, top_k)
    pull = [draw(*x.shape, seed=9) for x in slow]
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(torch.autograd.grad(fast, tensors, pull), torch.autograd.grad(slow, tensors, pull), strict=True):
        torch.testing.assert_close(a, b)


def test_forward_returns_tokens_and_the_mean_over_heads(router):
    tokens, states = draw(2, 7, 16), draw(2, 5, 12, seed=1)
    routed, weights = router(tokens, states)
    routing = router.route(tokens, states)
    assert routed.shape == (2, 7, 16) and weights.shape == (2, 7, 5) and routing.weights.shape == (2, 4, 7, 5)
    assert torch.equal(weights, routing.weights.mean(1))
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(2, 4, 7, dtype=torch.float64))
    raw = TokenToStateRouter(16, 12, 5, use_softmax=False).double().route(tokens, states)
    assert torch.equal(raw.weights, raw.logits)
    assert (routing.weights[:, 0] - routing.weights[:, 1]).abs().max() > 0.01, "heads differ"


def test_logits_are_the_stated_formula(router):
    router.temperature = 0.5
    with torch.no_grad():
        router.log_importance.copy_(draw(5, seed=3))
    tokens, states = draw(2, 7, 16), draw(2, 5, 12, seed=1)
    logits = router.route(tokens, states).logits
    for h in range(4):
        q = tokens @ router.query.weight[4 * h : 4 * h + 4].T
        k = states @ router.key.weight[4 * h : 4 * h + 4].T
        expected = torch.einsum("btk,bsk->bts", q, k) / (math.sqrt(4) * 0.5) + router.log_importance
        torch.testing.assert_close(logits[:, h], expected)


def test_zero_states_route_uniformly():
    router = TokenToStateRouter(16, 12, 8)
    weights = router(torch.randn(2, 7, 16), torch.zeros(2, 8, 12))[1]
    assert torch.equal(weights, torch.full((2, 7, 8), 1 / 8))


def test_top_k_has_exactly_k_nonzeros_and_rows_that_sum_to_one():
    logits = torch.cat([draw(2, 3, 9, 6), torch.zeros(2, 3, 1, 6, dtype=torch.float64)], 2)  # the last row is all ties
    for k in range(1, 7):
        weights = routing_weights(logits, k)
        assert (weights > 0).sum(-1).unique().tolist() == [k]
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 10, dtype=torch.float64))
    assert torch.equal(routing_weights(logits, 6), routing_weights(logits))
    assert routing_weights(logits, 2)[0, 0, 0].topk(2).indices.tolist() == logits[0, 0, 0].topk(2).indices.tolist()


def test_write_is_safe_at_zero_mass():
    weights = torch.tensor([[0.0, 1.0], [0.0, 0.5]], dtype=torch.float64, requires_grad=True)
    values = torch.tensor([[2.0], [8.0]], dtype=torch.float64, requires_grad=True)
    message, mass = write(weights, values)
    assert message.tolist() == [[0.0], [4.0]] and mass.tolist() == [0.0, 1.5]
    message.sum().backward()
    assert values.grad.isfinite().all() and weights.grad.isfinite().all()


def test_strength_grows_with_mass_from_zero_to_one(router):
    mass = torch.tensor([0.0, 1e-3, 0.2, 50.0], dtype=torch.float64)
    strength = router.strength(mass)
    assert strength[0] == 0 and (strength.diff() > 0).all() and 0.999 < strength[3] < 1
    torch.testing.assert_close(router.strength(router.log_half_mass.exp()).item(), 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokenToStateRouter(18, 12, 5), r"token_dim = 18, num_heads = 4; accepted is a multiple of num_heads"),
        (lambda: TokenToStateRouter(16, 12, 5, top_k=6), r"top_k = 6; accepted is None or 1 … num_states, 5"),
        (lambda: TokenToStateRouter(16, 12, 5, temperature=0.0), "temperature = 0.0; accepted is above 0"),
        (
            lambda: TokenToStateRouter(16, 12, 5)(draw(2, 7, 15), draw(2, 5, 12)),
            r"tokens = \[2, 7, 15\]; accepted is \[B, T, D=16\]",
        ),
        (
            lambda: TokenToStateRouter(16, 12, 5)(draw(2, 7, 16), draw(3, 5, 12)),
            r"states = \[3, 5, 12\]; accepted is \[B=2, S=5, M=12\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
