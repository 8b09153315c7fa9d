"""Sidecars and gates as the pages run them: equal runs, equal means, equal batches, nothing leaked, the interval."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nsm_support.blockffn.gates import Gate
from nsm_support.blockffn.hybrid import GatedHybridLayer, distillation_errors
from nsm_support.blockffn.model import BlockFFNConfig, BlockFFNModel
from nsm_support.corpus import load_corpus
from nsm_support.studies import gate_comparison, sidecars
from nsm_support.studies.gate_comparison import GATES, GateRun, InvertedGate, layer_passes
from nsm_support.studies.language_model import save_trained
from nsm_support.studies.protocol import measure
from nsm_support.studies.sidecars import (
    Mixture,
    Setup,
    SidecarRun,
    SweepRun,
    attach_all,
    evenly,
    load_models,
    load_sidecars,
    load_windows,
    make_sidecars,
    mixed,
    model_pass,
    save_sidecars,
    score_windows,
    sidecars_in,
)
from nsm_support.training import History

MAMBA, T = {"state_dim": 4, "expand": 1}, 24


def make(seed, layers=2):
    sizes = {"vocab_size": 270, "token_dim": 16, "num_layers": layers, "num_experts": 6, "expert_size": 4}
    torch.manual_seed(seed)
    return BlockFFNModel(BlockFFNConfig(**sizes, num_heads=2))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A text, two base models and one with a single layer, and sidecars for all of them."""
    folder = tmp_path_factory.mktemp("gating")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(50)]
    (folder / "text.txt").write_text("\n\n".join(" ".join(rng.choice(words, 120)) + "." for _ in range(600)))
    tokenizer = load_corpus(folder / "text.txt", vocab_size=270).tokenizer
    models = {0: make(0), 1: make(1)}
    save_trained(folder / "models.pt", models, tokenizer)
    save_trained(folder / "single.pt", {0: make(0, layers=1)}, tokenizer)
    save_sidecars(folder / "single_sidecars.pt", {(0, 5): make_sidecars(make(0, layers=1), 5, MAMBA)}, MAMBA)
    save_sidecars(folder / "sidecars.pt", {(base, 5): make_sidecars(models[base], 5, MAMBA) for base in models}, MAMBA)
    return folder


@pytest.fixture
def setup(store):
    return Setup(models=str(store / "models.pt"), text=str(store / "text.txt"), window=T)


@pytest.fixture
def run(store, setup):
    path = str(store / "sidecars.pt")
    return GateRun(setup=setup, sidecars=path, base=0, seed=5, mode="routing_hard", steps=3, learning_rate=1e-2)


@pytest.fixture
def single(store, run):
    """One layer: what its gate is given does not depend on what gates did before."""
    setup = replace(run.setup, models=str(store / "single.pt"))
    return replace(run, setup=setup, sidecars=str(store / "single_sidecars.pt"), steps=0)


def test_windows_are_the_beginnings_of_whole_chapters(setup):
    corpus, text = load_corpus(setup.text, tokenizer=load_models(setup).tokenizer), load_windows(setup)
    assert torch.equal(text.test[:, 0], torch.stack([chapter[: T + 1] for chapter in corpus.tokens.test]))
    more = load_windows(replace(setup, windows=3)).test  # (C, 3, T + 1)
    assert torch.equal(more[:, 0], text.test[:, 0]) and torch.equal(more[:, 1:, 0], more[:, :-1, -1])
    assert torch.equal(more[2, 2], corpus.tokens.test[2][2 * T : 3 * T + 1])
    assert torch.equal(text.stream, corpus.train) and len(text.train) == len(corpus.tokens.train)
    few = load_windows(replace(setup, chapters=2))
    assert torch.equal(few.test, text.test[[0, -1]]) and torch.equal(few.train, text.train[[0, -1]])
    assert evenly(torch.arange(9), 3).tolist() == [0, 4, 8] and evenly(torch.arange(2), 5).tolist() == [0, 1]
    with pytest.raises(ValueError, match="no chapter has the 1000001 tokens"):
        load_windows(replace(setup, window=10**6))


def test_score_is_the_mean_loss_of_every_token_but_the_first(setup):
    model, windows = load_models(setup).models[0], load_windows(replace(setup, windows=2)).test
    scored = score_windows(model, windows)
    for chapter, nats in zip(windows[:2], scored.nats, strict=False):
        with torch.no_grad():
            each = [F.cross_entropy(model(row[None, :t])[0, -1], row[t]).double() for row in chapter for t in range(1, T + 1)]
        assert nats.item() == pytest.approx(torch.stack(each).mean().item(), abs=1e-5)
    assert scored.alpha.shape == (0,)
    with mixed(model, make_sidecars(model, 0, MAMBA), (0.25, 1.0)):
        mixture = score_windows(model, windows)
    assert mixture.alpha.tolist() == [0.25, 1.0] and (mixture.tokens == 0.625).all()
    assert torch.equal(score_windows(model, windows).nats, scored.nats), "detached again"


def test_layer_0_asks_its_own_router_and_the_others_the_one_before(setup):
    model = load_models(setup).models[0]
    attach_all(model, make_sidecars(model, 0, MAMBA), lambda i: Gate("routing_hard"))
    assert [layer.source for layer in model.layers] == ["own", "previous"]


def test_training_of_sidecars_helps_and_leaves_the_model(setup, monkeypatch):
    trained = load_models(setup)
    monkeypatch.setattr(sidecars, "load_models", lambda setup: trained)
    base, before = trained.models[0], {name: value.clone() for name, value in trained.models[0].state_dict().items()}
    run = SidecarRun(setup=setup, base=0, seed=3, mamba=MAMBA, distil_steps=60, tune_steps=10, learning_rate=1e-2)
    result = measure(run)
    errors = {(row["sidecar"], row["layer"]): row["error"] for row in result.rows}
    for i in (0, 1):
        assert errors["distilled", i] < 0.8 * errors["untrained", i] and errors["tuned", i] != errors["distilled", i]
    students, tokens = sidecars_in(result.model()), evenly(load_windows(setup).test, 32)[:, 0, :-1]
    with torch.no_grad():
        assert distillation_errors(base, students, tokens)[1].item() == pytest.approx(errors["tuned", 1])
    assert before.keys() == base.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    trained.models[1] = base
    other = replace(run, base=1).build()
    assert not torch.equal(other["0"].norm.weight * other["0"].block.in_proj.weight, run.build()["0"].block.in_proj.weight)


def test_every_layer_has_an_alpha_of_its_own_while_it_is_tuned(setup, monkeypatch):
    drawn = []

    def watch(model, sample_batch, config):
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            sample_batch(generator, 1)
            drawn.append([layer.gate.alpha for layer in model.layers])

    monkeypatch.setattr(sidecars.hybrid, "tune", watch)
    measure(SidecarRun(setup=setup, base=0, seed=3, mamba=MAMBA, distil_steps=1, tune_steps=1))
    drawn = np.array(drawn)
    assert np.abs(drawn.mean(0) - 0.5).max() < 0.07 and np.abs(drawn.std(0) - 12**-0.5).max() < 0.04
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.2


def test_sweep_ends_are_the_model_and_its_sidecars(run):
    ends = (Mixture((0.0, 0.0)), Mixture((1.0, 1.0)), Mixture((1.0, 1.0), "silent"), Mixture((1.0, 1.0), "untrained"))
    sweep = SweepRun(setup=run.setup, sidecars=run.sidecars, base=0, seed=5, mixtures=ends, mamba={"state_dim": 3})
    found = measure(sweep).tensors
    model, windows = load_models(run.setup).models[0], load_windows(run.setup).test
    assert torch.equal(found["baseline"], score_windows(model, windows).nats)
    assert torch.equal(found[ends[0]], found["baseline"])
    mute = load_models(run.setup).models[0]
    for layer in mute.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    torch.testing.assert_close(found[ends[2]], score_windows(mute, windows).nats, rtol=1e-6, atol=1e-6)
    given = load_sidecars(run.sidecars)[0, 5]
    made = make_sidecars(make(0), 5, MAMBA)[1].state_dict()
    assert all(torch.equal(value, made[name]) for name, value in given[1].state_dict().items()), "as they were saved"
    for i, layer in enumerate(model.layers):
        layer.self_attn = given[i]
    assert torch.equal(found[ends[1]], score_windows(model, windows).nats)
    assert not torch.equal(found[ends[3]], found[ends[1]]), "other sidecars"


def test_passes_are_what_is_measured(run):
    tokens = load_windows(run.setup).stream[:600][None]
    model, given = load_models(run.setup).models[0], load_sidecars(run.sidecars)[0, 5]
    at_half = SweepRun(setup=run.setup, sidecars=run.sidecars, base=0, seed=5, mixtures=())
    with torch.no_grad():
        x = model.model.embed_tokens(tokens) * 12.0
        plain = model.layers[0](x)[0]
        passes = layer_passes(run, tokens)
        assert torch.equal(passes["attention"](), plain)
        assert torch.equal(model_pass(at_half, None, tokens)(), model(tokens))
        with mixed(model, given, (0.5, 0.5)):
            assert torch.equal(model_pass(at_half, 0.5, tokens)(), model(tokens))
        h = model.layers[0].input_layernorm(x)
        scanned = model.layers[0].finish(x, given[0](h))[0]
        assert torch.equal(passes["sidecar"](), scanned)
        torch.testing.assert_close(passes["gate"](), passes["gate"](), rtol=0, atol=0)
        agree = (passes["gate"]() - scanned).abs().amax(-1) < 1e-4  # of Mamba's tokens
    assert agree.float().mean() == pytest.approx(0.5, abs=0.02)


def test_gates_see_the_same_batches(run):
    modes = ("routing_hard", "shuffled_soft", "learned_hard", "random_soft", "fixed")
    seen = {measure(replace(run, mode=mode, map_steps=2)).tensors["batches"] for mode in modes}
    assert len(seen) == 1 and min(seen) > 0


def test_gates_are_compared_at_one_mean(run):
    alpha = 0.25
    for mode in GATES:
        result = measure(replace(run, mode=mode, alpha=alpha, steps=1, map_steps=1))
        # 64 chapters of 24 tokens, or as many as there are
        assert result.tensors["calibrated"] == pytest.approx([alpha, alpha], abs=1e-3), mode
        after = result.tensors["after"]
        assert (after.alpha - alpha).abs().max() < 0.1, mode
        assert after.tokens.mean().item() == pytest.approx(after.alpha.mean().item(), abs=1e-6)


def test_thresholds_are_set_anew_after_tuning(run):
    """Of the oracle, whose signal the tuning itself changes."""
    run = replace(run, mode="oracle_hard", steps=20, learning_rate=0.05)
    tuned, given = measure(run), measure(replace(run, steps=0))
    assert max(abs(a - b) for a, b in zip(tuned.tensors["threshold"], given.tensors["threshold"], strict=True)) > 0.01
    assert (tuned.tensors["after"].alpha - 0.5).abs().max() < 0.1


@pytest.mark.parametrize("shape", ["hard", "soft"])
def test_controls_of_one_signal(single, shape):
    """Shuffled: the same α in each chapter, elsewhere. Inverted: what routing leaves."""
    routing, shuffled, inverted = (
        measure(replace(single, mode=f"{kind}_{shape}")).tensors["before"].tokens for kind in ("routing", "shuffled", "inverted")
    )
    assert torch.equal(routing.sort(1).values, shuffled.sort(1).values)
    assert (routing != shuffled).float().mean() > 0.3
    torch.testing.assert_close(inverted, 1 - routing)
    assert routing.std() > 0.1


def test_nothing_of_the_test_reaches_a_threshold(run, monkeypatch):
    text = load_windows(run.setup)
    other = text._replace(test=(text.test + 7) % 270, validation=(text.validation + 3) % 270)
    for mode in ("learned_soft", "oracle_hard"):
        honest = measure(replace(run, mode=mode, map_steps=2))
        with monkeypatch.context() as patch:
            patch.setattr(gate_comparison, "load_windows", lambda setup: other)
            blind = measure(replace(run, mode=mode, map_steps=2))
        assert (
            honest.tensors["threshold"] == blind.tensors["threshold"]
            and honest.tensors["calibrated"] == blind.tensors["calibrated"]
        )
        assert not torch.equal(honest.tensors["after"].nats, blind.tensors["after"].nats)


def test_draws_are_new_in_every_batch_and_back_afterwards(run, monkeypatch):
    seen = []

    def watch(model, sample_batch, config):
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            sample_batch(generator, 1)
            seen.append([layer.gate.seed for layer in model.layers])
        return History()

    fixed = measure(replace(run, mode="random_hard", steps=0))
    monkeypatch.setattr(gate_comparison, "tune", watch)
    result = measure(replace(run, mode="random_hard"))
    assert len({seed for batch in seen for seed in batch}) == 8, "each batch, each layer"
    assert torch.equal(result.tensors["after"].tokens, fixed.tensors["before"].tokens), (
        "the draws of evaluation are not those of training"
    )


def test_a_learned_map_is_trained_apart_and_the_sidecars_begin_as_everybodys(run, monkeypatch):
    begun = []

    def watch(model, sample_batch, config):
        begun.append([{n: p.clone() for n, p in layer.named_parameters() if "sidecar" in n} for layer in model.layers])
        begun.append([layer.gate.map.weight.abs().max().item() for layer in model.layers])
        return original(model, sample_batch, config)

    original = gate_comparison.tune
    monkeypatch.setattr(gate_comparison, "tune", watch)
    measure(replace(run, mode="learned_hard", map_steps=4))
    first, maps, second, trained = begun
    assert all(torch.equal(p, b[n]) for a, b in zip(first, second, strict=True) for n, p in a.items())
    assert max(maps) == 0 < min(trained)


def test_every_layer_and_seed_draws_for_itself(run):
    gates = [replace(run, base=b, seed=s).make_gate(layer, 16) for b in (0, 1) for s in (5, 6) for layer in (0, 1)]
    assert len({gate.seed for gate in gates}) == 8, "runs of two base models share no draw"
    assert isinstance(replace(run, mode="inverted_soft").make_gate(0, 16), InvertedGate)
    model = make(0)
    attach_all(model, make_sidecars(model, 5, MAMBA), lambda i: run.make_gate(i, 16))
    assert all(isinstance(layer, GatedHybridLayer) for layer in model.layers)
