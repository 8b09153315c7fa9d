"""A training step of the crystalline transformer at the seed's size, and a codebook lookup, beside their peers: one thread.

    OMP_NUM_THREADS=1 pytest tests/benchmarks/test_crystalline.py --benchmark-columns=min,median

`plain` is the loop of the seed notebook written the straightforward way, and frozen here: attention with a mask, soft
codes and hard codes as matrices, one loop over parameters in the optimiser. `without bottlenecks` is our transformer with
every bottleneck replaced by the identity; what is above it is the bottlenecks' share of a step. The lookup stands beside
vector-quantize-pytorch's (cosine codebook of 512 codes, evaluation). Ratios are of the fastest rounds, taken in one run.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vector_quantize_pytorch import VectorQuantize

from nsm_support.crystalline.codes.bottleneck import Bottleneck, BottleneckConfig, commitment_loss, compression_loss
from nsm_support.crystalline.codes.transformer import CrystallineConfig, CrystallineTransformer

V, D, LAYERS, HEADS, K, BATCH, T = 24, 128, 3, 4, 32, 32, 32
STEPS = ("plain", "without bottlenecks", "ours")
LOOKUPS = [(tokens, k, name) for tokens in (1024, 4096) for k in (1, 4) for name in ("vector-quantize-pytorch", "ours")]
SECONDS: dict[tuple, float] = {}


class PlainBottleneck(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.codebook, self.scale = nn.Parameter(torch.randn(K, D)), nn.Parameter(torch.tensor(10.0))
        self.k, self._temperature = k, 2.0

    def forward(self, x):
        logits = self.scale * (F.normalize(x, dim=-1) @ F.normalize(self.codebook, dim=-1).T)
        soft_codes = F.softmax(logits, dim=-1)
        noise = -torch.log(-torch.log(torch.rand_like(logits) + 1e-10) + 1e-10)
        relaxed = F.softmax((logits + noise) / self._temperature, dim=-1)
        best = relaxed.topk(self.k, dim=-1).indices
        hard_codes = torch.zeros_like(relaxed).scatter(-1, best, 1.0)
        codes = hard_codes / self.k - relaxed.detach() + relaxed
        output = codes @ self.codebook
        entropy = -(soft_codes * torch.log(soft_codes + 1e-10)).sum(-1).mean() / math.log(K)
        return output, {"soft_codes": soft_codes, "hard_codes": hard_codes, "entropy": entropy, "input": x, "output": output}


class PlainAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(D, D) for _ in range(4))
        self.register_buffer("mask", torch.ones(T, T, dtype=torch.bool).tril())

    def forward(self, x):
        q, k, v = (layer(x).view(BATCH, T, HEADS, -1).transpose(1, 2) for layer in (self.query, self.key, self.value))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights = F.softmax(scores.masked_fill(~self.mask, float("-inf")), dim=-1)
        return self.out((weights @ v).transpose(1, 2).contiguous().view(BATCH, T, D))


class PlainBlock(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.attn, self.attn_norm, self.mlp_norm = PlainAttention(), nn.LayerNorm(D), nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
        self.attn_bottleneck, self.mlp_bottleneck = PlainBottleneck(k), PlainBottleneck(k)

    def forward(self, x):
        attn, attn_info = self.attn_bottleneck(self.attn(self.attn_norm(x)))
        x = x + attn
        mlp, mlp_info = self.mlp_bottleneck(self.mlp(self.mlp_norm(x)))
        return x + mlp, {"attn": attn_info, "mlp": mlp_info}


class PlainTransformer(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, D), nn.Embedding(T, D)
        self.blocks = nn.ModuleList(PlainBlock(k) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V)

    def forward(self, tokens):
        x, infos = self.tokens(tokens) + self.positions(torch.arange(T)), []
        for block in self.blocks:
            x, info = block(x)
            infos.append(info)
        return self.head(self.norm(x)), infos


def plain_losses(infos):
    compress = commit = torch.tensor(0.0)
    for layer in infos:
        for name in ("attn", "mlp"):
            p = layer[name]["soft_codes"]
            compress = compress - (p * torch.log(p + 1e-10)).sum(-1).mean()
            commit = commit + F.mse_loss(layer[name]["input"], layer[name]["output"].detach())
    return compress, commit


def our_losses(infos):
    compress = commit = torch.tensor(0.0)
    for layer in infos:
        for name in ("attn", "mlp"):
            compress = compress + compression_loss(layer[name]["soft_codes"])
            commit = commit + commitment_loss(layer[name]["input"], layer[name]["output"])
    return compress, commit


class Identity(nn.Module):
    def forward(self, x):
        return x, None


def build(name: str, k: int):
    """A model, and the function that adds up its bottlenecks' losses."""
    torch.manual_seed(0)
    if name == "plain":
        return PlainTransformer(k), plain_losses
    bottleneck = BottleneckConfig(codebook_size=K, num_codes_k=k, lay_every=2)
    model = CrystallineTransformer(
        CrystallineConfig(vocab_size=V, token_dim=D, num_layers=LAYERS, num_heads=HEADS, max_length=T, bottleneck=bottleneck)
    )
    if name == "ours":
        return model, our_losses
    for block in model.blocks:
        block.attn_bottleneck, block.mlp_bottleneck = Identity(), Identity()
    return model, lambda infos: (0.0, 0.0)


def table(reporter):
    reporter.write_line(f"\n\nAt the seed's size (D = {D}, {LAYERS} blocks, {K} codes), one thread, fastest rounds:")
    for (what, *setting, name), seconds in SECONDS.items():
        if name == "ours":
            peer = SECONDS[(what, *setting, {"step": "plain", "lookup": "vector-quantize-pytorch"}[what])]
            share = f", bottlenecks {1 - SECONDS[(what, *setting, STEPS[1])] / seconds:.1%} of it" if what == "step" else ""
            reporter.write_line(f"{what:7} {setting} {seconds * 1e3:8.3f} ms {peer / seconds:6.2f}×{share}")


@pytest.mark.parametrize(("name", "k"), [(name, k) for k in (4, 1) for name in STEPS])
def test_training_step(benchmark, name, k):
    model, losses = build(name, k)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=name != "plain")
    inputs, targets = torch.randint(V, (2, BATCH, T), generator=torch.Generator().manual_seed(0))

    def step():
        logits, infos = model(inputs)
        compress, commit = losses(infos)
        loss = F.cross_entropy(logits.reshape(-1, V), targets.reshape(-1)) + (0.01 * compress + 0.25 * commit) / (2 * LAYERS)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    for _ in range(3):  # by then the codes are laid
        step()
    if name == "ours":
        for module in model.modules():
            if isinstance(module, Bottleneck):
                module.config = replace(module.config, lay_every=100)
    benchmark.group = f"training step, k = {k}"
    benchmark.pedantic(step, rounds=40, warmup_rounds=2)
    if benchmark.disabled:  # --benchmark-disable: run once, nothing timed
        return
    SECONDS["step", k, name] = benchmark.stats.stats.min
    if name == "ours":
        ours = SECONDS["step", k, name]
        benchmark.extra_info["times faster than plain"] = round(SECONDS["step", k, "plain"] / ours, 2)
        benchmark.extra_info["bottlenecks' share"] = round(1 - SECONDS["step", k, "without bottlenecks"] / ours, 3)


@pytest.mark.parametrize(("tokens", "k", "name"), LOOKUPS)
def test_lookup(benchmark, tokens, k, name):
    torch.manual_seed(0)
    x = torch.randn(tokens // 32, 32, D)
    if name == "ours":
        lookup = Bottleneck(D, BottleneckConfig(codebook_size=512, num_codes_k=k)).eval().lookup
    else:
        peer = VectorQuantize(dim=D, codebook_size=512, use_cosine_sim=True).eval()
        lookup = peer if k == 1 else lambda x: peer(x, topk=k)

    def once():
        with torch.no_grad():
            lookup(x)

    benchmark.group = f"lookup of {tokens:,} tokens in 512 codes, k = {k}"
    benchmark.pedantic(once, rounds=60, warmup_rounds=3)
    if benchmark.disabled:
        return
    SECONDS["lookup", tokens, k, name] = benchmark.stats.stats.min
    if name == "ours":
        ratio = SECONDS["lookup", tokens, k, "vector-quantize-pytorch"] / SECONDS["lookup", tokens, k, name]
        benchmark.extra_info["times faster than vector-quantize-pytorch"] = round(ratio, 2)
