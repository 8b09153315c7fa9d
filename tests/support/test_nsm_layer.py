"""The layer: states and tokens matter, causality is exact, streaming equals the full pass, pruning saves work."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nsm_support.nsm import NSMLayer
from tests.support.draws import draw

CHUNKS = [1, 4, 7, 64]


def make(seed=0, **options):
    torch.manual_seed(seed)
    layer = NSMLayer(5, 12, 16, **({"window": 4} | options)).double()
    with torch.no_grad():  # importance that is not the same for all
        layer.router.log_importance.copy_(draw(5, seed=4))
    return layer


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_states_matter_and_tokens_matter(chunk):
    layer = make(chunk=chunk)
    tokens, states = draw(2, 11, 16), draw(2, 5, 12, seed=1)
    out, after = layer(tokens, states)
    assert out.shape == tokens.shape and after.shape == states.shape
    other_out, other_after = layer(tokens, draw(2, 5, 12, seed=2))
    assert (out - other_out).abs().amax((0, 2)).min() > 1e-3, "some token does not read the states"
    assert (after - other_after).abs().amax(-1).min() > 1e-3
    changed = tokens.clone()
    changed[:, 10] = draw(2, 16, seed=3)  # one token, the last
    moved = (layer(changed, states)[1] - after).abs().amax(-1)
    assert moved.min() > 1e-6, "some state does not hear the tokens"


def test_bidirectionally_every_token_reaches_every_other():
    layer = make(window=1)
    tokens = draw(1, 9, 16).requires_grad_()
    layer(tokens)[0][0, 0].sum().backward()
    assert tokens.grad.abs().sum(-1).min() > 1e-9


@pytest.mark.parametrize(("chunk", "heard"), [(1, 0), (4, 3)])
def test_a_token_reads_the_newest_states_that_it_may_know(chunk, heard):
    """With no window, token t depends on those before it whose chunk is complete at t, and on itself."""
    layer = make(chunk=chunk, mix="read")
    tokens = draw(1, 12, 16).requires_grad_()
    out = layer(tokens)[0]
    for t in range(12):
        grad = torch.autograd.grad(out[0, t].sum(), tokens, retain_graph=True)[0]
        complete = (t + 1) // chunk * chunk
        expected = sorted({*range(complete), t})
        assert (grad[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("gate_type", ["gru", "lstm"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_stream_ends_in_the_states_of_the_full_pass_and_does_not_grow(chunk, gate_type):
    layer, tokens = make(chunk=chunk, gate_type=gate_type, rotary=True), draw(2, 23, 16)
    stream, sizes = layer.start(2), []
    for t in range(23):
        stream = layer.step(tokens[:, t], stream)[1]
        sizes.append(sum(x.numel() for x in stream if torch.is_tensor(x)))
    torch.testing.assert_close(layer.close(stream), layer(tokens)[1], rtol=1e-10, atol=1e-12)
    assert len(set(sizes[8:])) == 1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gate_type", ["gru", "lstm"])
@pytest.mark.parametrize("T", [1, 9])
def test_fast_recurrence_equals_chunks_of_one(gate_type, T, masked):
    layer = make(chunk=1, gate_type=gate_type)
    heard, states = draw(2, T, 16).requires_grad_(), draw(2, 5, 12, seed=1).requires_grad_()
    mask = torch.arange(T) < torch.tensor([[T], [T // 2]]) if masked else None
    inputs = [heard, states, *layer.router.parameters(), *layer.propagator.parameters()]
    fast, slow = layer._recur(heard, states, mask), layer._in_chunks(heard, states, mask)
    torch.testing.assert_close(fast.read, slow.read)
    torch.testing.assert_close(fast.states, slow.states)
    torch.testing.assert_close(fast.mass.sum(1), slow.mass)
    pull = [draw(*fast.read.shape, seed=2), draw(*fast.states.shape, seed=3)]
    for a, b in zip(
        torch.autograd.grad([fast.read, fast.states], inputs, pull),
        torch.autograd.grad([slow.read, slow.states], inputs, pull),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gate_type", ["gru", "lstm"])
def test_chunks_do_what_the_parts_say(gate_type):
    """Two chunks by hand, from the parts' own methods; the LSTM's cell goes from the first to the second."""
    layer = make(chunk=3, gate_type=gate_type, mix="read")
    router, propagator = layer.router, layer.propagator
    tokens = draw(2, 5, 16)
    heard = layer.norm(tokens)
    states, cell = layer.state_manager(batch_size=2), None
    start, reads = states, []
    for part in (slice(0, 3), slice(3, 5)):
        written = router.write_tokens(router.route(heard[:, part], states).weights, heard[:, part])
        states, cell = propagator(states, written.message, cell, written.strength, router.log_importance)
        reads.append(states)
    for t, known in enumerate([start, start, reads[0], reads[0], reads[0]]):
        expected = router(heard[:, t : t + 1], known)
        torch.testing.assert_close(layer.trace(tokens).weights.mean(1)[:, t], expected[1][:, 0])
        mixed = tokens[:, t] + expected[0][:, 0]
        torch.testing.assert_close(layer(tokens)[0][:, t], mixed + layer.ffn(layer.ffn_norm(mixed)))
    torch.testing.assert_close(layer(tokens)[1], states)
    if gate_type == "lstm":
        forgetful = propagator(reads[0], written.message, None, written.strength, router.log_importance).states
        assert (forgetful - states).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{"rotary": True}, {"gate_type": "lstm"}, {"top_k": 2}])
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_padding_changes_nothing(chunk, options):
    layer = make(chunk=chunk, **options)
    tokens, mask = draw(2, 15, 16), torch.arange(15) < torch.tensor([[15], [6]])
    out, states = layer(tokens, mask=mask)
    short, short_states = layer(tokens[1:, :6])
    torch.testing.assert_close(out[1:, :6], short)
    torch.testing.assert_close(states[1:], short_states)
    torch.testing.assert_close(out[:1], layer(tokens[:1])[0])


@pytest.mark.parametrize("gate_type", ["gru", "lstm"])
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_pruning_a_state_of_no_importance_changes_no_output(chunk, gate_type):
    layer = make(chunk=chunk, gate_type=gate_type)
    tokens = draw(2, 15, 16)
    with torch.no_grad():
        layer.router.log_importance[2] = -40
    before, states = layer(tokens)
    pruned = layer.state_manager.prune()
    assert 2 not in pruned.kept.tolist()
    layer = make(chunk=chunk, gate_type=gate_type)
    with torch.no_grad():
        layer.router.log_importance[2] = -40
    layer.state_manager.prune([0, 1, 3, 4])
    after, kept = layer(tokens)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    torch.testing.assert_close(kept, states[:, [0, 1, 3, 4]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_pruning_shrinks_tensors_and_counted_flops(chunk):
    layer, tokens = make(chunk=chunk, mix="read"), draw(1, 16, 16)

    def flops():
        with FlopCounterMode(display=False) as counter:
            layer(tokens)
        return counter.get_total_flops()

    sizes = sum(p.numel() for p in layer.parameters())
    before = flops()
    layer.state_manager.prune([0])
    assert sum(p.numel() for p in layer.parameters()) == sizes - 4 * (12 + 1)
    assert layer(tokens)[1].shape == (1, 1, 12)
    token_side = 16 * 2 * (4 * 16 * 16 + 2 * 16 * 64)  # query, value, read_out and as much again; feed-forward
    assert flops() < before - 0.5 * (before - token_side)


@pytest.mark.parametrize("mix", ["gate", "sum", "fixed", "local", "read"])
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_every_parameter_has_a_gradient(chunk, mix):
    torch.manual_seed(0)
    layer = NSMLayer(5, 12, 16, window=4, chunk=chunk, mix=mix)
    tokens, states = layer(torch.randn(2, 9, 16))
    (tokens.square().sum() + (0 if states is None else states.square().sum())).backward()
    without = [name for name, p in layer.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert without == []


def test_errors():
    for call, message in (
        (lambda: make()(draw(2, 9, 15)), r"tokens = \[2, 9, 15\]; accepted is \[B, T, D=16\]"),
        (lambda: make()(draw(2, 9, 16), draw(3, 5, 12)), r"initial_states = \[3, 5, 12\]; accepted is \[B=2, S=5, M=12\]"),
        (lambda: make()(draw(2, 9, 16), mask=torch.ones(2, 8) > 0), r"mask = \[2, 8\]; accepted is \[B=2, T=9\]"),
        (lambda: make()(draw(2, 9, 16), mask=torch.ones(2, 9)), "mask.dtype = torch.float32; accepted is torch.bool"),
        (lambda: make()(draw(2, 0, 16)), "NSMLayer: number of tokens = 0"),
        (lambda: make(chunk=0), "NSMLayer: chunk = 0"),
        (lambda: make().start(2), "chunk = None; accepted is a number of tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
