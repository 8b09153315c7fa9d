"""Routing signals: heard by hooks, through wrappers, aligned token by token; and their file."""

import json

import pytest
import torch

from nsm_support.blockffn.gates import Gate
from nsm_support.blockffn.hybrid import MambaSidecar, attach, detach
from nsm_support.blockffn.model import BlockFFNConfig, BlockFFNModel
from nsm_support.blockffn.signals import RoutingExtractor, prompt_record, write_routing_signals


def make(seed=0, **options):
    sizes = {"vocab_size": 23, "token_dim": 32, "num_layers": 3, "num_experts": 6, "expert_size": 5}
    torch.manual_seed(seed)
    return BlockFFNModel(BlockFFNConfig(**sizes | options)).double()


def numbers(*shape, below=23, seed=0):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def hybrid(model, mode="fixed", source="own", layers=(0, 1, 2)):
    """Sidecars around the layers; the gate "fixed" at 0.5 mixes both paths, so what a layer hears is not the base's."""
    torch.manual_seed(1)
    attach(model, {i: MambaSidecar(32).double() for i in layers}, lambda i: Gate(mode, seed=i), source=source)
    return model


def inputs_of_ffns(model, tokens):
    """What each FFN is given, heard elsewhere than the extractor listens: at the norm before it."""
    seen, hooks = [], []
    for name, module in model.named_modules():
        if name.endswith("post_attention_layernorm"):
            hooks.append(module.register_forward_hook(lambda module, given, out: seen.append(out)))
    model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


def routers(model):
    return [module for name, module in model.named_modules() if name.endswith("mlp")]


@pytest.mark.parametrize("wrapped", ["bare", "before", "after"])
def test_activations_are_those_of_the_routers(wrapped):
    """Per layer, token and expert; whether the wrappers come before the extractor or after it."""
    model, tokens = make(), numbers(2, 9)
    if wrapped == "before":
        hybrid(model)
    with RoutingExtractor(model) as extractor:
        if wrapped == "after":
            hybrid(model)
        heard = extractor(tokens)
    given = inputs_of_ffns(model, tokens)
    expected = [(x @ mlp.router_proj.weight.T).relu() for x, mlp in zip(given, routers(model), strict=True)]
    assert heard.shape == (3, 2, 9, 6)
    torch.testing.assert_close(heard, torch.stack(expected))
    for layer, routed in zip(heard, model.forward_with_routing(tokens)[1], strict=True):
        assert torch.equal(layer > 0, routed.scores > 0), "zero where the block is not used"


def test_a_gate_that_asks_the_router_is_not_heard():
    """source="own" looks at a layer's router before the mixing; the signal is what the FFN asked it afterwards."""
    model, tokens = hybrid(make(), "routing_soft"), numbers(2, 9)
    for layer in model.layers:
        layer.gate.threshold.fill_(0.5)
    seen = inputs_of_ffns(model, tokens)  # twice a layer: for the gate, and for the FFN
    assert len(seen) == 6
    expected = [(x @ mlp.router_proj.weight.T).relu() for x, mlp in zip(seen[1::2], routers(model), strict=True)]
    with RoutingExtractor(model) as extractor:
        torch.testing.assert_close(extractor(tokens), torch.stack(expected))


def test_each_token_alone_gives_its_own_signal():
    """Element t is made of tokens 0 … t: what a prompt that ends there hears last."""
    model, tokens = hybrid(make()), numbers(2, 9)
    with RoutingExtractor(model) as extractor:
        whole = extractor(tokens)
        for t in range(9):
            torch.testing.assert_close(extractor(tokens[:, : t + 1])[:, :, -1], whole[:, :, t])
        swapped = extractor(tokens.flip(0))
    torch.testing.assert_close(swapped, whole.flip(1))


def test_removed_leaves_the_model_as_it_was():
    model, tokens, modes = make().train(), numbers(2, 9), []
    before = model(tokens)
    model.lm_head.register_forward_hook(lambda module, given, out: modes.append((model.training, out.requires_grad)))
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with RoutingExtractor(model) as extractor:
        assert not extractor(tokens).requires_grad and modes == [(False, False)]
        assert model.training, "the mode is put back"
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    extractor = RoutingExtractor(model)
    extractor.remove()
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.equal(model(tokens), before)
    with pytest.raises(RuntimeError, match="once a pass"):
        extractor(tokens)


def test_detached_layers_are_still_heard():
    model, tokens = make(), numbers(2, 9)
    with RoutingExtractor(model) as extractor:
        before = extractor(tokens)
        hybrid(model)
        assert (extractor(tokens) - before).abs().max() > 1e-3, "the hybrid's layers hear something else"
        detach(model)
        assert torch.equal(extractor(tokens), before)


def test_a_pass_of_ones_own_in_between_is_not_heard():
    model, tokens = make(), numbers(2, 9)
    with RoutingExtractor(model) as extractor:
        before = extractor(tokens)
        model(tokens.flip(0))
        assert torch.equal(extractor(tokens), before)


@pytest.mark.parametrize("kept", [(slice(1), slice(None)), (slice(None), slice(8))], ids=["sequences", "tokens"])
def test_a_model_that_leaves_tokens_out_is_an_error(kept):
    """Its signals would be laid beside other tokens than theirs."""

    class Shortened(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make()

        def forward(self, tokens):
            return self.inner(tokens[kept])

    with RoutingExtractor(Shortened()) as extractor, pytest.raises(RuntimeError, match=r"\[2, 9\] were routed as"):
        extractor(numbers(2, 9))


def test_a_router_heard_twice_is_an_error():
    model = make()
    model.layers[2].mlp = model.layers[1].mlp  # shared: its signal would belong to no one layer
    with RoutingExtractor(model) as extractor, pytest.raises(RuntimeError, match="once a pass"):
        extractor(numbers(2, 9))


def test_a_dense_model_has_nothing_to_hear():
    with pytest.raises(ValueError, match="no BlockFFN layer"):
        RoutingExtractor(make(ffn_type="dense", intermediate_size=8))


# The file


def counted(activations):
    """Every number of a record, by loops."""
    layers, tokens, experts = activations.shape
    used = [[[e for e in range(experts) if activations[i, t, e] > 0] for t in range(tokens)] for i in range(layers)]
    per_token = {str(i): [1 - len(used[i][t]) / experts for t in range(tokens)] for i in range(layers)}
    per_layer = {i: sum(values) / tokens for i, values in per_token.items()}
    return used, per_token, per_layer, sum(per_layer.values()) / layers


def test_file_holds_the_fields_and_the_tokens_own_numbers(tmp_path):
    path, model = tmp_path / "routing_signals.json", make()
    texts = [["In", " the", " begin", "ning"], ["And", " it", " ca", "me", " to", " pass"]]
    with RoutingExtractor(model) as extractor:
        heard = [extractor(numbers(1, len(words), seed=i))[:, 0] for i, words in enumerate(texts)]
    records = [prompt_record("".join(words), words, signal) for words, signal in zip(texts, heard, strict=True)]
    write_routing_signals(path, "tiny", iter(records))
    data = json.loads(path.read_text())
    assert data["model_name"] == "tiny" and len(data["prompts"]) == 2
    for words, signal, prompt in zip(texts, heard, data["prompts"], strict=True):
        used, per_token, per_layer, overall = counted(signal)
        assert prompt["prompt"] == "".join(words) and prompt["tokens"] == words and prompt["seq_len"] == len(words)
        assert prompt["signal_shapes"] == {str(i): [len(words), 6] for i in range(3)}
        assert prompt["active_experts"] == {str(i): used[i] for i in range(3)}
        assert prompt["overall_sparsity"] == pytest.approx(overall)
        assert prompt["per_layer_sparsity"] == pytest.approx(per_layer)
        for layer, values in per_token.items():
            assert prompt["per_token_sparsity"][layer] == pytest.approx(values)
        assert 0 < prompt["overall_sparsity"] < 1


def test_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "routing_signals.json"
    record = prompt_record("ab", ["a", "b"], torch.rand(1, 2, 3))
    write_routing_signals(path, "first", [record])
    old = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_routing_signals(path, "second", [record, {**record, "overall_sparsity": float("nan")}])
    monkeypatch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_routing_signals(path, "third", [record])
    assert path.read_bytes() == old and [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("activations", [torch.rand(1, 3, 4), torch.rand(2, 4), torch.rand(1, 1, 2, 4)])
def test_record_refuses_signals_of_other_tokens(activations):
    with pytest.raises(ValueError, match="2 tokens take"):
        prompt_record("ab", ["a", "b"], activations)
    with pytest.raises(ValueError, match="0 tokens take"):
        prompt_record("", [], activations[:, :0])


def test_numbers_are_exact_whatever_the_models_type_is():
    """A share of experts is no bfloat16: 1/3 there is 0.3340."""
    record = prompt_record("ab", ["a", "b"], torch.tensor([[[0, 1, 2], [0, 0, 1]]], dtype=torch.bfloat16))
    assert record["per_token_sparsity"] == {"0": [pytest.approx(1 / 3, abs=1e-15), pytest.approx(2 / 3, abs=1e-15)]}
    assert record["overall_sparsity"] == pytest.approx(0.5, abs=1e-15)


def test_file_refuses_no_prompts(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        write_routing_signals(tmp_path / "routing_signals.json", "tiny", [])
    assert not list(tmp_path.iterdir())
