"""The BlockFFN language model, its attention at chosen places, its dense twin, its loss; and perplexity."""

import math

import pytest
import torch
import torch.nn.functional as F

from nsm_support.blockffn.attention import CHUNK, Attention, LatentAttention
from nsm_support.blockffn.model import BlockFFNConfig, BlockFFNModel, dense_twin, losses
from nsm_support.blockffn.objectives import chunk_sparsity_loss, locality_loss
from nsm_support.costs import count_parameters
from nsm_support.metrics import perplexity, token_losses
from nsm_support.training import TrainingConfig, fit
from tests.support.draws import numbers

DENSE = {"ffn_type": "dense", "intermediate_size": 20}


def make(seed=0, **options):
    sizes = {"vocab_size": 23, "token_dim": 32, "num_layers": 3, "num_experts": 6, "expert_size": 5}
    torch.manual_seed(seed)
    return BlockFFNModel(BlockFFNConfig(**sizes | {"dim_model_base": 16} | options))


def test_untrained_model_knows_nothing_and_all_of_it_is_trained():
    model = make(locality_weight=1e-3, chunk_sparsity_weight=5e-2, sparsity_chunk=4)
    loss = losses(model, (numbers(8, 16), numbers(8, 16, seed=1)))
    assert abs(loss.cross_entropy.item() - math.log(23)) < 0.3
    loss.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_loss_is_the_sum_of_its_parts_by_their_weights():
    options = {"locality_weight": 0.3, "chunk_sparsity_weight": 0.7, "sparsity_chunk": 4}
    model, batch = make(**options), (numbers(2, 9), numbers(2, 9, seed=1))
    loss = losses(model, batch)
    logits, routing = model.trace(batch[0])
    ce = F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())
    near = torch.stack([locality_loss(routed) for routed in routing]).mean()
    chunks = torch.stack([chunk_sparsity_loss(routed, 4) for routed in routing]).mean()
    torch.testing.assert_close(torch.stack(loss), torch.stack((ce + 0.3 * near + 0.7 * chunks, ce, near, chunks)))
    plain = make()
    assert torch.equal(losses(plain, batch).total, losses(plain, batch).cross_entropy)
    assert losses(make(**DENSE, **options), batch).total == losses(make(**DENSE, **options), batch).cross_entropy


@pytest.mark.parametrize("active", [1.5, 4.0])
def test_dense_twin_has_as_many_parameters_as_a_token_uses(active):
    config = BlockFFNConfig(vocab_size=23, token_dim=32, num_experts=6, expert_size=40, locality_weight=1e-3)
    twin = dense_twin(config, active)
    model, dense = BlockFFNModel(config), BlockFFNModel(twin)
    router = model.layers[0].mlp.router_proj.weight.numel() + model.layers[0].mlp.router_norm.weight.numel()
    used = router + active * 2 * 32 * 40
    assert abs(count_parameters(dense.layers[0].mlp) - used) <= 32, "within half a unit of 2·D"
    assert count_parameters(dense.layers[0].self_attn) == count_parameters(model.layers[0].self_attn)
    assert twin.locality_weight == 0 and twin.token_dim == 32 and twin.num_layers == config.num_layers


@pytest.mark.parametrize("kind", ["vanilla", "mla"])
@pytest.mark.parametrize("T", [1, 63, 2 * CHUNK + 9])
def test_attention_at_chosen_places_equals_those_of_all(kind, T):
    torch.manual_seed(0)
    attention = Attention(24, 4, 2, 10_000.0) if kind == "vanilla" else LatentAttention(24, 4, 5, 4, 9, 7, 10_000.0)
    attention = attention.double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, T, 24, generator=generator, dtype=torch.float64, requires_grad=True)
    Q = max(1, 2 * T // 3)
    places = torch.stack([torch.randperm(T, generator=generator)[:Q].sort().values for _ in range(2)])
    some = attention(x, places)
    every = attention(x).gather(1, places[..., None].expand(-1, -1, 24))
    torch.testing.assert_close(some, every)
    pull = torch.randn(some.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(y, [x, *attention.parameters()], pull) for y in (some, every)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, DENSE], ids=["block", "dense"])
def test_it_learns(options):
    """Tokens alternate between two that the row is made of: what comes next is known from the third token on."""
    model = make(locality_weight=1e-4, **options)

    def sample(generator, batch_size):
        pair = torch.randint(23, (batch_size, 2), generator=generator)
        rows = pair.repeat(1, 6)
        return rows[:, :-1], rows[:, 1:]

    def tail(model):
        inputs, targets = sample(torch.Generator().manual_seed(9), 64)
        return {"tail": F.cross_entropy(model(inputs)[:, 3:].mT, targets[:, 3:])}

    config = TrainingConfig(steps=100, batch_size=24, learning_rate=8e-3)
    history = fit(model, sample, lambda model, batch: losses(model, batch).total, config, evaluate=tail)
    assert history.records[0]["tail"] > 2.8 and history.records[-1]["tail"] < 0.5  # a guess between the two is 0.69


def uniform(tokens):
    return torch.zeros(*tokens.shape, 7, dtype=torch.float64)


@pytest.mark.parametrize(("window", "stride"), [(4, None), (4, 1), (5, 3), (100, None), (1, 1)])
def test_uniform_model_has_the_perplexity_of_its_vocabulary(window, stride):
    scored = token_losses(uniform, numbers(29, below=7), window=window, stride=stride)
    assert scored.shape == (28,)
    assert perplexity(scored) == pytest.approx(7, rel=1e-12)


@pytest.mark.parametrize(
    ("n", "window", "stride"), [(2, 4, 4), (5, 4, 4), (6, 4, 4), (14, 4, 4), (14, 5, 2), (15, 6, 1), (13, 3, 3), (14, 7, 6)]
)
def test_every_token_is_scored_once_as_one_by_one(n, window, stride):
    model, tokens = make().double().eval(), numbers(n)
    scored = token_losses(model, tokens, window=window, stride=stride, batch_size=2)
    expected = []
    for t in range(1, n):  # the first window that holds token t as a target: what the definition scores it in
        start = 0
        while start + window < t:
            start += stride
        start = min(start, max(0, n - 1 - window))
        with torch.no_grad():
            logits = model(tokens[None, start:t])[0, -1]
        expected.append(-logits.log_softmax(-1)[tokens[t]])
    torch.testing.assert_close(scored, torch.stack(expected))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make(attention_type="flash"), "attention_type = 'flash'; accepted is one of 'vanilla', 'mla'"),
        (lambda: make(ffn_type="moe"), "ffn_type = 'moe'; accepted is one of 'block', 'dense'"),
        (lambda: make(ffn_type="dense"), "intermediate_size = None"),
        (lambda: make(num_heads=5), "multiple"),
        (lambda: make(token_dim=12), "even"),
        (lambda: make(locality_weight=-1.0), "0 or more"),
        (lambda: make(norm_after_router="layer"), "'rms', 'sum', 'none'"),
        (lambda: make()(numbers(5)), r"\[B, T\]"),
        (lambda: token_losses(uniform, numbers(9), window=0), "window"),
        (lambda: token_losses(uniform, numbers(9), window=4, stride=5), "stride"),
        (lambda: token_losses(uniform, numbers(9), window=4, stride=0), "stride"),
        (lambda: token_losses(uniform, numbers(1), window=4), "at least 2"),
        (lambda: token_losses(uniform, numbers(2, 5), window=4), r"\[n\]"),
    ],
)
def test_what_does_not_fit_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
