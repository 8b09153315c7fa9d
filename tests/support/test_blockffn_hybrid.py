"""Hybrids: the ends of α, skipped work, gates and their controls, calibration, distillation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nsm_support.blockffn.gates import MODES, Gate
from nsm_support.blockffn.hybrid import (
    GatedHybridLayer,
    MambaSidecar,
    attach,
    calibrate,
    detach,
    distil,
    distillation_errors,
    put_attention,
    recorded_alpha,
    tune,
)
from nsm_support.blockffn.model import BlockFFNConfig, BlockFFNModel
from nsm_support.blockffn.signals import RoutingExtractor
from nsm_support.training import TrainingConfig
from tests.support.draws import draw, numbers

CAUSAL = [mode for mode in MODES if not mode.startswith("shuffled")]


def make(seed=0, **options):
    sizes = {"vocab_size": 23, "token_dim": 32, "num_layers": 3, "num_experts": 6, "expert_size": 5}
    torch.manual_seed(seed)
    model = BlockFFNModel(BlockFFNConfig(**sizes | options)).double().eval()
    for layer in model.layers:
        layer.mlp.path = "dense"  # "auto" may choose by the other tokens, and round elsewhere
    return model


def sidecars(layers=(0, 1, 2), seed=1):
    torch.manual_seed(seed)
    return {i: MambaSidecar(32, state_dim=4).double() for i in layers}


def gated(mode, alpha=0.4, source="own", model=None, layers=(0, 1, 2), **options):
    """A hybrid whose gates are calibrated, and the tokens they are calibrated on."""
    model, tokens = model or make(), numbers(8, 21)
    attach(model, sidecars(layers), lambda i: Gate(mode, alpha, width=32, seed=i, **options).double(), source=source)
    if mode.startswith("learned"):
        for i in layers:
            nn.init.normal_(model.layers[i].gate.map.weight, generator=torch.Generator().manual_seed(i))
    calibrate(model, tokens)
    return model, tokens


class Forbidden(nn.Module):
    def forward(self, *given):
        raise AssertionError("this path was to be skipped")


def test_detached_model_is_the_base_bit_for_bit():
    model, tokens = make(), numbers(2, 9)
    layers, before, names = list(model.layers), model(tokens), set(model.state_dict())
    given = sidecars((0, 2))
    attach(model, given, lambda i: Gate("fixed", 0.5))
    assert isinstance(model.layers[2], GatedHybridLayer) and model.layers[1] is layers[1]
    assert (model(tokens) - before).abs().max() > 1e-3
    assert detach(model) == given
    assert all(a is b for a, b in zip(model.layers, layers, strict=True)) and set(model.state_dict()) == names
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("mode", MODES)
def test_alpha_zero_is_attention_bit_for_bit(mode):
    """Of "fixed" by its α; of the others by a threshold that no signal reaches. The sidecar does not run."""
    model, tokens = make(), numbers(8, 21)
    before = model(tokens)
    gated(mode, model=model)
    for layer in model.layers:
        layer.gate.alpha = 0.0
        layer.gate.threshold.fill_(torch.inf)
        if not mode.startswith("oracle"):
            layer.sidecar = Forbidden()
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("mode", MODES)
def test_alpha_one_is_the_sidecar_bit_for_bit(mode):
    model, tokens = gated(mode)
    pure = make()
    for layer, hybrid in zip(pure.layers, model.layers, strict=True):
        layer.self_attn = hybrid.sidecar
        hybrid.gate.alpha = 1.0
        hybrid.gate.threshold.fill_(-torch.inf)
        if not mode.startswith("oracle"):
            hybrid.layer.self_attn = Forbidden()
    assert torch.equal(model(tokens), pure(tokens))


def test_alpha_is_mambas_share_and_the_ffn_is_untouched():
    alpha, model, x = 0.3, make(), draw(2, 9, 32)
    layer, sidecar = model.layers[0], sidecars((0,))[0]
    out, routed = GatedHybridLayer(layer, sidecar, Gate("fixed", alpha))(x)
    h = layer.input_layernorm(x)
    mixed = (1 - alpha) * layer.self_attn(h) + alpha * sidecar(h)
    after = x + 1.4 / 3**0.5 * mixed
    torch.testing.assert_close(out, after + 1.4 / 3**0.5 * layer.mlp(layer.post_attention_layernorm(after)))
    torch.testing.assert_close(routed.scores, layer.mlp.route(layer.post_attention_layernorm(after)).scores)


@pytest.mark.parametrize("T", [1, 63])
@pytest.mark.parametrize("kind", ["vanilla", "mla"])
def test_skipped_queries_change_nothing_but_the_work(kind, T):
    """Each token's own path, as if both were computed and one chosen: value, and gradient."""
    latent = {"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "q_lora_rank": 9, "kv_lora_rank": 7}
    attention = make(attention_type=kind, **(latent if kind == "mla" else {})).layers[0].self_attn
    h, scanned = draw(5, T, 32).requires_grad_(), draw(5, T, 32, seed=1).requires_grad_()
    chosen = draw(5, T, seed=2) > 0.3
    chosen[0], chosen[1], chosen[2, T // 2] = True, False, True
    some = put_attention(attention, h, scanned, chosen)
    both = torch.where(chosen[..., None], attention(h), scanned)
    torch.testing.assert_close(some, both)
    assert torch.equal(some[~chosen], scanned[~chosen])
    pull, inputs = draw(5, T, 32, seed=3), [h, scanned, *attention.parameters()]
    for a, b in zip(*(torch.autograd.grad(y, inputs, pull) for y in (some, both)), strict=True):
        torch.testing.assert_close(a, b)


def test_queries_are_those_of_attentions_tokens_alone():
    model, tokens = gated("routing_hard", 0.7)
    sizes = []
    for layer in model.layers:
        layer.layer.self_attn.q_proj.register_forward_hook(lambda module, given, out: sizes.append(out.shape[1]))
        layer.layer.self_attn.o_proj.register_forward_hook(lambda module, given, out: sizes.append(out.shape[1]))
    with recorded_alpha(model) as record:
        model(tokens)
    fullest = [(~record[i][0]).sum(1).max().item() for i in range(3)]
    assert sizes == [n for n in fullest for _ in range(2)] and max(fullest) < 21


@pytest.mark.parametrize("mode", MODES)
def test_calibration_meets_the_mean(mode):
    for alpha in (0.25, 0.4, 0.8):
        model, tokens = gated(mode, alpha)
        with recorded_alpha(model) as record:
            out = model(tokens)
        assert torch.equal(model(tokens), out), "equal calls, equal bits"
        for i in range(3):
            [values] = record[i]
            assert values.shape == tokens.shape and values.dtype == (torch.bool if mode.endswith("hard") else torch.float64)
            reached = values.double().mean().item()
            assert abs(reached - alpha) <= (0.5 / tokens.numel() + 1e-9 if mode.endswith("hard") else 1e-6)


@pytest.mark.parametrize("mode", CAUSAL)
def test_causal_gates_do_not_see_later_tokens(mode):
    model, tokens = gated(mode)
    changed = tokens.clone()
    changed[:, 13:] = (changed[:, 13:] + 1) % 23
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :13], after[:, :13], rtol=1e-9, atol=1e-9)
    assert (before[:, 13:] - after[:, 13:]).abs().max() > 1e-3


def test_routing_gate_reads_the_layer_before_on_the_same_token():
    model, tokens = make(), numbers(8, 21)
    attach(model, sidecars((1, 2)), lambda i: Gate("routing_hard"))
    for i in (1, 2):
        model.layers[i].gate.threshold.fill_(0.5)
    with RoutingExtractor(model) as extractor, recorded_alpha(model) as record:
        activations = extractor(tokens)
    for i in (1, 2):
        sparsity = (activations[i - 1] == 0).double().mean(-1)
        assert torch.equal(record[i][0], sparsity >= 0.5) and 0.1 < record[i][0].double().mean() < 0.9


def test_routing_gate_asks_its_own_router_before_the_mixing():
    model, tokens = make(), numbers(8, 21)
    entering = []
    attach(model, sidecars(), lambda i: Gate("routing_hard"), source="own")
    for layer in model.layers:
        layer.gate.threshold.fill_(0.5)
        layer.layer.input_layernorm.register_forward_hook(lambda module, given, out: entering.append(given[0]))
    with recorded_alpha(model) as record:
        model(tokens)
    for i, x in enumerate(entering):
        layer = model.layers[i].layer
        unit = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.post_attention_layernorm.weight
        used = unit @ layer.mlp.router_proj.weight.T > 0
        assert torch.equal(record[i][0], (~used).double().mean(-1) >= 0.5)


@pytest.mark.parametrize("shape", ["hard", "soft"])
def test_shuffled_gate_keeps_mean_and_compute_of_each_sequence(shape):
    x, sparsity = draw(8, 40, 4), (draw(8, 40, seed=1) * 6).round() / 24 + 0.5
    routing, shuffled = Gate(f"routing_{shape}"), Gate(f"shuffled_{shape}")
    for gate in (routing, shuffled):
        gate.calibrating = True
    true, control = routing(x, sparsity), shuffled(x, sparsity)
    assert torch.equal(true.sort(1).values, control.sort(1).values), "the same α in each row, so as many queries"
    moved = (true != control).double().mean(1)
    assert moved.min() > 0.2, "in every row the order is another one"
    orders = {tuple(row.tolist()) for row in (control == true).int()}
    assert len(orders) == 8, "and not the same in all rows"
    rank = torch.corrcoef(torch.stack((sparsity.flatten(), control.double().flatten())))[0, 1]
    assert abs(rank) < 0.15 and torch.corrcoef(torch.stack((sparsity.flatten(), true.double().flatten())))[0, 1] > 0.7


def test_hard_routing_is_the_threshold_and_lots_part_only_those_on_it():
    x, sparsity = torch.zeros(4, 50, 1), (numbers(4, 50, below=5) / 4).double()
    gate = Gate("routing_hard", 0.3)
    gate.threshold.fill_(0.5)
    assert torch.equal(gate(x, sparsity), sparsity >= 0.5), "a threshold set by hand sends equals to Mamba"
    gate.calibrating = True
    alpha = gate(x, sparsity)
    level = gate.threshold.item()
    assert alpha.sum() == 60 and torch.equal(alpha[sparsity != level], sparsity[sparsity != level] > level)
    assert 0 < alpha[sparsity == level].double().mean() < 1
    gate.calibrating = False
    assert torch.equal(gate(x, sparsity), alpha)
    assert torch.equal(gate(x[:, :20], sparsity[:, :20]), alpha[:, :20]), "lots belong to places, whatever the length"


@pytest.mark.parametrize("step", [0, 1])
def test_a_threshold_stands_between_neighbours_of_single_precision(step):
    """The middle of two adjacent float32 is one of them in float32: whichever it is, a tied half must not change sides."""
    low = torch.tensor(0.475) + step * 2**-25  # adjacent numbers there are 2⁻²⁵ apart; the middle rounds down, or up
    high = torch.nextafter(low, torch.tensor(1.0))
    sparsity = torch.where(torch.arange(100) < 50, high, low).expand(2, 100)
    gate = Gate("routing_hard", 0.5)
    gate.calibrating = True
    assert low < high and torch.equal(gate(torch.zeros(2, 100, 1), sparsity), sparsity == high)


def test_soft_routing_uses_the_whole_range():
    x, sparsity = torch.zeros(4, 200, 1), 0.8 + 0.02 * draw(4, 200)  # as narrow as a trained router's may be
    gate = Gate("routing_soft", 0.5)
    gate.calibrating = True
    alpha = gate(x, sparsity)
    assert alpha.quantile(0.05) < 0.1 and alpha.quantile(0.95) > 0.9
    z = (sparsity - gate.threshold) / (0.5 * sparsity.std(correction=0))
    torch.testing.assert_close(alpha.double(), z.sigmoid(), rtol=1e-5, atol=1e-6)


def test_random_gate_knows_nothing_of_the_tokens():
    gate, other = Gate("random_soft", 0.5, seed=1), Gate("random_soft", 0.5, seed=2)
    for g in (gate, other):
        g.calibrating = True
    alpha = gate(draw(4, 50, 3))
    assert torch.equal(gate(draw(4, 50, 3, seed=5)), alpha)
    assert torch.corrcoef(torch.stack((alpha.flatten(), other(draw(4, 50, 3)).flatten())))[0, 1].abs() < 0.2
    assert torch.corrcoef(alpha).fill_diagonal_(0).abs().max() < 0.6, "and rows are drawn apart"


def test_position_gate_knows_the_place_and_nothing_else():
    x, sparsity = torch.zeros(6, 30, 1), draw(6, 30).sigmoid()
    gate = Gate("position_hard", 0.5)
    gate.calibrating = True
    gate(x, sparsity)
    gate.calibrating = False
    assert torch.equal(gate.profile, sparsity.mean(0)) and not gate.needs_routing
    alpha = gate(x)
    away = gate.profile != gate.threshold
    assert (alpha[:, away] == alpha[:1, away]).all() and torch.equal(alpha[0, away], (gate.profile > gate.threshold)[away])
    assert torch.equal(gate(x[:, :7]), alpha[:, :7])
    with pytest.raises(ValueError, match="30 places; got a sequence of 31"):
        gate(torch.zeros(1, 31, 1))


def test_oracle_gate_gives_mamba_the_tokens_that_it_copies_best():
    model, tokens = gated("oracle_hard", 0.25, layers=(0,))
    hybrid, entering = model.layers[0], []
    hybrid.layer.input_layernorm.register_forward_hook(lambda module, given, out: entering.append(out))
    with recorded_alpha(model) as record:
        model(tokens)
    [h], [alpha] = entering, record[0]
    distance = (hybrid.layer.self_attn(h) - hybrid.sidecar(h)).norm(dim=-1)
    assert distance[alpha].max() <= distance[~alpha].min() and alpha.sum() == 42
    mixed = torch.where(alpha[..., None], hybrid.sidecar(h), hybrid.layer.self_attn(h))
    x = model.model.embed_tokens(tokens) * 12.0
    torch.testing.assert_close(hybrid.mix(x), mixed)


def test_learned_gate_begins_as_the_fixed_one_and_learns_at_its_mean():
    gate = Gate("learned_soft", 0.3, width=4).double().train()
    x = draw(4, 20, 4)
    alpha = gate(x)
    torch.testing.assert_close(alpha, torch.full_like(alpha, 0.3))
    alpha[x[..., 0] > 0].sum().backward()
    assert gate.map.weight.grad[0, 0] > 0 and gate.map.weight.grad.abs().argmax() == 0
    with torch.no_grad():
        gate.map.weight.add_(gate.map.weight.grad)
    alpha = gate(x)
    assert alpha.mean().item() == pytest.approx(0.3, abs=1e-9)
    assert alpha[x[..., 0] > 0].mean() > 0.4 > 0.2 > alpha[x[..., 0] < 0].mean()
    assert torch.equal(gate.eval()(x), alpha), "the last threshold stays"


def batches(generator, batch_size):
    rows = torch.randint(23, (batch_size, 17), generator=generator)
    return rows[:, :-1], rows[:, 1:]


def test_distillation_error_is_relative_to_attentions_own_size():
    model, tokens = make(), numbers(4, 12)

    class Echo(nn.Module):
        def __init__(self, attention, share):
            super().__init__()
            self.attention, self.share = [attention], share

        def forward(self, h):
            return self.share * self.attention[0](h)

    students = {i: Echo(model.layers[i].self_attn, share) for i, share in ((0, 1.0), (1, 0.0), (2, 0.5))}
    errors = distillation_errors(model, students, tokens)
    assert [errors[i].item() for i in range(3)] == pytest.approx([0.0, 1.0, 0.25])


def test_distilled_sidecars_copy_attention_and_the_model_stays():
    model, given, held = make(), sidecars((0, 2)), numbers(8, 16, seed=7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    history = distil(model, given, batches, TrainingConfig(steps=60, batch_size=8, learning_rate=1e-2), held_out=held)
    first, last = history.records[0], history.records[-1]
    for i in (0, 2):
        assert last[f"layer_{i}"] < 0.6 * min(1.0, first[f"layer_{i}"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    errors = distillation_errors(model, given, held)
    assert errors[2].item() == pytest.approx(last["layer_2"]), "trained in place"
    attach(model, given, lambda i: Gate("fixed", 1.0))
    with pytest.raises(ValueError, match="detach them"):
        distil(model, given, batches, TrainingConfig(steps=1))


@pytest.mark.parametrize("mode", ["learned_soft", "routing_hard"])
def test_tuning_trains_the_hybrids_and_leaves_the_base(mode):
    model, tokens = gated(mode, 0.4)
    base = {name: p.clone() for name, p in model.named_parameters() if ".sidecar." not in name and ".gate." not in name}
    moved = {name: p.clone() for name, p in model.named_parameters() if name not in base}
    assert any("gate" in name for name in moved) == (mode == "learned_soft")

    def evaluate(model):
        return {"held": F.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:])}

    history = tune(model, lambda g, n: (tokens[:, :-1], tokens[:, 1:]), TrainingConfig(steps=20), evaluate=evaluate)
    assert history.records[-1]["held"] < history.records[0]["held"] - 0.05
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in base.items())
    assert not any(torch.equal(now[name], p) for name, p in moved.items())
    assert all(p.requires_grad for p in now.values()), "thawed again"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: Gate("routing"), "Gate: mode = 'routing'; accepted is one of 'fixed', 'routing_hard'"),
        (lambda: Gate("fixed", 1.2), "0 … 1"),
        (lambda: Gate("routing_soft", temperature=0.0), "temperature"),
        (lambda: Gate("learned_soft"), "width"),
        (lambda: Gate("random_hard")(torch.zeros(1, 2, 3)), "no threshold yet"),
        (lambda: gated("random_soft", 1.0), "use 'fixed'"),
        (lambda: gated("routing_hard", source="previous"), "source='own'"),
        (lambda: gated("routing_hard", source="next"), "source = 'next'; accepted is one of 'previous', 'own'"),
        (lambda: gated("fixed", layers=(3,)), "layer 3 of 3"),
        (lambda: gated("fixed", model=gated("fixed")[0]), "detach first"),
    ],
)
def test_what_does_not_fit_is_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong()
