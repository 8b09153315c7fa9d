"""States: initial values, importance, pruning and allocation with the optimiser in step."""

import math

import pytest
import torch

from nsm_support.nsm import Importance, NSMLayer, StateManager, TokenToStateRouter


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return NSMLayer(6, 8, 16, window=4, max_states=8).double()


def train(layer, optimizer, steps=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randn(2, 9, 16, generator=generator, dtype=torch.float64)
        out, states = layer(tokens)
        optimizer.zero_grad()
        (out.square().mean() + states.square().mean()).backward()
        optimizer.step()


def test_initial_states_are_learned_and_distinct():
    manager = StateManager(5, 7)
    states = manager(batch_size=3)
    assert states.shape == (3, 5, 7)
    assert torch.pdist(states[0]).min() > 0.5
    assert torch.equal(states[0], states[2])
    states.sum().backward()
    assert torch.equal(manager.initial.grad, torch.full((5, 7), 3.0))


def test_scores_are_fair_shares():
    importance = Importance(4)
    assert torch.equal(importance.scores(), torch.ones(4))
    with torch.no_grad():
        importance.log_importance.copy_(torch.tensor([0.0, math.log(2), math.log(4), -100.0]))
    torch.testing.assert_close(importance.scores(), torch.tensor([4 / 7, 8 / 7, 16 / 7, 0.0]))


def test_mean_mass_follows_the_mass_in_training_only():
    importance = Importance(2, momentum=0.5)
    mass = torch.tensor([[3.0, 1.0]])
    importance.eval()
    importance.observe(mass)
    assert importance.mean_mass.tolist() == [0.5, 0.5]
    importance.train()
    importance.observe(mass)
    assert importance.mean_mass.tolist() == [0.625, 0.375]


def test_a_router_and_a_manager_share_one_importance():
    router = TokenToStateRouter(16, 8, 4)
    manager = StateManager(4, 8, importance=router.importance)
    manager.prune([1, 3])
    assert router.num_states == manager.num_states == 2
    assert router.log_importance is manager.importance.log_importance
    assert router(torch.randn(1, 3, 16), manager(batch_size=1))[1].shape == (1, 3, 2)


def test_importance_has_a_gradient_and_moves_routing(layer):
    tokens = torch.randn(2, 9, 16, dtype=torch.float64)
    layer(tokens)[0].square().sum().backward()
    assert layer.router.log_importance.grad.abs().min() > 0
    before = layer.trace(tokens).weights[..., 2].mean()
    with torch.no_grad():
        layer.router.log_importance[2] += 2
    assert layer.trace(tokens).weights[..., 2].mean() > before * 2


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_prune_keeps_rows_and_moments(layer, optimizer_class):
    options = {} if optimizer_class is torch.optim.AdamW else {"momentum": 0.9}
    optimizer = optimizer_class(layer.parameters(), lr=0.01, **options)
    train(layer, optimizer)
    old, old_moments = layer.state_manager.initial, dict(optimizer.state[layer.state_manager.initial])
    pruned = layer.state_manager.prune([4, 0, 5], optimizer=optimizer)
    new = layer.state_manager.initial
    assert pruned.kept.tolist() == [0, 4, 5] and pruned.removed == 3
    assert torch.equal(new, old[[0, 4, 5]]) and torch.equal(new.grad, old.grad[[0, 4, 5]])
    assert old not in optimizer.state
    for name, moment in old_moments.items():
        now = optimizer.state[new][name]
        same = torch.is_tensor(moment) and moment.shape == old.shape
        assert torch.equal(now, moment[[0, 4, 5]]) if same else now == moment, name
    assert layer.router.log_importance.shape == layer.router.importance.mean_mass.shape == (3,)
    train(layer, optimizer)
    assert not torch.equal(new, old[[0, 4, 5]]), "the optimiser no longer moves the states"


def test_prune_by_threshold_reaches_real_scores_and_keeps_one():
    manager = StateManager(4, 3, prune_threshold=0.3)
    assert manager.prune().removed == 0, "equal states all have a fair share"
    with torch.no_grad():
        manager.importance.log_importance.copy_(torch.tensor([0.0, -3.0, 0.2, -0.1]))
    assert manager.prune().kept.tolist() == [0, 2, 3]
    assert manager.prune(threshold=100.0).kept.tolist() == [1], "the best one stays, whatever the threshold"
    assert manager.num_states == 1 and manager.prune(threshold=100.0).removed == 0


def test_prune_by_mass():
    manager = StateManager(3, 2)
    manager.importance.mean_mass.copy_(torch.tensor([0.6, 0.05, 0.35]))
    assert manager.prune(by="mass").kept.tolist() == [0, 2]
    torch.testing.assert_close(manager.importance.mean_mass.sum(), torch.tensor(1.0))


def test_pruning_while_a_loss_is_still_alive(layer):
    """A graph from before the pruning must not spoil the next backward pass."""
    tokens = torch.randn(2, 9, 16, dtype=torch.float64)
    loss = layer(tokens)[0].sum()
    layer.state_manager.prune([0, 1])
    layer(tokens)[0].sum().backward()
    assert layer.state_manager.initial.grad.shape == (2, 8)
    assert loss.requires_grad


def test_allocate_writes_the_given_vector(layer):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    train(layer, optimizer)
    vector = torch.arange(8.0)
    index = layer.state_manager.allocate(vector, optimizer=optimizer)
    assert index == 6 and layer.num_states == 7
    assert torch.equal(layer.state_manager.initial[6], vector.double())
    torch.testing.assert_close(layer.state_manager.get_importance_scores()[6].item(), 1.0)
    assert optimizer.state[layer.state_manager.initial]["exp_avg"][6].abs().sum() == 0
    train(layer, optimizer)
    assert not torch.equal(layer.state_manager.initial[6], vector.double())


def test_allocate_splits_the_busiest_state(layer):
    """Without noise, parent and child share what the parent had: what tokens read stays the same."""
    layer.router.importance.mean_mass[3] = 0.9
    tokens, states = torch.randn(2, 9, 16, dtype=torch.float64), layer.state_manager(batch_size=2)
    before, weights = layer.router(tokens, states)
    layer.state_manager.allocate(noise=0.0)
    after, split = layer.router(tokens, layer.state_manager(batch_size=2))
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(split[..., 3] + split[..., 6], weights[..., 3])
    layer.state_manager.allocate(generator=torch.Generator().manual_seed(0))
    assert (layer.state_manager.initial[7] - layer.state_manager.initial[3]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StateManager(), "takes state_dim and one of num_states, initial_states and max_states"),
        (lambda: StateManager(4, 8, initial_states=5), r"num_states \(4\) and initial_states \(5\) name the same"),
        (lambda: StateManager(4, 8, max_states=3), r"max_states \(3\) is below the number of states"),
        (lambda: StateManager(4, 8, importance=Importance(5)), "has 5 states, this manager 4"),
        (lambda: StateManager(4, 8)(), "give initial_states .* or batch_size"),
        (lambda: StateManager(4, 8)(torch.zeros(2, 4, 7)), r"initial_states = \[2, 4, 7\]; accepted is \[B, S=4, M=8\]"),
        (lambda: StateManager(4, 8, max_states=4).allocate(), r"all 4 states \(max_states\) are in use"),
        (lambda: StateManager(4, 8).prune([4]), r"keep takes at least one index of 0 … 3, got \[4\]"),
        (lambda: StateManager(4, 8, max_states=5).allocate(torch.zeros(7)), r"vector = \[7\]; accepted is \[M=8\]"),
    ],
)
def test_errors_say_what_is_accepted(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_foreign_optimizer_is_refused():
    manager = StateManager(4, 8)
    half = torch.optim.SGD([manager.initial], lr=0.1)
    with pytest.raises(ValueError, match="the optimizer does not hold this manager's log_importance"):
        manager.prune([0], optimizer=half)
    assert manager.num_states == manager.importance.num_states == 4, "a refused pruning leaves everything as it was"
