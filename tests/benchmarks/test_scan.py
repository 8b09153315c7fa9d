"""The scans and a Mamba mixer against mambapy and transformers: time and peak memory, one thread.

    OMP_NUM_THREADS=1 pytest tests/benchmarks/test_scan.py --benchmark-columns=min,median

`scan`: `selective_scan` against mambapy's (its parallel scan), batch 4, 256 channels, states 16 wide. `SSD`: `ssd_scan`
against the path that transformers' Mamba-2 takes on a CPU, at the default chunk of each (64 and 256), batch 1, 8 heads of
64, states 128 wide. `mixer`: `MambaBlock` against mambapy's and transformers', batch 8, tokens 64 wide; the loop over
tokens of transformers is at least quadratic in the length under autograd, so it stops at 256 tokens. In each all compute
the same function (tests/support/test_scan.py, tests/support/test_mamba.py).
Time is what the processor spends on this process, which other
work on the machine disturbs least; ratios are of the fastest rounds. Memory is what a fresh process grows by in one pass,
inputs not counted (`costs.peak_memory`).
"""

import time

import pytest
import torch
import torch.nn.functional as F

from nsm_support import costs
from nsm_support.mixers.mamba import MambaBlock
from nsm_support.mixers.scan import selective_scan, ssd_scan

PASSES = ("forward", "forward and backward")
NAMES = {  # peers first: the ratios of ours are taken against them
    "scan": ("mambapy", "selective_scan"),
    "SSD": ("transformers", "ssd_scan"),
    "mixer": ("mambapy", "transformers", "MambaBlock"),
}
LENGTHS = {"scan": (1024, 4096), "SSD": (1024, 4096), "mixer": (64, 256, 1024)}
CASES = [(kind, T, run, name) for kind in NAMES for T in LENGTHS[kind] for run in PASSES for name in NAMES[kind]]
CASES = [(kind, T, *rest, name) for kind, T, *rest, name in CASES if (kind, name) != ("mixer", "transformers") or T <= 256]
SECONDS: dict[tuple, float] = {}
MEMORY: dict[tuple, float] = {}


def scan_of(name: str, T: int):
    """u, delta, A, B, C, D as each takes them; delta as a Mamba has it at its start, A = −(1 … 16)."""
    u, delta, A, B, C, D = (torch.randn(*size) for size in ((4, 256, T), (4, 256, T), (256, 16), (4, 16, T), (4, 16, T), (256,)))
    delta, A = F.softplus(delta - 3), -torch.arange(1.0, 17).expand_as(A).contiguous()
    if name == "selective_scan":
        return selective_scan, [u, delta, A, B, C, D]
    from mambapy.mamba import MambaBlock as Mixer

    u, delta, B, C = (x.mT.contiguous() for x in (u, delta, B, C))
    return lambda *inputs: Mixer.selective_scan(None, *inputs), [u, delta, A, B, C, D]


def ssd_of(name: str, T: int):
    x, delta, A, B, C = (torch.randn(*size) for size in ((1, T, 8, 64), (1, T, 8), (8,), (1, T, 1, 128), (1, T, 1, 128)))
    inputs = [x, F.softplus(delta - 3), -1 - 15 * A.sigmoid(), B, C]
    if name == "ssd_scan":
        return ssd_scan, inputs
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    return lambda *inputs: mamba2_chunk_scan(*inputs, chunk_size=Mamba2Config().chunk_size), inputs


def mixer_of(name: str, T: int):
    D, N = 64, 16
    ours = MambaBlock(D, state_dim=N)
    if name == "MambaBlock":
        mixer = ours
    elif name == "mambapy":
        from mambapy.mamba import MambaBlock as Mixer
        from mambapy.mamba import MambaConfig

        mixer = Mixer(MambaConfig(D, n_layers=1, d_state=N))
    else:
        from transformers import MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer

        mixer = MambaMixer(MambaConfig(hidden_size=D, state_size=N, num_hidden_layers=1), 0)
    mixer.load_state_dict(ours.state_dict())
    return lambda tokens, *_: mixer(tokens), [torch.randn(8, T, D), *mixer.parameters()]


def case(kind: str, T: int, run: str, name: str):
    """A function without arguments that does one pass."""
    torch.manual_seed(0)
    function, inputs = {"scan": scan_of, "SSD": ssd_of, "mixer": mixer_of}[kind](name, T)
    if run == "forward":

        def once():
            with torch.no_grad():
                function(*inputs)
    else:
        for x in inputs:
            x.requires_grad_()

        def once():
            function(*inputs).sum().backward()
            for x in inputs:
                x.grad = None

    return once


def table(reporter):
    reporter.write_line("\n\nHow many times faster (fastest round), and how many times less memory, one thread:")
    for kind, T, run, name in SECONDS:
        if name == NAMES[kind][-1]:
            ours = SECONDS[kind, T, run, name], MEMORY[kind, T, run, name]
            ratios = [
                f"{SECONDS[kind, T, run, peer] / ours[0]:5.1f}× and {MEMORY[kind, T, run, peer] / ours[1]:4.1f}× {peer}"
                for peer in NAMES[kind][:-1]
                if (kind, T, run, peer) in SECONDS
            ]
            start = f"{kind:5} T = {T:5,} {run:20} {ours[0] * 1e3:8.2f} ms {ours[1]:7.1f} MiB"
            reporter.write_line(f"{start}  {', '.join(ratios)}")


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize(("kind", "T", "run", "name"), CASES)
def test_scan(benchmark, kind, T, run, name):
    benchmark.group = f"{kind}, T = {T:,}, {run}"
    benchmark.pedantic(case(kind, T, run, name), rounds=5, warmup_rounds=1)
    benchmark.extra_info |= {"T": T, "threads": torch.get_num_threads()}
    if benchmark.disabled:  # --benchmark-disable: run once, nothing timed
        return
    key = kind, T, run, name
    SECONDS[key] = benchmark.stats.stats.min
    MEMORY[key] = costs.peak_memory(f"{__name__}:case", *key, warm_up=(kind, 64, run, name))
    benchmark.extra_info["peak_mebibytes"] = round(MEMORY[key], 1)
    if name == NAMES[kind][-1]:
        for peer in NAMES[kind][:-1]:
            if (kind, T, run, peer) in SECONDS:
                benchmark.extra_info[f"times faster than {peer}"] = round(SECONDS[kind, T, run, peer] / SECONDS[key], 2)
