"""Routing signals: heard by hooks, through wrappers, aligned token by token."""

import pytest
import torch

from nsm_support.blockffn.gates import Gate
from nsm_support.blockffn.hybrid import MambaSidecar, attach
from nsm_support.blockffn.model import BlockFFNConfig, BlockFFNModel
from nsm_support.blockffn.signals import RoutingExtractor
from tests.support.draws import numbers


def make(seed=0, **options):
    sizes = {"vocab_size": 23, "token_dim": 32, "num_layers": 3, "num_experts": 6, "expert_size": 5}
    torch.manual_seed(seed)
    return BlockFFNModel(BlockFFNConfig(**sizes | options)).double()


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
    for layer, routed in zip(heard, model.trace(tokens)[1], strict=True):
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
        heard = extractor(tokens)
        model(tokens.flip(0))  # a pass of one's own in between is not heard
        assert torch.equal(extractor(tokens), heard)
        modes.clear()
        assert not extractor(tokens).requires_grad and modes == [(False, False)]
        assert model.training, "the mode is put back"
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    extractor = RoutingExtractor(model)
    extractor.remove()
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.equal(model(tokens), before)
    with pytest.raises(RuntimeError, match="once a pass"):
        extractor(tokens)


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
