"""Attention: the blocked window against its definition; the mix of window and read."""

import pytest
import torch

from nsm_support.nsm import HybridAttention, local_attention, local_attention_reference
from nsm_support.nsm.attention import rotate
from tests.support.draws import draw


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "window"), [(1, 4), (3, 8), (16, 4), (63, 1), (63, 5), (63, 16), (64, 63), (63, 100)])
def test_blocks_equal_definition(T, window, causal, masked):
    q, k, v = (draw(2, 3, T, 4, seed=i).requires_grad_() for i in range(3))
    mask = None
    if masked:
        mask = torch.arange(T) < torch.tensor([[T], [T // 2]])
    fast = local_attention(q, k, v, window, causal, mask)
    slow = local_attention_reference(q, k, v, window, causal, mask)
    torch.testing.assert_close(fast, slow)
    pull = draw(2, 3, T, 4, seed=5)
    for a, b in zip(torch.autograd.grad(fast, (q, k, v), pull), torch.autograd.grad(slow, (q, k, v), pull), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("causal", [False, True])
def test_receptive_field_is_the_window(causal):
    q, k, v = (draw(1, 1, 21, 4, seed=i).requires_grad_() for i in range(3))
    local_attention(q, k, v, 4, causal)[0, 0, 10].sum().backward()
    seen = (v.grad[0, 0].abs().sum(-1) > 0).nonzero()[:, 0].tolist()
    assert seen == list(range(7, 11 if causal else 14))


def test_rotary_products_depend_on_distance_alone():
    q, k = draw(1, 1, 1, 8), draw(1, 1, 1, 8, seed=1)
    products = [(rotate(q, t + 5) * rotate(k, t)).sum() for t in (0, 3, 100_000)]
    torch.testing.assert_close(products[0], products[1])
    torch.testing.assert_close(products[0], products[2], rtol=1e-6, atol=1e-8)
    assert (products[0] - (rotate(q, 6) * rotate(k, 0)).sum()).abs() > 1e-3
    torch.testing.assert_close(rotate(q.expand(1, 1, 4, 8), 2)[:, :, 3], rotate(q, 5)[:, :, 0])
    torch.testing.assert_close(rotate(q, 7).norm(), q.norm())


def test_a_mask_made_in_inference_mode_serves_in_training():
    attention = HybridAttention(8, num_heads=2, window=3, mix="local")
    tokens = torch.randn(1, 11, 8)
    with torch.inference_mode():
        attention.local(tokens)
    attention.local(tokens).sum().backward()


def test_mixes():
    torch.manual_seed(0)
    tokens, states, weights = draw(2, 9, 8), draw(2, 3, 8, seed=1), draw(2, 9, 3, seed=2).softmax(-1)
    gate = HybridAttention(8, window=4).double()
    local, read = gate.local(tokens), weights @ states

    def mixed(mix, alpha=0.5):
        module = HybridAttention(8, window=4, mix=mix, alpha=alpha).double()
        module.load_state_dict(gate.state_dict(), strict=False)
        return module(tokens, states, weights)

    torch.testing.assert_close(mixed("sum"), local + read)
    torch.testing.assert_close(mixed("fixed", 0.3), 0.3 * local + 0.7 * read)
    torch.testing.assert_close(mixed("fixed", 1.0), local)
    torch.testing.assert_close(mixed("fixed", 0.0), read)
    torch.testing.assert_close(mixed("local"), local)
    torch.testing.assert_close(mixed("read"), read)
    g = torch.sigmoid((tokens + local) @ gate.gate.weight.T + gate.gate.bias)
    torch.testing.assert_close(gate(tokens, states, weights), g * local + (1 - g) * read)
    torch.testing.assert_close(gate.share(tokens + local), g)


def test_states_of_another_width_pass_a_projection_the_optimiser_sees():
    attention = HybridAttention(8, state_dim=5)
    out = attention(torch.randn(2, 9, 8), torch.randn(2, 3, 5), torch.rand(2, 9, 3))
    assert out.shape == (2, 9, 8)
    assert "state_proj.weight" in dict(attention.named_parameters())
    with pytest.raises(ValueError, match="give state_dim where they are not token_dim wide"):
        HybridAttention(8)(torch.randn(2, 9, 8), torch.randn(2, 3, 5), torch.rand(2, 9, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": "both"}, "mix = 'both'; accepted is one of 'gate', 'sum', 'fixed', 'local', 'read'"),
        ({"alpha": 1.5}, "alpha = 1.5; accepted is 0 … 1"),
        ({"window": 0}, "window = 0; accepted is a whole number, at least 1"),
        ({"num_heads": 3}, r"token_dim = 8, num_heads = 3; accepted is a multiple of num_heads"),
        ({"num_heads": 8, "rotary": True}, "num_heads = 8; accepted is an even width per head"),
    ],
)
def test_constructor_errors(options, message):
    with pytest.raises(ValueError, match=message):
        HybridAttention(8, **options)
