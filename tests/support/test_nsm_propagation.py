"""Propagation: gated updates equal torch's cells; states listen to each other."""

import pytest
import torch
from torch import nn

from nsm_support.nsm import StatePropagator
from tests.support.draws import draw


def test_an_lstm_cell_begins_as_a_copy_of_the_states():
    ours = StatePropagator(8, gate_type="lstm").double()
    states, message = draw(2, 3, 8), draw(2, 3, 8, seed=1)
    for a, b in zip(ours(states, message), ours(states, message, states), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gate_type", ["gru", "lstm"])
def test_strength_takes_a_share_of_the_update(gate_type):
    torch.manual_seed(0)
    ours = StatePropagator(6, gate_type=gate_type, num_heads=0).double()
    states, message, cell = draw(1, 3, 6), draw(1, 3, 6, seed=1), draw(1, 3, 6, seed=2)
    full = ours(states, message, cell)
    part = ours(states, message, cell, torch.tensor([[0.0, 0.25, 1.0]]).double())
    assert torch.equal(part.states[0, 0], states[0, 0]), "nothing written, nothing changed, to the bit"
    torch.testing.assert_close(part.states[0, 1], 0.75 * states[0, 1] + 0.25 * full.states[0, 1])
    torch.testing.assert_close(part.states[0, 2], full.states[0, 2])
    if gate_type == "lstm":
        assert torch.equal(part.cell[0, 0], cell[0, 0])
        torch.testing.assert_close(part.cell[0, 2], full.cell[0, 2])


def test_state_attention_equals_torch_attention():
    torch.manual_seed(0)
    ours = StatePropagator(8, hidden_dim=12, num_heads=2).double().attention
    states, log_importance = draw(2, 5, 8), draw(5, seed=1)
    q, k, v = (x.unflatten(-1, (2, 6)).transpose(1, 2) for x in ours.qkv(states).chunk(3, -1))
    heard = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=log_importance.expand(2, 2, 5, 5))
    expected = ours.norm(states + ours.scale * ours.out(heard.transpose(1, 2).flatten(-2)))
    torch.testing.assert_close(ours(states, log_importance), expected)


def test_states_hear_each_other_but_not_one_of_no_importance():
    torch.manual_seed(0)
    ours = StatePropagator(8).double()
    states, message, other = draw(1, 4, 8), draw(1, 4, 8, seed=1), draw(1, 4, 8)
    other[:, 3] += 1
    before, after = ours(states, message).states, ours(other, message).states
    assert (after[:, :3] - before[:, :3]).abs().max() > 1e-4
    silent = torch.tensor([0.0, 0.0, 0.0, -torch.inf]).double()
    before, after = (ours(s, message, log_importance=silent).states for s in (states, other))
    assert torch.equal(after[:, :3], before[:, :3])


def test_states_stay_bounded_for_ever():
    torch.manual_seed(0)
    for options in ({}, {"num_heads": 0}, {"gate_type": "lstm"}):
        ours, states, cell = StatePropagator(8, **options), torch.randn(1, 4, 8), None
        with torch.no_grad():
            for _ in range(1000):
                states, cell = ours(states, torch.randn(1, 4, 8), cell)
        assert states.abs().max() < 10


@pytest.mark.parametrize(("gate_type", "peer"), [("gru", nn.GRUCell), ("lstm", nn.LSTMCell)])
def test_an_update_is_torchs_cell_on_the_same_weights(gate_type, peer):
    torch.manual_seed(0)
    cell, ours = peer(6, 6).double(), StatePropagator(6, gate_type=gate_type, num_heads=0).double()
    ours.cell.load_state_dict(cell.state_dict())
    start, memory = draw(2, 3, 6).requires_grad_(), draw(2, 3, 6, seed=7) if gate_type == "lstm" else None
    a, b = (start, memory), start.flatten(0, 1) if memory is None else (start.flatten(0, 1), memory.flatten(0, 1))
    for step in range(4):  # several steps, so that an error in the state would grow
        message = draw(2, 3, 6, seed=step + 1)
        a, b = ours(a[0], message, a[1]), cell(message.flatten(0, 1), b)
    for mine, theirs in zip(a, (b, None) if memory is None else b, strict=True):
        assert theirs is None or torch.allclose(mine.flatten(0, 1), theirs, rtol=1e-9, atol=1e-12)
    last = b if memory is None else b[0]
    grads = [
        torch.autograd.grad(out.square().sum(), [start, *module.parameters()], retain_graph=True)
        for out, module in ((a[0], ours.cell), (last, cell))
    ]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StatePropagator(8, gate_type="rnn"), "gate_type = 'rnn'; accepted is one of 'gru', 'lstm'"),
        (lambda: StatePropagator(8, hidden_dim=10), "hidden_dim = 10, num_heads = 4; accepted is a multiple of num_heads"),
        (
            lambda: StatePropagator(8)(torch.zeros(1, 4, 8), torch.zeros(1, 3, 8)),
            r"message = \[1, 3, 8\]; accepted is \[B=1, S=4, M=8\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
