"""Costs: operations against formulas by hand, interleaved seconds, memory of a process of its own."""

import gc
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nsm_support.costs import flops, peak_memory, seconds
from nsm_support.mixers.baselines import MambaLayer, TransformerLayer

B, T, D, H = 2, 13, 8, 2
ATTENTION = 2 * (2 * B * T * T * D)  # scores, weighted sum: all heads together are D wide


def forward(module, *inputs):
    def run():
        with torch.no_grad():
            module(*inputs)

    return run


def forward_and_backward(module, *inputs):
    def run():
        out = module(*inputs)
        (out[0] if isinstance(out, tuple) else out).sum().backward()

    return run


def tokens(device="cpu", grad=False):
    return torch.randn(B, T, D, device=device, requires_grad=grad)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operations_of_a_linear_map_and_a_convolution(device):
    linear = nn.Linear(D, 5, device=device)
    once = 2 * B * T * D * 5
    assert flops(forward(linear, tokens(device))) == once
    assert flops(forward_and_backward(linear, tokens(device, grad=True))) == 3 * once  # for weights and for inputs
    assert flops(forward_and_backward(linear, tokens(device))) == 2 * once  # no gradient for the inputs
    images, convolution = torch.randn(B, 3, 10, 10, device=device), nn.Conv2d(3, 4, 5, padding=2, device=device)
    assert flops(forward(convolution, images)) == 2 * B * 10 * 10 * 4 * 3 * 25


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("causal", [False, True])
def test_operations_of_attention(causal, device):
    q, k, v = (torch.randn(B, H, T, D // H, device=device, requires_grad=True) for _ in range(3))

    def attend():
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    assert flops(attend) == ATTENTION
    backward = 5 if device == "cpu" else 4  # products of two T × T × K; fused, the scores are made anew
    assert flops(lambda: attend().sum().backward()) == ATTENTION + backward * ATTENTION // 2
    shown = torch.ones(T, T, dtype=torch.bool, device=device)
    assert flops(lambda: F.scaled_dot_product_attention(q, k[:, :, :7], v[:, :, :7], shown[:, :7])) == ATTENTION * 7 // T


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("cell", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_operations_of_recurrent_layers(cell, gates, device):
    M = 6
    module = cell(D, M, 2, batch_first=True, device=device)
    once = 2 * B * T * gates * M * ((D + M) + (M + M))  # two layers: from the token and from the state
    assert flops(forward(module, tokens(device))) == once
    both = flops(forward_and_backward(module, tokens(device, grad=True)))
    first = 2 * B * gates * M * M * 2  # the zeros before the first token need no gradient; oneDNN makes it all the same
    assert both in (3 * once, 3 * once - first) and (both == 3 * once) == (cell is nn.LSTM and device == "cpu")


@pytest.mark.parametrize(
    "make",
    [
        lambda: TransformerLayer(D, H, causal=True, ffn_multiple=4),
        lambda: nn.TransformerEncoderLayer(D, H, 4 * D, batch_first=True).eval(),  # by default one kernel does it all
    ],
)
def test_operations_of_a_transformer_layer(make):
    linear = 2 * B * T * D * (3 * D + D + 4 * D + 4 * D)
    assert flops(forward(make(), tokens())) == linear + ATTENTION
    assert flops(forward_and_backward(make(), tokens(grad=True))) == 3 * linear + ATTENTION + 5 * ATTENTION // 2


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operations_of_a_mamba_layer(device):
    N, channels, rank = 16, 2 * D, 1
    with torch.device(device):
        layer = MambaLayer(D, N)
    linear = 2 * B * T * (D * 2 * channels + channels * (rank + 2 * N) + rank * channels + channels * D)
    scan = B * T * channels * N  # numbers that all states are; C_t · h_t multiplies and adds each once
    assert linear + 2 * scan <= flops(forward(layer, tokens(device))) <= linear + 3 * scan  # even chunks pad 13 tokens


def test_counting_leaves_torch_as_it_was():
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        for setting in (True, False):
            torch.backends.mha.set_fastpath_enabled(setting)
            with pytest.raises(ZeroDivisionError):
                flops(lambda: 1 / 0)
            assert torch.backends.mha.get_fastpath_enabled() is setting
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def test_seconds_takes_the_functions_in_turn():
    seen, threads = [], torch.get_num_threads()

    def run(name, pause):
        seen.append((name, torch.get_num_threads(), gc.isenabled()))
        time.sleep(pause)

    torch.set_num_threads(2)
    try:
        taken = seconds({"a": lambda: run("a", 0.001), "b": lambda: run("b", 0.02)}, rounds=3)
        assert torch.get_num_threads() == 2 and gc.isenabled()
    finally:
        torch.set_num_threads(threads)
    assert seen == [("a", 1, True), ("b", 1, True)] + [("a", 1, False), ("b", 1, False)] * 3  # once to warm up
    assert {name: len(times) for name, times in taken.items()} == {"a": 3, "b": 3}
    assert min(taken["a"]) >= 0.001 and 0.02 <= min(taken["b"]) < 0.2
    with pytest.raises(ValueError, match="at least one function and one round; got 1 and 0"):
        seconds({"a": dict}, rounds=0)


@pytest.fixture
def cases(tmp_path, monkeypatch):
    (tmp_path / "cases_of_memory.py").write_text("""
import os, signal
import torch

def ones(mebibytes, before=0):
    kept = torch.ones(32 * 2**18)
    freed = [torch.ones(2**18) for _ in range(before)]
    del freed
    def run():
        print("noise on stdout")
        assert torch.get_num_threads() == 1
        (torch.ones(mebibytes * 2**18) + kept[0]).sum()  # 1 MiB is 2**18 float32; two of them at the highest
    return run

def fails():
    raise LookupError("there is no such case")

def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)
""")
    monkeypatch.syspath_prepend(tmp_path)
    return "cases_of_memory:"


def test_peak_memory_sees_what_a_call_needs_and_not_what_was_there_before(cases):
    assert peak_memory(cases + "ones", 16, 64, warm_up=(1,)) == pytest.approx(32, abs=1.5)  # mebibytes; 64 were freed before


@pytest.mark.parametrize(
    ("name", "said"),
    [("fails", "cases_of_memory:fails failed: LookupError: there is no such case"), ("is_killed", "ended with exit code -9")],
)
def test_peak_memory_hands_errors_on(cases, name, said):
    with pytest.raises(RuntimeError, match=said):
        peak_memory(cases + name)
