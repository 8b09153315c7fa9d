"""Every model in one way: what it gives, how it streams, how it is kept, how it writes on; in three precisions."""

import copy
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nsm_support.blockffn import BlockFFNConfig, BlockFFNModel, Gate, MambaSidecar, attach
from nsm_support.crystalline import BottleneckConfig, CrystallineConfig, CrystallineTransformer
from nsm_support.crystalline.recurrent.model import CrystallineRecurrent, RecurrentConfig
from nsm_support.mixers import BASELINES, BaselineConfig, CNNConfig, SmallCNN, cache
from nsm_support.models import LanguageModel, Model, StreamingModel, draw
from nsm_support.nsm import NSM, NSMConfig, SimpleNSM
from nsm_support.training import CheckpointError

V, T = 11, 13
TOKENS, VECTORS = {"vocab_size": V}, {"input_dim": 3}
LANGUAGE = TOKENS | {"head": "language_model"}
TABLE = {"positions": "learned", "max_length": T}


@dataclass(frozen=True)
class Case:
    """A model and what it can do."""

    model: type
    config: Any
    streams: bool = False  # otherwise it looks ahead, or takes no sequence
    trains: bool = True  # its outputs have gradients

    def build(self, seed=0):
        torch.manual_seed(seed)
        return self.model.from_config(self.config).eval()

    @property
    def vectors(self):
        return getattr(self.config, "input_dim", None) is not None

    @property
    def outputs(self):
        return getattr(self.config, "output_dim", None) or V

    @property
    def predicts(self):
        return self.streams and getattr(self.config, "head", "language_model") == "language_model" and self.trains

    def inputs(self, length=T, seed=0):
        generator = torch.Generator().manual_seed(seed)
        if self.model is SmallCNN:
            return torch.rand(2, 28, 28, generator=generator)
        if self.model is CrystallineRecurrent:
            return torch.randint(V, (2, 2, length), generator=generator)
        if self.vectors:
            return torch.randn(2, length, 3, generator=generator)
        return torch.randint(V, (2, length), generator=generator)


def nsm(streams=False, **options):
    sizes = {"token_dim": 16, "state_dim": 12, "num_states": 5, "window": 4}
    return Case(
        NSM, NSMConfig(**sizes | ({"output_dim": 3} if options.get("head") != "language_model" else {}) | options), streams
    )


def baseline(name, streams, **options):
    options = ({"output_dim": 3} if options.get("head") != "language_model" else {}) | options
    return Case(BASELINES[name], BaselineConfig(token_dim=16, num_heads=2, **options), streams)


def crystalline(bottleneck=None, **options):
    config = CrystallineConfig(vocab_size=V, token_dim=16, num_layers=2, num_heads=2, max_length=T, **options)
    return Case(CrystallineTransformer, replace(config, bottleneck=BottleneckConfig(**bottleneck or {})), True)


def blockffn(**options):
    sizes = {"vocab_size": V, "token_dim": 32, "num_layers": 2, "num_experts": 6, "expert_size": 5, "intermediate_size": 20}
    return Case(BlockFFNModel, BlockFFNConfig(**sizes | options), True)


LATENT = {"attention_type": "mla", "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
CASES = {
    "NSM": nsm(**VECTORS),
    "NSM, labelling, LSTM, top-k": nsm(head="labelling", gate_type="lstm", top_k=2, mix="sum", **TOKENS, **TABLE),
    "NSM, chunk 1": nsm(True, chunk=1, **LANGUAGE),
    "NSM, chunk 4, LSTM": nsm(True, chunk=4, gate_type="lstm", num_states=(4, 5), max_states=7, **LANGUAGE, **TABLE),
    "NSM, chunk 7, classification": nsm(True, chunk=7, positions="none", **VECTORS),
    "NSM, chunk 3, labelling, top-k": nsm(True, chunk=3, head="labelling", top_k=2, state_attention=False, **VECTORS),
    "NSM, chunk 1, window 1": nsm(True, chunk=1, window=1, gate_type="lstm", **TOKENS),
    "NSM, reading alone": nsm(True, chunk=5, mix="read", positions="none", **LANGUAGE),
    "NSM, window alone": nsm(True, chunk=1, mix="local", **LANGUAGE),
    "SimpleNSM": Case(SimpleNSM, NSMConfig(input_dim=3, output_dim=3, token_dim=8, state_dim=8, num_states=5, num_layers=1)),
    "Transformer, both ways": baseline("Transformer", False, **VECTORS),
    **{f"{name}, language": baseline(name, True, causal=True, **LANGUAGE, **TABLE) for name in BASELINES},
    **{f"{name}, classification": baseline(name, True, causal=True, **VECTORS) for name in BASELINES},
    "Transformer, labelling": baseline("Transformer", True, causal=True, head="labelling", **TOKENS),
    "SmallCNN": Case(SmallCNN, CNNConfig(channels=4)),
    "CrystallineTransformer": crystalline(),
    "CrystallineTransformer, k = 3": crystalline({"num_codes_k": 3, "schedule": "learned"}, bypass=False, positions="learned"),
    "CrystallineRecurrent": Case(
        CrystallineRecurrent, RecurrentConfig(vocab_size=V, output_dim=3, num_codes=5, num_machines=2), True, trains=False
    ),
    "BlockFFN": blockffn(),
    "BlockFFN, tied, grouped": blockffn(tie_word_embeddings=True, num_key_value_heads=2),
    "BlockFFN, latent": blockffn(**LATENT),
    "BlockFFN, dense": blockffn(ffn_type="dense"),
}
STREAMS = [name for name, case in CASES.items() if case.streams]
LANGUAGES = [name for name, case in CASES.items() if case.predicts]
MODES = ("float32", "bfloat16", "autocast")


def run(model, inputs):
    out = model(inputs)
    return out if torch.is_tensor(out) else out.outputs


def at(mode, model, inputs):
    """The model and its inputs in a precision, and the context to run them in."""
    if mode == "bfloat16":
        model, inputs = model.bfloat16(), inputs.bfloat16() if inputs.is_floating_point() else inputs
    return model, inputs, torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast")


def last(case, outputs, t=-1):
    """The outputs [·,C] at a place of what a full pass gave; a classifier has but one."""
    return outputs if getattr(case.config, "head", "") == "classification" else outputs[..., t, :]


@pytest.fixture(autouse=True)
def spare(monkeypatch):
    monkeypatch.setattr(cache, "SPARE", 4)  # so that a cache grows on the way


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_it_runs_and_learns_in_every_precision(name, mode):
    case = CASES[name]
    exact = run(case.build(), case.inputs())
    model, inputs, context = at(mode, case.build(), case.inputs())
    with context:
        out = run(model.train(), inputs)
        close = run(model.eval(), inputs).float()
    if case.model is not CrystallineRecurrent:  # a code chosen otherwise changes all that follows; so may a bottleneck's
        assert mode == "float32" or not torch.equal(close, exact), "it was computed in single precision"
        coded = case.model is CrystallineTransformer
        assert ((close - exact).abs().mean() / exact.abs().mean()).item() < (1 if coded else 0.08)
    if case.trains:
        out.float().square().mean().backward()
        unused = ("log_scale", "log_temperature")  # until the codes are laid
        trained = {n: p.grad for n, p in model.named_parameters() if not n.endswith(unused)}
        assert [n for n, grad in trained.items() if grad is None or not grad.isfinite().all()] == []


@pytest.mark.parametrize("name", CASES)
def test_trace_gives_what_forward_gives_and_what_a_class_has_is_what_the_protocols_say(name):
    case, model = CASES[name], CASES[name].build()
    trace, out = model.trace(case.inputs()), run(model, case.inputs())
    assert torch.equal(trace.outputs, out) and len(trace) >= 2 and not out.isnan().any()
    pooled = case.model is SmallCNN or getattr(case.config, "head", "") == "classification"
    assert out.shape == (*case.inputs().shape[: 1 if pooled else case.inputs().dim() - case.vectors], case.outputs)
    assert isinstance(model, Model)
    assert isinstance(model, StreamingModel) == hasattr(model, "step") == (case.model is not SmallCNN)
    assert isinstance(model, LanguageModel) == (case.model not in (SmallCNN, CrystallineRecurrent))
    if isinstance(model, StreamingModel) and not case.streams:
        with pytest.raises(ValueError, match="accepted is True: a stream sees no later token"):
            model.start(2)
    if isinstance(model, LanguageModel) and not case.predicts:
        with pytest.raises(ValueError, match="accepted is 'language_model': others predict no tokens"):
            model.generate(torch.zeros(1, 2, dtype=torch.long), 1)


@pytest.mark.parametrize("name", [name for name in STREAMS if getattr(CASES[name].config, "head", "") != "classification"])
def test_a_changed_token_leaves_the_outputs_before_it(name):
    case, model = CASES[name], CASES[name].build()
    before = run(model, case.inputs())
    for t in (0, 6, 12):
        inputs = case.inputs()
        place = (..., t) if not inputs.is_floating_point() else (slice(None), t)
        inputs[place] = (inputs[place] + 1) % V
        after = run(model, inputs)
        assert torch.equal(after[..., :t, :], before[..., :t, :])
        assert case.model is CrystallineRecurrent or not torch.equal(after[..., t:, :], before[..., t:, :])


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_equals_the_full_pass_wherever_it_began(name):
    case = CASES[name]
    model, inputs = case.build().double(), case.inputs()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    axis = 2 if case.model is CrystallineRecurrent else 1

    fulls = [run(model, inputs.narrow(axis, 0, t + 1)) for t in range(T)]

    def go_on(stream, start):
        for t in range(start, T):
            out, after = model.step(inputs.select(axis, t), stream)
            again, other = model.step(inputs.select(axis, t), stream)  # a stream is a value: used twice, the same twice
            assert torch.equal(out, again)
            model.step(inputs.select(axis, 0), stream)  # nor does a third use change what the first ones gave
            torch.testing.assert_close(out, last(case, fulls[t]), rtol=1e-9, atol=1e-11)
            stream = after if t % 2 else other
            assert not out.requires_grad

    go_on(model.start(2), 0)
    for start in (1, 7, 12):
        outputs, stream = model.prefill(inputs.narrow(axis, 0, start))
        torch.testing.assert_close(outputs, fulls[start - 1], rtol=1e-9, atol=1e-11)
        go_on(copy.deepcopy(stream) if start == 7 else stream, start)


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("name", STREAMS)
def test_streams_run_in_half_precision(name, mode):
    case = CASES[name]
    model, inputs, context = at(mode, case.build(), case.inputs())
    axis = 2 if case.model is CrystallineRecurrent else 1
    with context:
        _, stream = model.prefill(inputs.narrow(axis, 0, 5))
        for t in range(5, T):
            out, stream = model.step(inputs.select(axis, t), stream)
        full = last(case, run(model, inputs))
    if case.model not in (CrystallineRecurrent, CrystallineTransformer):
        torch.testing.assert_close(out.float(), full.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_comes_back_bit_for_bit(name, tmp_path):
    case, model = CASES[name], CASES[name].build(seed=3)
    model.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    again = case.model.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state) and not again.training
    if case.model is not CrystallineTransformer:  # whose config holds another
        assert type(case.config)(**asdict(case.config)) == case.config
    assert again.config == model.config and torch.equal(run(again, case.inputs()), run(model, case.inputs()))
    flags = [getattr(p, "no_weight_decay", False) for p in model.parameters()]
    assert flags == [getattr(p, "no_weight_decay", False) for p in again.parameters()]
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]  # shared ones still count once
    half = model.bfloat16()
    half.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == 2 and "config.json" in names
    inputs = case.inputs().bfloat16() if case.inputs().is_floating_point() else case.inputs()
    assert torch.equal(run(case.model.from_pretrained(tmp_path), inputs), run(half, inputs))


def test_a_pruned_model_is_saved_as_it_is_and_its_state_dict_too(tmp_path):
    case = CASES["NSM, chunk 4, LSTM"]
    model = case.build()
    model.prune([[0, 3], [1, 2, 4]])
    model.allocate(1)
    model.save_pretrained(tmp_path)
    again = NSM.from_pretrained(tmp_path)
    assert again.config.num_states == (2, 4) and torch.equal(again(case.inputs()), model(case.inputs()))
    save_file(model.state_dict(), tmp_path / "state.safetensors")  # which refuses tensors that share their memory


def edit(path, **changes):
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | changes))


def test_a_damaged_or_foreign_folder_is_refused(tmp_path):
    model = CASES["NSM, chunk 1"].build()
    with pytest.raises(FileNotFoundError):
        NSM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good, about = path.read_bytes(), json.loads(path.read_text())
    weights = tmp_path / about["weights"]

    def refused(match, cls=NSM):
        with pytest.raises(CheckpointError, match=match) as caught:
            cls.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)
        path.write_bytes(good)

    refused("belongs to a model of class NSM; BlockFFNModel was asked for", BlockFFNModel)
    for text in (good[: len(good) // 2], b"[]", b'{"class": "NSM"}', b"\xff\x00"):
        path.write_bytes(text)
        refused("config.json is damaged, or no config that save_pretrained wrote")
    edit(path, config=about["config"] | {"num_state": 4})
    refused("NSMConfig has the fields alpha, .*; got alpha, ")
    edit(path, config=about["config"] | {"num_layers": 0})
    refused("num_layers = 0; accepted is a whole number")
    edit(path, config=about["config"] | {"token_dim": 32})
    refused("does not fit config.json: names or shapes of its tensors are others")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused("is damaged: its checksum is not the one in config.json")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=weights.name):
        NSM.from_pretrained(tmp_path)


def test_a_save_that_breaks_off_leaves_the_one_before(tmp_path, monkeypatch):
    case = CASES["NSM, chunk 1"]
    case.build(seed=1).save_pretrained(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_text("somebody's own")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("nsm_support.models.write_json", full)
    with pytest.raises(OSError, match="disk full"):
        case.build(seed=2).save_pretrained(tmp_path)
    assert torch.equal(NSM.from_pretrained(tmp_path)(case.inputs()), case.build(seed=1)(case.inputs()))
    monkeypatch.undo()
    case.build(seed=2).save_pretrained(tmp_path)
    assert torch.equal(NSM.from_pretrained(tmp_path)(case.inputs()), case.build(seed=2)(case.inputs()))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_model_with_another_part_in_a_layers_place_neither_streams_nor_is_saved(tmp_path):
    model = CASES["BlockFFN"].build()
    attach(model, {1: MambaSidecar(32)}, lambda i: Gate("fixed", 0.5, width=32))
    with pytest.raises(ValueError, match="accepted is layers without sidecars"):
        model.start(1)
    with pytest.raises(ValueError, match="accepted is a model with the weights of its config"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", LANGUAGES)
def test_it_writes_on_as_full_passes_say(name):
    case, model = CASES[name], CASES[name].build().train()
    prompt, expected = case.inputs(5), case.inputs(5)
    for _ in range(7):
        expected = torch.cat([expected, run(model.eval(), expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.train().generate(prompt, 7, temperature=0), expected) and model.training
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    drawn = [model.generate(prompt, 7, temperature=9.0, generator=generator) for generator in generators]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0][:, :5], prompt) and drawn[0].max() < V
    assert torch.equal(model.generate(prompt, 7, top_k=1), expected) and model.generate(prompt, 0).shape == (2, 5)


def test_draws_follow_temperature_and_top_k():
    logits = torch.tensor([[2.0, 1.0, 0.0, -3.0]]).expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    for temperature, top_k in ((1.0, None), (2.0, 3), (0.5, 2)):
        kept = logits[0].where(torch.arange(4) < (top_k or 4), -torch.inf) / temperature
        share = torch.bincount(draw(logits, temperature, top_k, generator)[:, 0], minlength=4) / 20_000
        torch.testing.assert_close(share, kept.softmax(0), rtol=0, atol=0.015)
    model = CASES["GRU, language"].build()
    for options, said in (({"temperature": -1.0}, "temperature = -1.0"), ({"top_k": 0}, "top_k = 0")):
        with pytest.raises(ValueError, match=said):
            model.generate(torch.zeros(1, 2, dtype=torch.long), 3, **options)
    with pytest.raises(ValueError, match="at most max_length = 13"):
        model.generate(torch.zeros(1, 2, dtype=torch.long), 13)


def test_a_cache_shares_its_memory_until_two_streams_part():
    empty = cache.Cache.empty(torch.zeros(1), 1, 1, 2)
    first = empty.append(*torch.randn(2, 1, 1, 3, 2))
    a = first.append(*torch.ones(2, 1, 1, 1, 2))
    b = first.append(*torch.zeros(2, 1, 1, 1, 2))
    assert a.keys is first.keys and b.keys is not first.keys and first.keys.shape[2] == 3 + 4
    assert (a.keys[:, :, 3] == 1).all() and (b.keys[:, :, 3] == 0).all() and torch.equal(a.keys[:, :, :3], b.keys[:, :, :3])
    with torch.inference_mode():
        frozen = empty.append(*torch.randn(2, 1, 1, 3, 2))
    assert frozen.append(*torch.ones(2, 1, 1, 1, 2)).length == 4
