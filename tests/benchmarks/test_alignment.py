"""Counting codes against states: one scatter-add, against the seed notebook's triple loop over the same positions.

    OMP_NUM_THREADS=1 pytest tests/benchmarks/test_alignment.py --benchmark-columns=min,median

The seed's section 5: 20 batches of 32 sequences of 32 tokens, 32 codes, 8 states; k = 4 codes a position as there, and
k = 1. `seed` is its loop as it stands in its last cells. `contingency` counts the same, `align` takes all of the
measures, with 99 permutations. Ratios are of the fastest rounds, one thread.
"""

import numpy as np
import pytest
import torch

from nsm_support.crystalline.codes.alignment import align, contingency

B, T, K, S = 20 * 32, 32, 32, 8
SECONDS: dict[tuple[int, str], float] = {}


def seed(all_hard_codes, all_states, num_states):
    alignment_matrix = np.zeros((all_hard_codes.shape[-1], num_states))
    for i in range(all_hard_codes.shape[0]):
        for j in range(all_hard_codes.shape[1]):
            state = all_states[i, j].item()
            active_codes = (all_hard_codes[i, j] > 0.5).nonzero(as_tuple=True)[0]
            for code_idx in active_codes:
                alignment_matrix[code_idx.item(), state] += 1
    return alignment_matrix


WAYS = {"seed": seed, "contingency": contingency, "align": align}  # the peer first


def table(reporter):
    reporter.write_line(f"\n\nHow many times faster than the seed's loop, {B:,} × {T} positions, {K} codes, {S} states:")
    for (k, name), seconds in SECONDS.items():
        reporter.write_line(f"k = {k}  {name:12} {seconds * 1e3:8.2f} ms {SECONDS[k, 'seed'] / seconds:7.1f}×")


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("k", [1, 4])
def test_alignment(benchmark, k, name):
    benchmark.group = f"alignment, k = {k}"
    generator = torch.Generator().manual_seed(0)
    hard = torch.zeros(B, T, K).scatter_(-1, torch.rand(B, T, K, generator=generator).topk(k).indices, 1)
    states = torch.randint(S, (B, T), generator=generator)
    found = benchmark.pedantic(WAYS[name], (hard, states, S), rounds=3 if name == "seed" else 15, warmup_rounds=1)
    assert np.array_equal(found.counts if name == "align" else found, contingency(hard, states, S))
    benchmark.extra_info |= {"B": B, "T": T, "K": K, "S": S, "k": k, "threads": torch.get_num_threads()}
    if benchmark.disabled:  # --benchmark-disable: run once, nothing timed
        return
    SECONDS[k, name] = benchmark.stats.stats.min
    if name != "seed":
        benchmark.extra_info["times faster than the seed"] = round(SECONDS[k, "seed"] / SECONDS[k, name], 1)
