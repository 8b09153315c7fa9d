"""The mixers of Mamba and Mamba-2: against two other implementations, and the stream against the whole pass."""

import pytest
import torch

from nsm_support.mixers.mamba import Mamba2Block, MambaBlock
from tests.support.draws import draw

BLOCKS = {
    "Mamba": lambda: MambaBlock(12, state_dim=5),
    "Mamba, odd sizes": lambda: MambaBlock(7, state_dim=1, expand=3, conv_width=2, delta_rank=4),
    "Mamba, no window": lambda: MambaBlock(4, conv_width=1),
    "Mamba-2": lambda: Mamba2Block(12, num_heads=3, state_dim=5, chunk=16),
    "Mamba-2, odd sizes": lambda: Mamba2Block(7, num_heads=1, state_dim=1, expand=3, conv_width=2, chunk=5),
}


def stir(block):
    """All parameters away from their start, where D = 1 and A is the same in every channel, say."""
    with torch.no_grad():
        for i, parameter in enumerate(block.parameters()):
            parameter += 0.3 * draw(*parameter.shape, seed=i).to(parameter.dtype)
    return block


@pytest.fixture(params=BLOCKS)
def block(request):
    return stir(BLOCKS[request.param]().double())


def mambapy_mixer(D, **sizes):
    from mambapy.mamba import MambaBlock as Mixer
    from mambapy.mamba import MambaConfig

    return Mixer(MambaConfig(D, n_layers=1, d_state=sizes["state_dim"], expand_factor=2, d_conv=sizes["conv_width"]))


def transformers_mixer(D, **sizes):
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=D, num_hidden_layers=1, state_size=sizes["state_dim"], conv_kernel=sizes["conv_width"])
    return MambaMixer(config, 0)


def assert_same_as(other, block, tokens):
    """Outputs, and the gradients of the tokens and of every parameter, after the weights were copied by their names."""
    assert set(other.state_dict()) == set(block.state_dict())
    other.load_state_dict(block.state_dict())
    pull = draw(*tokens.shape, seed=9).float()
    results = []
    for module in (block, other):
        tokens = tokens.detach().requires_grad_()
        outputs = module(tokens)
        outputs.backward(pull)
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        results.append({"outputs": outputs, "tokens": tokens.grad, **gradients})
    for name, value in results[0].items():
        wanted = results[1][name]
        close = {"rtol": 1e-4, "atol": 2e-5 * wanted.abs().max().item()}
        torch.testing.assert_close(value, wanted, msg=lambda text, name=name: f"{name}: {text}", **close)


@pytest.mark.parametrize("make", [mambapy_mixer, transformers_mixer])
@pytest.mark.parametrize(("D", "state_dim", "conv_width", "T"), [(24, 16, 4, 33), (16, 3, 2, 20)])
def test_mamba_is_that_of_others(make, D, state_dim, conv_width, T):
    sizes = {"state_dim": state_dim, "conv_width": conv_width}
    block = stir(MambaBlock(D, **sizes))
    assert_same_as(make(D, **sizes), block, draw(3, T, D).float())


def test_mamba_2_is_that_of_others():
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=24, num_heads=3, head_dim=16, state_size=8, n_groups=1, conv_kernel=4, chunk_size=16, num_hidden_layers=1
    )
    block = stir(Mamba2Block(24, num_heads=3, state_dim=8, chunk=16))
    assert_same_as(Mamba2Mixer(config, 0), block, draw(3, 33, 24).float())


def test_mamba_starts_as_published():
    torch.manual_seed(0)
    block = MambaBlock(200)
    rank = 13
    assert {name: tuple(x.shape) for name, x in block.named_parameters()} == {
        "A_log": (400, 16),
        "D": (400,),
        "conv1d.weight": (400, 1, 4),
        "conv1d.bias": (400,),
        "in_proj.weight": (800, 200),
        "x_proj.weight": (rank + 32, 400),
        "dt_proj.weight": (400, rank),
        "dt_proj.bias": (400,),
        "out_proj.weight": (200, 400),
    }
    torch.testing.assert_close(block.A_log.exp(), torch.arange(1.0, 17).expand(400, -1))
    assert (block.D == 1).all()
    assert block.dt_proj.weight.abs().max() <= rank**-0.5 < 1.01 * block.dt_proj.weight.abs().max()
    check_delta(torch.nn.functional.softplus(block.dt_proj.bias))


def test_mamba_2_starts_as_published():
    torch.manual_seed(0)
    block = Mamba2Block(200, num_heads=400, state_dim=8)
    assert 1 <= block.A_log.exp().min() < 1.5 and 15.5 < block.A_log.exp().max() <= 16
    assert (block.D == 1).all() and (block.norm.weight == 1).all()
    check_delta(torch.nn.functional.softplus(block.dt_bias))


def check_delta(delta):
    """Log-uniform in 0.001 … 0.1: a quarter in each quarter of the logarithms."""
    assert delta.min() > 0.000999 and delta.max() < 0.1001
    share = torch.histc(delta.log10(), 4, min=-3, max=-1) / delta.numel()
    torch.testing.assert_close(share, torch.full((4,), 0.25), atol=0.07, rtol=0)


@pytest.mark.parametrize("first", [1, 2, 20])
def test_a_prefill_in_parts_and_then_steps_is_the_whole_pass(block, first):
    tokens = draw(2, 33, block.in_proj.in_features)
    whole = block(tokens)
    one, stream = block.prefill(tokens[:, :first])
    two, stream = block.prefill(tokens[:, first:31], stream)
    three, stream = block.step(tokens[:, 31], stream)
    four = block(tokens[:, 32:], stream)
    torch.testing.assert_close(torch.cat((one, two, three[:, None], four), 1), whole)


def test_what_does_not_fit_is_named():
    block = MambaBlock(8)
    for call, message in (
        (lambda: block(torch.zeros(2, 0, 8)), "tokens = 0; accepted is a whole number"),
        (lambda: block(torch.zeros(2, 3, 9)), r"MambaBlock: tokens = \[2, 3, 9\]; accepted is \[B, T, D=8\]"),
        (lambda: block.step(torch.zeros(2, 1, 8), block.start(2)), r"token = \[2, 1, 8\]; accepted is \[B, D=8\]"),
        (lambda: block.step(torch.zeros(2, 8), block.start(3)), r"stream.window = \[3, 3, 16\]; accepted is \[2, 3, 16\]"),
        (lambda: MambaBlock(8, delta_rank=0), "delta_rank = 0; accepted is a whole number, at least 1"),
        (lambda: Mamba2Block(8, state_dim=True), "state_dim = True"),
        (lambda: Mamba2Block(8, num_heads=3), "channels = 16, num_heads = 3; accepted is a multiple of num_heads"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
