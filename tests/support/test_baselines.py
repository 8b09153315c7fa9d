"""Baselines: heads, learning, causality, streaming, and each against an independent computation of the same."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nsm_support.costs import count_parameters, match_parameters
from nsm_support.data import to_patches
from nsm_support.mixers import BASELINES, GRU, LSTM, BaselineConfig, CNNConfig, SmallCNN
from nsm_support.mixers.baselines import TransformerLayer

SMALL = {"token_dim": 16, "num_heads": 2, "output_dim": 5}
TOKENS, VECTORS = {"vocab_size": 40}, {"input_dim": 3}
EVERY = [("Transformer", False), *((name, True) for name in BASELINES)]
TASKS = [(TOKENS, "classification"), (TOKENS, "labelling"), (TOKENS, "language_model"), (VECTORS, "classification")]


def make(name, seed=0, **options):
    torch.manual_seed(seed)
    if options.get("head") == "language_model":
        options["output_dim"] = None
    return BASELINES[name](BaselineConfig(**(SMALL | options)))


def draw(shape, kind, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    if kind == TOKENS:
        return torch.randint(40, shape, generator=generator)
    return torch.randn(*shape, 3, generator=generator, dtype=dtype)


def train(model, inputs, targets, steps, rate=1e-2):
    """Loss before and after."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), rate), []
    for _ in range(steps + 1):
        losses.append(F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return losses[0].item(), losses[-1].item()


@pytest.mark.parametrize(("kind", "head"), TASKS)
@pytest.mark.parametrize(("name", "causal"), EVERY)
def test_every_model_learns_32_samples_by_heart(name, causal, kind, head):
    if head == "language_model":
        causal = True  # all else is refused, see below
    model = make(name, head=head, causal=causal, **kind)
    classes = 40 if head == "language_model" else 5
    inputs = draw((32, 4), kind)
    if kind == TOKENS:
        inputs[:, 0] = torch.arange(32)  # so that every prefix is another
    shape = (32,) if head == "classification" else (32, 4)
    targets = torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))
    before, after = train(model, inputs, targets, steps=50, rate=3e-2)
    assert before > 0.7 * math.log(classes) and after < 0.1 * math.log(classes), (before, after)


@pytest.mark.parametrize("head", ["classification", "labelling"])
@pytest.mark.parametrize(("name", "causal"), EVERY)
def test_padding_changes_nothing(name, causal, head):
    model = make(name, head=head, causal=causal, **VECTORS).double()
    inputs, lengths = draw((2, 9), VECTORS, dtype=torch.float64), torch.tensor([9, 5])
    out = model(inputs, torch.arange(9) < lengths[:, None])
    for b, length in enumerate(lengths):
        alone = model(inputs[b : b + 1, :length])[0]
        torch.testing.assert_close(out[b] if head == "classification" else out[b, :length], alone)
    assert (head == "labelling" and causal) or not torch.allclose(out, model(inputs))
    for wrong in (torch.ones(2, 8, dtype=torch.bool), torch.ones(2, 9)):
        with pytest.raises(ValueError, match=r"mask.* = .*; accepted is (\[B=2, T=9\]|torch.bool)"):
            model(inputs, wrong)


def turned(x, position):
    """x [K] at a position, by 2 × 2 rotation matrices: pair i by the angle position · 10000^(−2i/K)."""
    pairs = []
    for i, pair in enumerate(x.view(-1, 2)):
        angle = position * 10_000 ** (-2 * i / len(x))
        pairs.append(torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) @ pair)
    return torch.cat(pairs)


@pytest.mark.parametrize("causal", [False, True])
def test_a_transformer_layer_is_what_the_equations_say(causal):
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        layer, tokens = TransformerLayer(8, 2, causal), torch.randn(7, 8)
        u = F.layer_norm(tokens, (8,))
        q, k, v = (u @ w.T for w in layer.qkv.weight.chunk(3))
        heard = torch.zeros(7, 8)
        for head in (slice(0, 4), slice(4, 8)):
            for t in range(7):
                seen = range(t + 1 if causal else 7)
                logits = torch.stack([turned(q[t, head], t) @ turned(k[s, head], s) for s in seen]) / 2
                heard[t, head] = logits.softmax(0) @ v[: len(seen), head]
        middle = tokens + layer.out(heard)
        wide = F.linear(F.layer_norm(middle, (8,)), layer.ffn[0].weight, layer.ffn[0].bias)
        out = middle + layer.ffn[2](0.5 * wide * (1 + torch.erf(wide / 2**0.5)))
        torch.testing.assert_close(layer(tokens[None])[0], out)
        # and in it, attention hears of positions their distance alone: a stream may start anywhere
        q, k, _ = layer._project(tokens[None])
        q_late, k_late, _ = layer._project(tokens[None], 100_000)
        torch.testing.assert_close(q_late @ k_late.mT, q @ k.mT, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(layer._project(tokens[None], 1)[0] @ k.mT, q @ k.mT)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("cell", "step"), [(LSTM, nn.LSTMCell), (GRU, nn.GRUCell)])
def test_a_recurrent_model_is_its_cell_walked_over_the_tokens(cell, step):
    model = cell(BaselineConfig(token_dim=6, num_layers=2, output_dim=4, vocab_size=9)).double()
    inputs = torch.randint(9, (3, 7))
    tokens = list(model.embed(inputs).unbind(1))
    for layer in (0, 1):
        alone = step(6, 6).double()
        alone.load_state_dict({name: getattr(model.layers[0].rnn, f"{name}_l{layer}") for name in alone.state_dict()})
        state = None
        for t, token in enumerate(tokens):
            state = alone(token, state)
            tokens[t] = state[0] if cell is LSTM else state
    pooled = torch.stack([F.layer_norm(token, (6,)) for token in tokens]).mean(0)
    torch.testing.assert_close(model(inputs), pooled @ model.head.weight.T + model.head.bias)
    assert type(model.layers[0].rnn) is cell.cell


def test_a_mamba_model_adds_its_blocks_to_the_normed_tokens():
    model = make("Mamba", num_layers=3, state_dim=5, **VECTORS)
    assert len(model.layers) == 3 and model.start(2).layers[0].state.shape == (2, 32, 5)
    inputs = draw((2, 7), VECTORS)
    tokens = model.embed(inputs)
    for layer in model.layers:
        tokens = tokens + layer.block(F.layer_norm(tokens, (16,)))
    torch.testing.assert_close(model(inputs), model.head(F.layer_norm(tokens, (16,)).mean(1)))


@pytest.mark.parametrize("name", BASELINES)
def test_learned_positions_tell_the_order_and_end(name):
    model = make(name, positions="learned", max_length=4, **TOKENS)
    with torch.no_grad():
        model.position.copy_(torch.randn(4, 16))
    same = torch.full((1, 3), 7)
    torch.testing.assert_close(model._embed(same)[0], model.embed.weight[7] + model.position[:3])
    with pytest.raises(ValueError, match="number of tokens = 5; accepted is at most max_length = 4"):
        model(torch.zeros(1, 5, dtype=torch.long))


def test_the_small_cnn_reads_images_and_patches_alike_and_learns_them_by_heart():
    torch.manual_seed(0)
    model, images, labels = SmallCNN(CNNConfig(channels=4)), torch.rand(32, 28, 28), torch.arange(32) % 10
    for size in (1, 4, 7):
        assert torch.equal(model(to_patches(images, size)), model(images))
    assert not torch.allclose(model(to_patches(images, 4).flip(1)), model(images))
    assert count_parameters(model) == 4 * 26 + 8 * (4 * 25 + 1) + 10 * (8 * 49 + 1)
    before, after = train(model, images, labels, steps=60)
    assert before > 2 and after < 0.2
    for shape in ((2, 27, 28), (2, 49, 9), (2, 28)):
        with pytest.raises(ValueError):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="side = 30; accepted is a multiple of 4"):
        CNNConfig(side=30)


@pytest.mark.parametrize("name", BASELINES)
def test_the_width_with_the_nearest_number_of_parameters_is_found(name):
    def build(width):
        return BASELINES[name](BaselineConfig(token_dim=width, num_heads=2, output_dim=5, vocab_size=40))

    torch.manual_seed(3)
    state = torch.get_rng_state()
    widths = range(8, 65, 4)
    wanted = count_parameters(build(40)) + 100
    torch.set_rng_state(state)
    width, model = match_parameters(build, wanted, iter(widths))
    assert torch.equal(torch.get_rng_state(), state)
    assert width == 40 and abs(count_parameters(model) - wanted) == 100
    same = build(40)  # under the same random state
    for ours, theirs in zip(model.parameters(), same.parameters(), strict=True):
        assert ours.device.type == "cpu" and torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make("Transformer", **TOKENS, **VECTORS), "input_dim = 3, vocab_size = 40; accepted is one of input_dim"),
        (lambda: make("GRU", **TOKENS, positions="rotary"), "positions = 'rotary'; accepted is one of 'none', 'learned'"),
        (lambda: make("GRU", **TOKENS, head="language_model"), "accepted is vocab_size and a causal model"),
        (
            lambda: BaselineConfig(**SMALL, **TOKENS, head="language_model", causal=True),
            "output_dim = 5, vocab_size = 40; accepted",
        ),
        (lambda: make("GRU", **TOKENS, token_dim=0), "BaselineConfig: token_dim = 0; accepted is a whole number, at least 1"),
        (
            lambda: make("Transformer", **TOKENS, num_heads=3),
            "token_dim = 16, num_heads = 3; accepted is token_dim a multiple of 2",
        ),
        (lambda: make("GRU", **TOKENS)(torch.zeros(2, 3, 3).long()), r"inputs = \[2, 3, 3\]; accepted is \[B, T"),
        (lambda: make("GRU", **TOKENS)(torch.zeros(2, 0).long()), "T = 0; accepted is at least one token"),
        (lambda: make("GRU", **VECTORS)(torch.zeros(2, 3, 4)), r"inputs = \[2, 3, 4\]; accepted is \[B, T"),
        (
            lambda: match_parameters(lambda n: nn.Linear(n, 1, bias=False), 100, [60, 94]),
            "100 parameters within 5 %; nearest is width 94",
        ),
        (lambda: match_parameters(lambda n: nn.Linear(n, 1), 100, []), "no width was given"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
