"""A BlockFFN layer that touches active blocks only, against its own dense path and transformers' experts: time, one thread.

    OMP_NUM_THREADS=1 pytest tests/benchmarks/test_blockffn.py --benchmark-columns=min,median

D = 256, 32 blocks of 128, router included. `dense` is the layer with `path="dense"`, `transformers` its `grouped_mm`
experts on this layer's scores, `BlockFFN` the layer as it is, which chooses its path. At 90 % sparsity a token uses 3 or 4
blocks, 3.2 in the mean (one token alone: 3), at 70 % 9 or 10 (9). Experts are chosen by top-k, of one k for all tokens: 3 and
10, so at 90 % they do a little less work. `local`: all tokens use the same blocks. `all`: every block is used; there is
nothing to win. `dense, in parts` takes 512 tokens at a time through the dense path, whose hidden numbers then stay nearer
to the processor: without it, a ratio to `dense` may pass what the sparsity alone can give (10 at 90 %). Ratios are of the
fastest rounds, by the processor time of this process.
"""

import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nsm_support.blockffn.ffn import BlockFFN

D, E, WIDTH = 256, 32, 128
MEAN = {"90 %": 3.2, "90 %, local": 3.2, "70 %": 9.6, "all": E}  # blocks that a token uses
NAMES = ("dense", "dense, in parts", "transformers", "BlockFFN")  # peers first: the ratios of ours are taken against them
SETTINGS = [
    *((T, sparsity, "forward") for T in (1, 8, 64, 512, 4096) for sparsity in MEAN if T != 1 or "local" not in sparsity),
    *((T, sparsity, "forward and backward") for T in (512, 4096) for sparsity in MEAN if "local" not in sparsity),
]
SOME = {
    "transformers": lambda T, sparsity, run: sparsity in ("90 %", "70 %"),
    "dense, in parts": lambda T, sparsity, run: T > 512 and run == "forward",
}
CASES = [(*setting, name) for setting in SETTINGS for name in NAMES if name not in SOME or SOME[name](*setting)]
SECONDS: dict[tuple, float] = {}


def layer_and_tokens(T: int, sparsity: str) -> tuple[BlockFFN, torch.Tensor]:
    """Tokens of which the router gives each its number of blocks: what lies in the span of its weights is set to that."""
    torch.manual_seed(0)
    layer, generator = BlockFFN(D, E, WIDTH), torch.Generator().manual_seed(T)
    count = torch.full((T, 1), int(MEAN[sparsity]))
    count[torch.arange(T) % 5 < round(5 * (MEAN[sparsity] % 1)), 0] += 1
    if T == 1:
        count[:] = int(MEAN[sparsity])
    order = torch.rand(1 if "local" in sparsity else T, E, generator=generator).argsort(-1).expand(T, E)
    wanted = torch.rand(T, E, generator=generator) + 0.1
    wanted = torch.where(order.argsort(-1) < count, wanted, -wanted)
    noise, weight = torch.randn(T, D, generator=generator), layer.router_proj.weight.detach()
    tokens = noise + (wanted - noise @ weight.T) @ torch.linalg.pinv(weight).T
    assert torch.equal((layer.route(tokens).scores > 0).sum(-1, keepdim=True), count)
    return layer, tokens


def case(T: int, sparsity: str, run: str, name: str):
    """A function without arguments that does one pass."""
    layer, tokens = layer_and_tokens(T, sparsity)
    function = layer
    if "dense" in name:
        layer.path = "dense"
    if name == "dense, in parts":

        def function(x):
            return torch.cat([layer(part) for part in x.split(512)])

    if name == "transformers":
        from transformers.integrations.moe import grouped_mm_experts_forward

        options = dict.fromkeys(("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel"), False)
        experts = SimpleNamespace(
            num_experts=E,
            act_fn=F.silu,
            up_proj=layer.up_proj.view(E, WIDTH, D),
            down_proj=layer.down_proj.view(D, E, WIDTH).permute(1, 0, 2),
            **options,
        )

        def function(x):
            best = layer.route(x).scores.topk(round(MEAN[sparsity]), dim=-1)
            return grouped_mm_experts_forward(experts, x, best.indices, best.values)

    if run == "forward":

        def once():
            with torch.no_grad():
                function(tokens)
    else:
        tokens.requires_grad_()

        def once():
            function(tokens).sum().backward()
            layer.zero_grad()
            tokens.grad = None

    return once


def _ratios(setting: tuple) -> dict[str, float]:
    """How many times longer each peer takes than ours."""
    return {peer: SECONDS[*setting, peer] / SECONDS[*setting, NAMES[-1]] for peer in NAMES[:-1] if (*setting, peer) in SECONDS}


def table(reporter):
    reporter.write_line(f"\n\nHow many times faster (fastest round), D = {D}, {E} blocks of {WIDTH}, one thread:")
    for T, sparsity, run, name in SECONDS:
        if name == NAMES[-1]:
            ratios = ", ".join(f"{ratio:5.2f}× {peer}" for peer, ratio in _ratios((T, sparsity, run)).items())
            reporter.write_line(f"T = {T:5,}  {sparsity:12} {run:20} {SECONDS[T, sparsity, run, name] * 1e3:8.3f} ms  {ratios}")


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize(("T", "sparsity", "run", "name"), CASES)
def test_blockffn(benchmark, T, sparsity, run, name):
    benchmark.group = f"T = {T:,}, {sparsity}, {run}"
    rounds = 5 if T > 512 else 15
    benchmark.pedantic(case(T, sparsity, run, name), rounds=rounds, warmup_rounds=1, iterations=max(1, 256 // T))
    benchmark.extra_info |= {"T": T, "D": D, "E": E, "F": WIDTH, "threads": torch.get_num_threads()}
    if benchmark.disabled:  # --benchmark-disable: run once, nothing timed
        return
    SECONDS[T, sparsity, run, name] = benchmark.stats.stats.min
    if name == NAMES[-1]:
        for peer, ratio in _ratios((T, sparsity, run)).items():
            benchmark.extra_info[f"times faster than {peer}"] = round(ratio, 2)
