"""BlockFFN: router and layer against their definitions, path against path, objectives and measures against brute force."""

import math

import pytest
import torch

from nsm_support.blockffn import ffn
from nsm_support.blockffn.ffn import PATHS, BlockFFN, blockffn_reference, blockffn_sparse
from nsm_support.blockffn.objectives import chunk_sparsity, chunk_sparsity_loss, dead_experts, locality_loss, token_sparsity
from nsm_support.blockffn.router import BlockRouter, Routed
from tests.support.draws import draw

LENGTHS = (1, 7, 200)
D, E, F = 6, 5, 3


def scores_of(T, active, seed=0):
    """Scores [T,E] of which the share `active` is above 0; block 2 is unused unless all are used, block 4 used by all."""
    z = draw(T, E, seed=seed)
    scores = z.abs() + 0.1
    scores[z > torch.special.ndtri(torch.tensor(active, dtype=torch.float64))] = 0
    if 0 < active < 1:
        scores[:, 2], scores[:, 4] = 0, 1.5
    return scores


def inputs_of(T, active):
    return [draw(T, D, seed=1), scores_of(T, active), draw(E * F, D, seed=2), draw(D, E * F, seed=3)]


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = BlockFFN(D, E, F).double()
    with torch.no_grad():
        layer.router_norm.weight.copy_(draw(E, seed=5))  # negative ones too: a block is used where its score is not 0
    return layer


@pytest.fixture(params=["by block", "one call"])
def way(request, monkeypatch):
    """Both ways of the sparse path for more than one token, whatever the number of pairs."""
    monkeypatch.setattr(ffn, "FEW", {"by block": -1, "one call": 1_000_000}[request.param])
    return request.param


def assert_sparse_is_dense(inputs, **close):
    """Values, and the gradients of all four inputs."""
    inputs = [v.requires_grad_() for v in inputs]
    pull = draw(*inputs[0].shape, seed=4).to(inputs[0].dtype)
    y, wanted = blockffn_sparse(*inputs), blockffn_reference(*inputs)
    torch.testing.assert_close(y, wanted, **close)
    grads = list(torch.autograd.grad(y, inputs, pull))
    wanted_grads = list(torch.autograd.grad(wanted, inputs, pull))
    wanted_grads[1] = wanted_grads[1].where(inputs[1] != 0, 0)  # no gradient for a score of 0, as documented
    for name, got, right in zip(("x", "scores", "up", "down"), grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, right, msg=lambda text, name=name: f"{name}: {text}", **close)
    with torch.no_grad():  # T = 1 has a way of its own
        torch.testing.assert_close(blockffn_sparse(*inputs), wanted, **close)


@pytest.mark.parametrize("active", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("T", LENGTHS)
def test_sparse_path_is_the_definition(T, active):
    assert_sparse_is_dense(inputs_of(T, active))


@pytest.mark.parametrize("active", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("T", LENGTHS)
def test_both_ways_of_the_sparse_path_are_the_definition(T, active, way):
    """In single precision, at sizes that a grouped product takes."""
    inputs = [draw(T, 8, seed=1), scores_of(T, active), draw(E * 12, 8, seed=2), draw(8, E * 12, seed=3)]
    inputs = [v.float() for v in inputs]
    assert_sparse_is_dense(inputs, rtol=1e-4, atol=1e-4)
    made_by = blockffn_sparse(*inputs).grad_fn.next_functions[0][0].name()  # before the last view
    assert ("ByBlock" in made_by) == (way == "by block")


def test_the_definition_is_the_formula():
    """Element by element: y_d = Σ_e Σ_f W_down[d, eF+f] · silu(Σ_d' W_up[eF+f, d'] x_d') · r_e."""
    x, scores, up, down = inputs_of(2, 0.5)
    y = blockffn_reference(x, scores, up, down)
    for t in range(2):
        wanted = [0.0] * D
        for e in range(E):
            for f in range(F):
                z = sum(float(up[e * F + f, d] * x[t, d]) for d in range(D))
                h = z / (1 + math.exp(-z)) * float(scores[t, e])
                wanted = [w + float(down[d, e * F + f]) * h for d, w in enumerate(wanted)]
        assert y[t].tolist() == pytest.approx(wanted)


def test_gradients_only_where_asked_for():
    """A frozen layer, and inputs without gradient: what is asked for is the same."""
    whole = [v.requires_grad_() for v in inputs_of(7, 0.5)]
    wanted = torch.autograd.grad(blockffn_sparse(*whole).square().sum(), whole)
    for i in range(4):
        inputs = [v.detach().requires_grad_(i == j) for j, v in enumerate(whole)]
        (grad,) = torch.autograd.grad(blockffn_sparse(*inputs).square().sum(), inputs[i])
        torch.testing.assert_close(grad, wanted[i])


@pytest.mark.parametrize("T", [1, 7])
@pytest.mark.parametrize("grad", [False, True])
def test_sparse_path_touches_active_blocks_only(T, grad):
    x, scores, up, down = inputs_of(T, 0.5)
    wanted = blockffn_reference(x, scores, up, down)
    unused = (scores == 0).all(0).repeat_interleave(F)
    assert unused.any()
    up[unused], down[:, unused] = math.nan, math.nan
    y = blockffn_sparse(x.requires_grad_(grad), scores, up, down)
    torch.testing.assert_close(y, wanted)
    if grad:
        assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("grad", [False, True])
def test_a_forced_path_is_the_one_that_runs(layer, grad):
    """At sizes where "auto" is dense: a block that no token uses poisons the dense path alone."""
    x = draw(7, D, seed=1).abs().requires_grad_(grad)
    with torch.no_grad():
        layer.router_proj.weight[0] = -1
        layer.down_proj[:, :F] = math.nan
    finite = {}
    for layer.path in PATHS:
        with torch.set_grad_enabled(grad):
            finite[layer.path] = bool(layer(x).isfinite().all())
    assert finite == {"auto": False, "dense": False, "sparse": True}


@pytest.mark.parametrize(("dim", "width"), [(6, 4), (8, 3), (5, 5)])
def test_sizes_that_a_grouped_product_does_not_take(dim, width):
    """In single precision too, where rows are not whole 16 bytes."""
    inputs = [draw(7, dim, seed=1), scores_of(7, 0.5), draw(E * width, dim, seed=2), draw(dim, E * width, seed=3)]
    assert_sparse_is_dense([v.float() for v in inputs], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["rms", "sum", "none"])
@pytest.mark.parametrize("T", LENGTHS)
def test_layer_has_the_same_gradients_on_all_paths(T, norm):
    """All parameters, the router's included, and the tokens: no gradient is lost with those of the scores of 0."""
    torch.manual_seed(0)
    layer = BlockFFN(D, E, F, norm_after_router=norm).double()
    results = {}
    for layer.path in PATHS:
        x = draw(T, D, seed=1).requires_grad_()
        y, routed = layer.forward_with_routing(x)
        layer.zero_grad()
        (y.sin().sum() + routed.scores.square().sum()).backward()
        results[layer.path] = {"y": y, "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    for path in ("auto", "sparse"):
        for name, value in results[path].items():
            torch.testing.assert_close(value, results["dense"][name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("T", LENGTHS)
def test_router_is_its_formula_in_value_and_gradient(T):
    router = BlockRouter(D, E, eps=1e-3).double()
    with torch.no_grad():
        router.router_norm.weight.copy_(draw(E, seed=5))
    x = draw(T, D, seed=1).requires_grad_()
    given = [x, router.router_proj.weight, router.router_norm.weight]
    routed = router(x)
    logits = torch.einsum("td,ed->te", x, given[1])
    scores = torch.where(logits > 0, logits, 0.0)
    scores = scores / ((scores**2).sum(-1, keepdim=True) / E + 1e-3) ** 0.5 * given[2]
    torch.testing.assert_close(routed, Routed(scores, logits))
    pull = draw(T, E, seed=6)
    grads = [torch.autograd.grad(v, given, pull, retain_graph=True) for v in (routed.scores, scores)]
    torch.testing.assert_close(*grads)


def test_other_norms_of_the_router():
    for norm, wanted in (("sum", [0.25, 0.0, 1.75]), ("none", [1.0, 0.0, 7.0])):
        router = BlockRouter(3, 3, norm_after_router=norm, norm_scale=0.5)
        router.router_proj.weight.data = torch.eye(3)
        assert list(router.state_dict()) == ["router_proj.weight"]
        assert router(torch.tensor([1.0, -2.0, 7.0])).scores.tolist() == pytest.approx(wanted, rel=1e-5)


def test_a_token_without_blocks_and_its_gradients_are_finite(layer):
    with torch.no_grad():
        layer.router_proj.weight.copy_(-torch.ones(E, D))
    x = torch.ones(1, D, dtype=torch.float64, requires_grad=True)
    for layer.path in PATHS:
        y, routed = layer.forward_with_routing(x)
        assert (routed.scores == 0).all() and (y == 0).all()
        layer.zero_grad()
        y.sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("path", PATHS)
def test_any_leading_axes_and_memory_layout(layer, path):
    x = draw(3, D, 4).mT  # [3, 4, D], not contiguous
    layer.path = "dense"
    wanted = torch.stack([torch.stack([layer(token) for token in row]) for row in x])
    layer.path = path
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer(x[0, 0]), wanted[0, 0])
    y, routed = layer.forward_with_routing(x)
    assert torch.equal(y, layer(x)) and torch.equal(routed.scores, layer.route(x).scores)


@pytest.mark.parametrize("path", PATHS)
def test_no_tokens_give_no_outputs(path):
    layer = BlockFFN(256, 32, 128, path=path)
    y = layer(torch.zeros(2, 0, 256))
    assert y.shape == (2, 0, 256)
    y.sum().backward()
    assert layer.up_proj.grad.abs().max() == 0


def sparse_layer(sparsity, D=256, E=32, F=128):
    """A layer, and a function that draws tokens for which that share of its blocks is unused."""
    torch.manual_seed(0)
    layer = BlockFFN(D, E, F)
    with torch.no_grad():
        layer.router_proj.weight[:, 0] = -torch.special.ndtri(torch.tensor(sparsity))

    def tokens(T):
        x = torch.randn(T, D, generator=torch.Generator().manual_seed(T))
        x[:, 0] = 1
        return x

    return layer, tokens


@torch.no_grad()
def test_auto_takes_the_sparse_path_where_it_wins():
    """Where few blocks are in use for many tokens or for one; the last block, used by no token, tells which path ran."""
    taken = {}
    for sparsity in (0.9, 0.1):
        layer, tokens = sparse_layer(sparsity)
        layer.router_proj.weight[-1] = 0
        layer.down_proj[:, -128:] = math.nan
        for T in (1, 2, 64, 512):
            x = tokens(T)
            taken[sparsity, T] = bool(layer(x).isfinite().all())
            assert layer.sparse_wins(layer.route(x).scores) == taken[sparsity, T]
    assert [taken[0.9, T] for T in (1, 64, 512)] == [True] * 3
    assert [taken[0.1, T] for T in (1, 2, 64)] == [False] * 3


def test_what_is_not_accepted_is_named():
    for call, message in (
        (lambda: BlockFFN(4, 4, 2.0), "expert_size = 2.0; accepted is a whole number, at least 1"),
        (lambda: BlockRouter(4, 4, norm_after_router=True), "norm_after_router = True; accepted is one of 'rms', 'sum', 'none'"),
        (lambda: BlockFFN(4, 4, 4, path="fast"), "path = 'fast'; accepted is one of 'auto', 'dense', 'sparse'"),
        (lambda: BlockFFN(4, 4, 4)(torch.zeros(2, 5)), r"BlockFFN: tokens = \[2, 5\]; accepted is \[..., D=4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def routed_of(*shape, seed=0):
    logits = draw(*shape, seed=seed) - 0.5
    return Routed(logits.relu(), logits)


def test_locality_is_the_cross_entropy_of_neighbours():
    routed = routed_of(2, 5, 3)
    z, total = routed.logits, []
    for b in range(2):
        for t in range(4):
            for e in range(3):
                p, q = (1 / (1 + math.exp(-2.0 * z[b, i, e])) for i in (t, t + 1))
                total.append(-q * math.log(p) - (1 - q) * math.log(1 - p))
    assert locality_loss(routed, 2.0).item() == pytest.approx(sum(total) / len(total))
    same = Routed(z[:1, :1].expand(1, 5, 3), z[:1, :1].expand(1, 5, 3))
    other = Routed(z * 0, torch.cat((z[:, :1], -z[:, :1]), 1))
    assert locality_loss(same).item() < 1e-6 and locality_loss(other).item() > 1


def test_locality_draws_both_neighbours_together():
    z = torch.tensor([[0.3], [-0.2]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(locality_loss(Routed(z.relu(), z), 5.0), z)
    assert grad[0] > 0 > grad[1]
    assert torch.autograd.gradcheck(lambda z: locality_loss(Routed(z, z), 2.0), draw(4, 3).requires_grad_())


@pytest.mark.parametrize(("T", "size"), [(6, 3), (7, 3), (5, 5), (4, 1)])
def test_chunk_loss_is_its_definition(T, size):
    routed = routed_of(2, T, 4)
    values = []
    for b in range(2):
        for start in range(0, T - T % size, size):
            for e in range(4):
                log = 0.0
                for t in range(start, start + size):
                    z = routed.logits[b, t].clamp(min=0)
                    log += math.log(1 - float(z[e] / (z.sum() + 1e-5)))
                values.append(math.exp(log))
    assert chunk_sparsity_loss(routed, size).item() == pytest.approx(1 - sum(values) / len(values))


def test_chunk_loss_has_a_gradient_where_one_block_takes_all():
    logits = torch.tensor([[1e8, -1.0], [3e8, 1e8]], requires_grad=True)  # p is exactly 1 for the first token
    (grad,) = torch.autograd.grad(chunk_sparsity_loss(Routed(logits.relu(), logits), 2), logits)
    assert grad.isfinite().all() and grad[1, 1] > 0
    inputs = (draw(2, 6, 4) + 0.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: chunk_sparsity_loss(Routed(z, z), 3), inputs)


def test_measures_of_sparsity_against_counting():
    scores = routed_of(2, 11, 6).scores
    scores[..., 4] = 0
    for b in range(2):
        wanted = [sum(v == 0 for v in token.tolist()) / 6 for token in scores[b]]
        assert token_sparsity(scores)[b].tolist() == pytest.approx(wanted)
        for size in (1, 4, 11):
            parts = [scores[b, start : start + size] for start in range(0, 11 - 11 % size, size)]
            unions = [{e for token in part.tolist() for e, score in enumerate(token) if score} for part in parts]
            assert chunk_sparsity(scores, size)[b].tolist() == pytest.approx([1 - len(union) / 6 for union in unions])
    dead = dead_experts(scores)
    assert dead.tolist() == [e == 4 for e in range(6)]
    torch.testing.assert_close(token_sparsity(scores) * 6 - 1, token_sparsity(scores[..., ~dead]) * 5)
    assert token_sparsity(-scores).tolist() == token_sparsity(scores).tolist()  # a negative score is a block in use


def test_chunks_that_do_not_fit_are_refused():
    for size in (0, 6, 2.0, True):
        with pytest.raises(ValueError, match=f"a chunk has from 1 to 5 tokens here, as many as there are; got {size}"):
            chunk_sparsity(torch.zeros(5, 3), size)
    with pytest.raises(ValueError, match="a chunk has from 1 to 5 tokens"):
        chunk_sparsity_loss(routed_of(5, 3))
    with pytest.raises(ValueError, match="it takes 2 or more; got 1"):
        locality_loss(routed_of(2, 1, 3))
