"""A training step of whole models of equal size, and one streamed token after 100 and after 100,000: one thread.

    OMP_NUM_THREADS=1 pytest tests/benchmarks/test_models.py --benchmark-columns=min,median

Every model has about the parameters of a Transformer of width 64 with two layers over 64 tokens. Peers by name:
`torch.nn.TransformerEncoder`, x-transformers, `torch.nn.LSTM`, this book's Transformer (rotary) and Mamba; mambapy and
transformers' Mamba stand in `test_scan.py`. Ratios are of the fastest rounds, taken in one run.
"""

import numpy as np
import pytest
import torch
from torch import nn

from nsm_support.studies import benchmark

V, D, LAYERS, HEADS = 64, 64, 2, 4
LENGTHS = (256, 4096, 16_384)
CAUSAL = ("NSM", "Transformer", "Mamba", "LSTM", "nn.TransformerEncoder", "x-transformers")
BOTH_WAYS = ("NSM", "Transformer", "nn.TransformerEncoder", "x-transformers")
CASES = [(T, causal, name) for T in LENGTHS for causal in (True, False) for name in (CAUSAL if causal else BOTH_WAYS)]
SECONDS: dict[tuple, float] = {}


class Encoder(nn.Module):
    """`nn.TransformerEncoder` between an embedding and a head."""

    def __init__(self, causal: bool, T: int):
        super().__init__()
        self.mask = nn.Transformer.generate_square_subsequent_mask(T)
        layer = nn.TransformerEncoderLayer(D, HEADS, 4 * D, 0.0, "gelu", batch_first=True, norm_first=True)
        self.embed, self.head, self.causal = nn.Embedding(V, D), nn.Linear(D, V), causal
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, inputs):
        mask = self.mask if self.causal else None
        return self.head(self.layers(self.embed(inputs), mask=mask, is_causal=self.causal))


def network(name: str, T: int, causal: bool) -> nn.Module:
    if name == "nn.TransformerEncoder":
        return Encoder(causal, T)
    if name == "x-transformers":
        from x_transformers import Decoder, TransformerWrapper
        from x_transformers import Encoder as XEncoder

        layers = (Decoder if causal else XEncoder)(
            dim=D, depth=LAYERS, heads=HEADS, attn_dim_head=D // HEADS, rotary_pos_emb=True, attn_flash=True
        )
        return TransformerWrapper(num_tokens=V, max_seq_len=T, attn_layers=layers, use_abs_pos_emb=False)
    return benchmark.cost_model(name, causal)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[2]}-{case[0]}-{'causal' if case[1] else 'both ways'}")
def test_training_step(benchmark, case):
    T, causal, name = case
    torch.manual_seed(0)
    model, inputs = network(name, T, causal), torch.randint(V, (1, T))

    def step():
        model.zero_grad()
        nn.functional.cross_entropy(model(inputs).flatten(0, 1), inputs.flatten()).backward()

    benchmark.pedantic(step, rounds=9 if T < 4096 else 3, warmup_rounds=1)
    SECONDS[case] = benchmark.stats.stats.min
    ours = SECONDS.get((T, causal, "NSM"))
    if name != "NSM" and ours is not None:
        benchmark.extra_info["times as long as NSM's"] = round(SECONDS[case] / ours, 2)
        print(f"\n{name}, T = {T:,}, {'causal' if causal else 'both ways'}: {SECONDS[case] / ours:.2f} × NSM's step")


def test_streamed_token_after_a_hundred_thousand(benchmark):
    """A real stream of 100,100 tokens: the steps around token 100 against those at its end."""
    import time

    model = network("NSM", 4096, True).eval()
    tokens = torch.randint(V, (100_100,), generator=torch.Generator().manual_seed(0))
    seconds = []

    @torch.no_grad()
    def walk():
        stream = model.start(1)
        for token in tokens:
            start = time.perf_counter()
            stream = model.step(token[None], stream)[1]
            seconds.append(time.perf_counter() - start)

    benchmark.pedantic(walk, rounds=1)
    early, late = np.median(seconds[100:1124]), np.median(seconds[-1024:])  # eight chunks of 128 each
    benchmark.extra_info.update(early=early, late=late, ratio=late / early)
    print(f"\nper token: {1e3 * early:.3f} ms at token 100, {1e3 * late:.3f} ms at 100,000: {late / early:.3f}")
