"""The crystalline transformer: causal, silent in evaluation, blocked where it says so, and what seed 003's cells need."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim import AdamW

from nsm_support.crystalline import BottleneckConfig, CrystallineConfig, CrystallineTransformer, compression_loss


def build(seed=0, laid=True, bottleneck=None, **config):
    """A small model in float64 whose codes count as laid, so that training passes go through them."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 11, "token_dim": 16, "num_layers": 2, "num_heads": 2, "max_length": 40}
    model = CrystallineTransformer(
        CrystallineConfig(**(sizes | config), bottleneck=BottleneckConfig(**(bottleneck or {})))
    ).double()
    for _, module in model.bottlenecks():
        module.passes.fill_(module.config.lay_every * laid)
    return model


def tokens(B=2, T=9, V=11, seed=0):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def test_learned_positions_stand_alone_and_begin_at_the_first_place():
    model, row = build(positions="learned").eval(), tokens(B=2, T=9)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, arguments: seen.append(arguments[0]))
    model(row)
    assert torch.equal(seen[0], model.embedding(row) + model.places[:9])
    with torch.no_grad():
        model.places.zero_()
    turned = row[:, [3, 1, 0, 2, 4, 5, 6, 7, 8]]  # without places, attention does not know the order of what lies before
    assert not torch.equal(row, turned)
    torch.testing.assert_close(
        model.blocks[0]._attention(model.embedding(turned))[:, 4:], model.blocks[0]._attention(model.embedding(row))[:, 4:]
    )


@pytest.mark.parametrize("bypass", [True, False])
def test_bottlenecks_get_what_the_block_says(bypass):
    """x + Q(f(x)), or Q(x + f(x)): attention first, then the MLP, each under its own name."""
    model, row = build(bypass=bypass).eval(), tokens()
    block, x = model.blocks[0], model.embedding(row)
    out, info = block(x)
    change = block._attention(x)
    torch.testing.assert_close(info["attn"]["input"], change if bypass else x + change)
    between = (x if bypass else 0) + info["attn"]["output"]
    change = block._mlp(between)
    torch.testing.assert_close(info["mlp"]["input"], change if bypass else between + change)
    torch.testing.assert_close(out, (between if bypass else 0) + info["mlp"]["output"])


def test_dropout_falls_on_what_enters_the_bottlenecks():
    model = build(dropout=0.5)
    info = model(tokens())[1][0]
    for part in ("attn", "mlp"):
        assert 0.3 < (info[part]["input"] == 0).double().mean() < 0.7
    assert not (model.eval()(tokens())[1][0]["attn"]["input"] == 0).any()


def test_attention_equals_its_definition():
    """softmax(q k/√d) v over the past, rotated by hand, for one head after the other."""
    block = build().blocks[0]
    x = torch.randn(1, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, v = block.qkv(block.attn_norm(x))[0].split(16, -1)
    heads = []
    for h in range(2):
        qh, kh, vh = (part[:, 8 * h : 8 * h + 8] for part in (q, k, v))

        def turn(row, t):
            angle = t * 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
            first, second = row.view(4, 2).T
            cos, sin = angle.cos(), angle.sin()
            return torch.stack([first * cos - second * sin, first * sin + second * cos], 1).flatten()

        rows = []
        for t in range(7):
            scores = torch.stack([turn(qh[t], t) @ turn(kh[u], u) / 8**0.5 for u in range(t + 1)])
            rows.append(scores.softmax(0) @ vh[: t + 1])
        heads.append(torch.stack(rows))
    torch.testing.assert_close(block._attention(x)[0], block.out(torch.cat(heads, 1)))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential", "none"])
def test_anneal_sets_every_bottleneck(schedule):
    model = build(bottleneck={"schedule": schedule, "temp_init": 2.0, "temp_min": 0.5})
    model.anneal(0.5)
    middle = {"linear": 1.25, "cosine": 1.25, "exponential": 1.0, "none": 2.0}[schedule]
    assert [module.temperature.item() for _, module in model.bottlenecks()] == pytest.approx([middle] * 4)


def test_a_learned_temperature_learns_and_heeds_no_clock():
    model = build(bottleneck={"schedule": "learned", "temp_init": 1.5, "codebook_size": 6})
    model.anneal(1.0)
    before = [module.temperature.item() for _, module in model.bottlenecks()]
    assert before == pytest.approx([1.5] * 4)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    for step in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens(seed=step))[0].flatten(0, 1), tokens(seed=step).flatten()).backward()
        optimizer.step()
    assert all(abs(module.temperature.item() - 1.5) > 0.05 for _, module in model.bottlenecks())


@pytest.mark.parametrize("part", ["attn", "mlp"])
@pytest.mark.parametrize("layer", [0, 1])
def test_without_bypass_nothing_passes_a_constant_code(layer, part):
    for bypass in (True, False):
        model = build(bypass=bypass, bottleneck={"codebook_size": 6}).eval()
        codebook = getattr(model.blocks[layer], f"{part}_bottleneck").codebook
        codebook.copy_(codebook[:1].expand_as(codebook))  # whichever wins, it is the same
        logits = model(tokens())[0]
        constant = torch.allclose(logits, logits[:1, :1].expand_as(logits), atol=1e-12, rtol=0)
        assert constant is not bypass


def test_every_parameter_has_a_gradient():
    model = build(bottleneck={"codebook_size": 6, "schedule": "learned"})
    logits, infos = model(tokens())
    soft = [compression_loss(one["soft_codes"]) for info in infos for one in info.values()]
    (logits.square().mean() + sum(soft)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.slow
def test_cells_of_seed_003_run_with_other_imports(capsys):
    """The seed notebook's code cells as they stand, but for its imports, its plots of curves, and fewer steps."""
    cells = dict(globals())
    exec(compile((Path(__file__).parent / "crystalline_notebook.txt").read_text(), "notebook", "exec"), cells)
    history, alignment, states = cells["history"], cells["alignment"], cells["states"]
    assert cells["fsm"].transition_matrix.sum(1) == pytest.approx(np.ones(8)) and states.shape == (6, 32)
    assert torch.equal(states, cells["inputs"] // 3)
    assert hasattr(cells["fig"], "savefig") and cells["alignment_matrix"].sum() == 40 * 32 * 4
    assert abs(history["loss"][0] - np.log(24)) < 0.6 and history["loss"][-1] < history["loss"][0] - 0.5
    assert history["temperature"] == pytest.approx([2.0, 2.0 - 1.7 * 50 / 101, 2.0 - 1.7 * 100 / 101])
    assert 0 <= alignment["purity"] <= 1 and 4 <= alignment["active_codes"] <= 32
    assert "Training complete!" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: build(token_dim=18, num_heads=4),
            "token_dim = 18, num_heads = 4; accepted is token_dim a multiple of 2 · num_heads",
        ),
        (lambda: build(num_layers=0), "num_layers = 0; accepted is a whole number"),
        (lambda: build(positions="sine"), "positions = 'sine'; accepted is one of 'rotary', 'learned'"),
        (lambda: build(dropout=1.0), r"dropout = 1\.0"),
        (lambda: build(embedding_std=0.0), r"embedding_std = 0\.0"),
        (lambda: build()(tokens(B=1, T=41)), "T = 41; accepted is at most max_length = 40"),
        (lambda: build()(tokens()[0]), r"tokens = \[9\]; accepted is \[B, T\]"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
