"""Models: heads, streaming, padding, pruning, learning; and the first notebooks' own calls."""

import re

import pytest
import torch
import torch.nn.functional as F

from nsm_book import ROOT
from nsm_support.nsm import NSM, NSMConfig, NSMLayer, SimpleNSM, StateManager, TokenToStateRouter

SMALL = {"token_dim": 16, "state_dim": 12, "num_states": 5, "window": 4, "num_layers": 2}


def make(seed=0, **options):
    torch.manual_seed(seed)
    return NSM(NSMConfig(**(SMALL | options)))


def numbers(*shape, below=11, seed=0):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("head", ["classification", "labelling"])
def test_padding_changes_nothing(head, chunk):
    model = make(input_dim=6, output_dim=3, head=head, chunk=chunk).double()
    inputs, lengths = torch.randn(2, 9, 6, dtype=torch.float64), torch.tensor([9, 5])
    out = model(inputs, torch.arange(9) < lengths[:, None])
    for b, length in enumerate(lengths):
        alone = model(inputs[b : b + 1, :length])[0]
        torch.testing.assert_close(out[b] if head == "classification" else out[b, :length], alone)


def test_trace_gives_the_weights_of_every_layer_and_head():
    for chunk in (None, 1, 4):
        model = make(input_dim=6, output_dim=3, chunk=chunk, top_k=3)
        inputs = torch.randn(2, 9, 6)
        trace = model.trace(inputs)
        routing = model.routing(inputs)
        assert [tuple(w.shape) for w in routing] == [(2, 4, 9, 5)] * 2
        for weights, layer in zip(routing, trace.layers, strict=True):
            assert torch.equal(weights, layer.weights)
            assert (weights > 0).sum(-1).unique().tolist() == [3]
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9))
            assert layer.share.shape == (2, 9, 1) and layer.states.shape == (2, 5, 12)


def test_order_matters_only_where_positions_or_a_window_tell_it():
    inputs = torch.randn(1, 9, 6, dtype=torch.float64)
    flipped = inputs.flip(1)
    blind = make(input_dim=6, output_dim=3, positions="none", mix="read").double()
    torch.testing.assert_close(blind(flipped), blind(inputs))
    for options in ({"positions": "learned", "max_length": 9, "mix": "read"}, {"positions": "rotary"}, {"chunk": 1}):
        model = make(input_dim=6, output_dim=3, **options).double()
        assert (model(flipped) - model(inputs)).abs().max() > 1e-4, options


def test_pruning_a_model_with_its_optimizer_and_loading_it_again():
    model = make(input_dim=6, output_dim=3, max_states=6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    inputs, labels = torch.randn(8, 9, 6), numbers(8, below=3)

    def step():
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    first = step()
    pruned = model.prune([[0, 3], [1, 2, 4]], optimizer=optimizer)
    assert [p.removed for p in pruned] == [3, 2]
    assert model.config.num_states == (2, 3) and [w.shape[-1] for w in model.routing(inputs)] == [2, 3]
    assert model.allocate(0, optimizer=optimizer) == 2
    assert model.config.num_states == (3, 3)
    for _ in range(30):
        last = step()
    assert last < first * 0.7, "the optimiser no longer trains the model"
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} and len(optimizer.state) == len(held)
    again = NSM(model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(inputs), model.eval()(inputs))


@pytest.mark.parametrize(
    "options",
    [
        {"input_dim": 6, "output_dim": 4},
        {"input_dim": 6, "output_dim": 4, "gate_type": "lstm", "top_k": 2, "mix": "read"},
        {"vocab_size": 7, "output_dim": 4, "head": "labelling", "chunk": 4, "mix": "sum", "gate_type": "lstm"},
        {"vocab_size": 7, "head": "language_model", "chunk": 1, "positions": "none"},
        "simple",
    ],
)
def test_every_model_overfits_32_samples(options):
    torch.manual_seed(0)
    if options == "simple":
        options, model = {"input_dim": 6, "output_dim": 4}, SimpleNSM(6, 32, 5, 4)
    else:
        model = NSM(NSMConfig(**({"token_dim": 32, "state_dim": 32, "num_states": 4, "window": 4} | options)))
    head = options.get("head", "classification")
    if "vocab_size" not in options:
        inputs, labels = torch.randn(32, 6, 6), numbers(32, below=4, seed=1)
    else:
        inputs, labels = numbers(32, 6, below=7), numbers(32, 6, below=4, seed=1)
        # Two unlike tokens tell the samples apart; a token repeated from the start on would not tell where it stands.
        inputs[:, 0] = torch.arange(32) % 7
        inputs[:, 1] = (torch.arange(32) // 7 + inputs[:, 0] + 1) % 7
        if head == "language_model":
            labels = inputs.roll(-1, 1)

    def outputs():
        return model(inputs) if head == "classification" else model(inputs)[:, 1:-1]

    labels = labels if head == "classification" else labels[:, 1:-1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0)
    for _ in range(300):
        out = outputs()
        if (out.argmax(-1) == labels).all():
            return
        optimizer.zero_grad()
        F.cross_entropy(out.movedim(-1, 1), labels).backward()
        optimizer.step()
    pytest.fail(f"after 300 steps {(out.argmax(-1) == labels).float().mean():.1%} are right")


def test_the_visualisation_notebooks_calls():
    """Model, router and manager as the routing notebook makes and uses them."""
    model = SimpleNSM(input_dim=128, state_dim=64, num_states=16, output_dim=10, gate_type="gru").to("cpu")
    router = TokenToStateRouter(token_dim=128, state_dim=64, num_states=16, num_heads=4).to("cpu")
    manager = StateManager(state_dim=64, max_states=16, initial_states=16, prune_threshold=0.3)
    tokens, states = torch.randn(4, 20, 128), torch.randn(4, 16, 64)
    assert model(tokens).shape == (4, 10)
    with torch.no_grad():
        _, weights = router(tokens, states)
        example = weights[0].cpu().numpy()
        scores = manager.get_importance_scores().cpu().numpy()
    assert example.shape == (20, 16) and scores.shape == (16,) and router.num_heads == 4
    assert abs(example.sum(-1) - 1).max() < 1e-5 and (scores == 1).all()
    assert example.std(0).max() > 0.01, "every token is routed alike"


def test_the_prototype_notebooks_calls():
    """Layer, manager and raw router as the prototype notebook makes and uses them."""
    tokens, layer = torch.randn(2, 10, 32), NSMLayer(5, 32, 32)
    updated, states = layer(tokens)
    assert updated.shape == tokens.shape and states.shape == (2, 5, 32)
    again, states = layer(updated, states)
    assert again.shape == tokens.shape
    assert StateManager(5, 32)(batch_size=2).shape == StateManager(5, 32)(torch.zeros(2, 5, 32)).shape == (2, 5, 32)
    with pytest.raises(ValueError, match="batch_size"):
        StateManager(5, 32)()
    unequal = NSMLayer(num_states=5, state_dim=24, token_dim=32)
    assert [tuple(x.shape) for x in unequal(tokens)] == [(2, 10, 32), (2, 5, 24)]


def test_the_readme_uses_the_package_as_it_is():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    with torch.no_grad():
        exec(code, names)
    assert names["logits"].shape == (2, 1000, 256)
    torch.testing.assert_close(names["step"], names["logits"][:, 19], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        (
            {"vocab_size": 7, "input_dim": None, "head": "language_model"},
            None,
            "causal = False; accepted is vocab_size and a causal",
        ),
        ({"positions": "sine"}, None, "positions = 'sine'; accepted is one of 'rotary', 'learned', 'none'"),
        ({"num_states": (4, 5, 6)}, None, r"num_states = \(4, 5, 6\), num_layers = 2; accepted is one number, or one per layer"),
        ({"output_dim": None}, None, "output_dim = None"),
        ({"positions": "learned", "max_length": 5}, lambda m: m(torch.randn(1, 6, 6)), "number of tokens = 6; .* max_length = 5"),
        ({}, lambda m: m(torch.randn(1, 5, 7)), r"inputs = \[1, 5, 7\]; accepted is \[B, T, input_dim=6\]"),
        ({}, lambda m: m.prune([[0]]), r"keep takes one list of indices per layer \(2\); got 1"),
        ({"mix": "local"}, lambda m: m.prune(), "mix 'local' has no states"),
    ],
)
def test_what_does_not_fit_is_refused(options, call, message):
    with pytest.raises(ValueError, match=message):
        model = make(**{"input_dim": 6, "output_dim": 3} | options)
        call(model)
