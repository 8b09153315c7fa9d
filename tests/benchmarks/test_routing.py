"""Reading from and writing to 64 states, against full attention over T tokens: time and peak memory, one thread.

    OMP_NUM_THREADS=1 pytest tests/benchmarks/test_routing.py --benchmark-columns=min,median

`core` compares given queries, keys and values: routing against bare `scaled_dot_product_attention`; `module` compares
with all projections: the router against `torch.nn.MultiheadAttention` and x-transformers. `routing, twice` writes, then
routes anew to read, as a bidirectional layer does. `cross-attention` does the work of routing by two calls of
`scaled_dot_product_attention`, as a Perceiver or a Set Transformer would: the fair peer, not a slow one.
Ratios are of the fastest rounds, which other work on the machine disturbs least. Peak memory is what the process grows
by, inputs not counted, in a process of its own per case.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nsm_support.nsm import TokenToStateRouter, read_write
from nsm_support.nsm.routing import read, routing_logits, routing_weights, write

D, H, S = 128, 4, 64
LENGTHS = (256, 1024, 4096, 16_384)
PASSES = ("forward", "forward and backward")
OURS = ("routing", "routing, twice")
NAMES = {  # peers first: the ratios of ours are taken against them
    "core": ("attention", "cross-attention", *OURS),
    "module": ("nn.MultiheadAttention", "x-transformers", "routing"),
}
CASES = [(kind, T, run, name) for kind in NAMES for T in LENGTHS for run in PASSES for name in NAMES[kind]]
SECONDS: dict[tuple, float] = {}


def routing_twice(q, k, state_values, token_values):
    message, mass = write(routing_weights(routing_logits(q, k)), token_values)
    k, state_values = k + message, state_values + message  # any change of the states
    return read(routing_weights(routing_logits(q, k)), state_values), message, mass


def cross_attention(q, k, state_values, token_values):
    return F.scaled_dot_product_attention(q, k, state_values), F.scaled_dot_product_attention(k, q, token_values)


def build(kind: str, name: str, T: int):
    """The function of one case and the tensors that it takes."""
    torch.manual_seed(0)
    if kind == "core":
        tokens = [torch.randn(1, H, T, D // H) for _ in range(3)]
        states = [torch.randn(1, H, S, D // H) for _ in range(2)]
        if name == "attention":
            return F.scaled_dot_product_attention, tokens
        function = {"routing": read_write, "routing, twice": routing_twice, "cross-attention": cross_attention}[name]
        return function, [tokens[0], states[0], states[1], tokens[1]]
    tokens, states = torch.randn(1, T, D), torch.randn(1, S, D)
    if name == "nn.MultiheadAttention":
        attention = torch.nn.MultiheadAttention(D, H, batch_first=True)
        return lambda x: attention(x, x, x, need_weights=False)[0], [tokens]
    if name == "x-transformers":
        from x_transformers.x_transformers import Attention

        return Attention(D, dim_head=D // H, heads=H, flash=True), [tokens]
    router = TokenToStateRouter(D, D, S, H)

    def exchange(tokens, states):
        weights = router.route(tokens, states).weights
        written = router.write_tokens(weights, tokens)
        return router.read_states(weights, states), written.message, written.mass

    return exchange, [tokens, states]


def case(kind: str, T: int, run: str, name: str):
    """A function without arguments that does one pass."""
    function, inputs = build(kind, name, T)
    if run == "forward":

        def once():
            with torch.no_grad():
                function(*inputs)
    else:
        inputs = [x.requires_grad_() for x in inputs]

        def once():
            out = function(*inputs)
            outs = [x for x in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(x)]
            torch.autograd.backward(outs, [torch.ones_like(x) for x in outs])
            for x in inputs:
                x.grad = None

    return once


def peak_mebibytes(*case_of: str) -> float:
    """Peak growth of the resident memory over one pass, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *map(str, case_of)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _measure_here(kind: str, T: str, run: str, name: str) -> float:
    torch.set_num_threads(1)
    case(kind, 64, run, name)()  # load the kernels
    once = case(kind, int(T), run, name)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
    except OSError as error:
        raise SystemExit(f"peak memory is read from Linux's /proc: {error}") from error

    def kibibytes(field):
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
        return int(line.split()[1])

    before = kibibytes("VmRSS")
    once()
    return round((kibibytes("VmHWM") - before) / 1024, 2)


def table(reporter):
    reporter.write_line("\n\nHow many times faster (fastest round), D = 128, 4 heads, 64 states, batch 1, one thread:")
    for (kind, T, run, name), seconds in SECONDS.items():
        if name in OURS:
            peers = [peer for peer in NAMES[kind] if peer not in OURS and (kind, T, run, peer) in SECONDS]
            ratios = ", ".join(f"{SECONDS[kind, T, run, peer] / seconds:6.1f}× {peer}" for peer in peers)
            reporter.write_line(f"{kind:6} T = {T:6,} {run:20} {name:14} {seconds * 1e3:8.2f} ms  {ratios}")


@pytest.mark.parametrize(("kind", "T", "run", "name"), CASES)
def test_routing(benchmark, kind, T, run, name):
    benchmark.group = f"{kind}, T = {T:,}, {run}"
    once = case(kind, T, run, name)
    benchmark.pedantic(once, rounds=5 if T > 4096 else 15, warmup_rounds=1, iterations=max(1, 2048 // T))
    benchmark.extra_info |= {"T": T, "D": D, "heads": H, "states": S, "threads": torch.get_num_threads()}
    benchmark.extra_info["peak_mebibytes"] = peak_mebibytes(kind, T, run, name)
    if benchmark.disabled:  # --benchmark-disable: run once, nothing timed
        return
    SECONDS[kind, T, run, name] = benchmark.stats.stats.min
    if name in OURS:
        for peer in NAMES[kind]:
            if peer not in OURS and (kind, T, run, peer) in SECONDS:
                ratio = SECONDS[kind, T, run, peer] / SECONDS[kind, T, run, name]
                benchmark.extra_info[f"times faster than {peer}"] = round(ratio, 2)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(json.dumps(_measure_here(*sys.argv[1:])))
