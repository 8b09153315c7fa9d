"""Tokens hidden from later ones, against a plain re-computation; word classes; rank correlations against SciPy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import rankdata, spearmanr

from nsm_support.blockffn.attention import rotate_half
from nsm_support.blockffn.model import BlockFFNConfig, BlockFFNModel
from nsm_support.blockffn.signals import RoutingExtractor
from nsm_support.studies.token_importance import (
    chapter_weights,
    hidden_from_later,
    mask_importance,
    observe,
    percentile_interval,
    rank_correlations,
    weighted_ranks,
    word_classes,
)
from tests.support.draws import numbers

LATENT = {"attention_type": "mla", "qk_nope_head_dim": 10, "qk_rope_head_dim": 4, "q_lora_rank": 12, "kv_lora_rank": 6}
KINDS = pytest.mark.parametrize("options", [{}, {"num_key_value_heads": 2}, LATENT], ids=["block", "grouped", "latent"])


def make(**options):
    sizes = {"vocab_size": 23, "token_dim": 32, "num_layers": 3, "num_experts": 6, "expert_size": 5}
    torch.manual_seed(0)
    model = BlockFFNModel(BlockFFNConfig(**sizes | {"dim_model_base": 16} | options)).double()
    for layer in model.layers:
        layer.mlp.path = "dense"  # one order of sums for any token
    return model


def random(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(0, 1)


def logits_of(model, tokens, positions):
    """One row of tokens [T] that stand at `positions` [T], by softmax over what comes before: [T,V]. Ordinary attention."""
    config = model.config
    x = model.model.embed_tokens(tokens) * config.scale_emb
    for layer in model.layers:
        a, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = heads(a.q_proj(h), a.num_heads), *(heads(p(h), a.num_key_value_heads) for p in (a.k_proj, a.v_proj))
        q, k = (rotate_half(one[None], positions, config.rope_theta)[0] for one in (q, k))
        k, v = (one.repeat_interleave(a.num_heads // a.num_key_value_heads, 0) for one in (k, v))
        score = q @ k.mT / math.sqrt(q.shape[-1])
        score = score.masked_fill(torch.ones_like(score).triu(1).bool(), -torch.inf)
        x = x + layer.scale * a.o_proj((score.softmax(-1) @ v).transpose(0, 1).flatten(-2))
        x = x + layer.scale * layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x) / (config.token_dim / config.dim_model_base))


@KINDS
@torch.no_grad()
def test_later_outputs_know_nothing_of_a_hidden_token(options):
    model, tokens, places = make(**options), numbers(3, 17), torch.tensor([5, 0, 11])
    changed = tokens.clone()
    for row, place in enumerate(places):
        changed[row, place] = (changed[row, place] + 1) % 23
    plain = model(tokens)
    with hidden_from_later(model, places):
        before, after = model(tokens), model(changed)
    for row, place in enumerate(places):
        assert torch.equal(before[row, place + 1 :], after[row, place + 1 :])
        torch.testing.assert_close(before[row, : place + 1], plain[row, : place + 1])
        assert (before[row, place + 1 :] - plain[row, place + 1 :]).abs().amax(-1).min() > 1e-4, "all others saw it"
    assert torch.equal(model(tokens), plain), "and the model is as it was"


@torch.no_grad()
def test_importance_is_what_later_tokens_lose():
    model, windows, horizon = make(), numbers(2, 18), 4  # T = 17
    places = torch.tensor([[0, 5, 12], [3, 4, 9]])
    found = mask_importance(model, windows, places, horizon, batch_size=4)
    for row, some in zip(windows, places, strict=True):
        for t in some:
            others = torch.arange(17)[torch.arange(17) != t]
            without, plain = logits_of(model, row[others], others).log_softmax(-1), model(row[None, :-1])[0].log_softmax(-1)
            lost = [plain[s, row[s + 1]] - without[s - 1, row[s + 1]] for s in range(t + 1, t + 1 + horizon)]
            at = (places == t).nonzero()[0]
            torch.testing.assert_close(found[tuple(at)], torch.stack(lost).mean())
    torch.testing.assert_close(mask_importance(model, windows, places, horizon, batch_size=1), found)
    assert found.abs().min() > 1e-6


@pytest.mark.parametrize(("place", "horizon"), [(13, 4), (-1, 4), (3, 0)])
def test_places_need_their_horizon(place, horizon):
    with pytest.raises(ValueError, match=r"windows of 17 tokens.*got"):
        mask_importance(make(), numbers(1, 18), torch.tensor([[place]]), horizon)


@torch.no_grad()
def test_observed_row_by_row():
    model, windows = make(), numbers(5, 14)
    seen = observe(model, windows, batch_size=2)
    assert seen.sparsity.shape == (3, 5, 13)
    for row, tokens in enumerate(windows):
        losses = F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="none")
        torch.testing.assert_close(seen.losses[row], losses)
        with RoutingExtractor(model) as extractor:
            recorded = extractor(tokens[None, :-1])[:, 0]
        torch.testing.assert_close(seen.activations[:, row], recorded)
        torch.testing.assert_close(seen.sparsity[:, row], (recorded <= 0).double().mean(-1))


def test_words_by_what_tokens_cover():
    content = "And the king’s men went, 12 of them:\nUnto Zion"
    spans = {
        "function": [(0, 3), (3, 7), (27, 30), (31, 35), (37, 41)],
        "content": [(7, 14), (14, 18), (41, 46)],
        "part": [(7, 12), (12, 14)],
        "mark": [(23, 24), (24, 27), (35, 36), (36, 37)],
    }
    for kind, some in spans.items():
        assert word_classes(content, some) == [kind] * len(some)
    assert word_classes(content, [(18, 21), (14, 23), (27, 35)]) == ["part"] * 3, "less, or more, than a word"


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_of_weighted_samples(ties):
    values = numbers(40, below=5).double() if ties else random(40)
    weights = torch.stack((torch.ones(40), *numbers(6, 40, below=4, seed=1))).double()
    found = weighted_ranks(values, weights)
    for ranks, times in zip(found, weights.long(), strict=True):
        repeated = values.repeat_interleave(times)
        expected = (rankdata(repeated) - 0.5) / len(repeated)
        assert ranks.repeat_interleave(times).numpy() == pytest.approx(expected)


def test_correlations_are_spearmans_of_the_repeated_sample():
    signals = torch.stack((numbers(60, below=7).double(), random(60)))
    measures = torch.stack((random(60, seed=1), signals[0] + random(60, seed=2), -signals[1]))
    weights = torch.cat((torch.ones(1, 60), numbers(99, 60, below=3, seed=3))).double()  # more than one chunk of samples
    found = rank_correlations(signals, measures, weights)
    assert found.shape == (100, 2, 3) and found[:, 1, 2].tolist() == pytest.approx([-1] * 100)
    for r in (0, 1, 70, 99):
        times = weights[r].long()
        for s in range(2):
            for m in range(3):
                expected = spearmanr(signals[s].repeat_interleave(times), measures[m].repeat_interleave(times)).statistic
                assert found[r, s, m].item() == pytest.approx(expected)


def test_partial_correlation_is_that_of_residuals():
    """Of ranks, after least squares on one indicator a group."""
    groups, noise = numbers(80, below=9), random(80)
    signal, measure = groups + noise, groups + random(80, seed=1) - 0.3 * noise
    weights = torch.stack((torch.ones(80), numbers(80, below=3, seed=2))).double()
    found = rank_correlations(signal[None], measure[None], weights, groups * 5)[:, 0, 0]
    for value, times in zip(found, weights.long(), strict=True):
        indicators = np.eye(9)[groups.repeat_interleave(times)]
        residuals = []
        for values in (signal, measure):
            ranks = rankdata(values.repeat_interleave(times))
            residuals.append(ranks - indicators @ np.linalg.lstsq(indicators, ranks, rcond=None)[0])
        assert value.item() == pytest.approx(np.corrcoef(*residuals)[0, 1])
    assert rank_correlations(signal[None], measure[None], weights)[0, 0, 0] > 0.8 and found[0] < 0


def test_what_never_changes_has_no_correlation():
    x, y, weights = random(1, 6), torch.tensor([[0.0, 0, 0, 0, 1, 1]]), torch.ones(2, 6).double()
    weights[1, 4:] = 0
    drawn = rank_correlations(x, y, weights)
    assert drawn[0].isfinite().all() and drawn[1].isnan().all(), "a resample that holds no 1"
    with pytest.raises(ValueError, match="never changes"):
        rank_correlations(x, y * 0, weights)
    with pytest.raises(ValueError, match="never changes"):
        rank_correlations(x, y, weights, y[0].long())
    with pytest.raises(ValueError, match="measures hold 1"):
        rank_correlations(x, y.masked_fill(torch.arange(6) == 2, torch.nan), weights)


def test_chapters_are_drawn_whole():
    chapters = numbers(200, below=7)
    weights = chapter_weights(chapters, 400, torch.Generator().manual_seed(0))
    assert weights.shape == (401, 200) and torch.equal(weights[0], torch.ones(200).double())
    times = torch.stack([weights[:, chapters == c].mean(1) for c in range(7)], 1)
    assert torch.equal(weights, times[:, chapters]), "all tokens of a chapter alike"
    assert torch.equal(times.sum(1), torch.full((401,), 7.0).double())
    assert times[1:].mean(0).tolist() == pytest.approx([1] * 7, abs=0.2) and times[1:].var() > 0.5


def test_interval_holds_95_of_100_resamples():
    draws = torch.cat((torch.tensor([500.0]), torch.arange(1001.0), torch.tensor([torch.nan]))).double()
    assert percentile_interval(draws).tolist() == pytest.approx([500, 25, 975])
    draws[0] = 2000
    assert percentile_interval(draws).tolist() == pytest.approx([2000, 25, 2000]), "and its estimate"


def test_interval_covers_where_tokens_of_a_chapter_are_alike():
    """20 copies of one token a chapter: 95 % of intervals hold the truth; drawn by tokens, few would."""
    generator, held, held_by_tokens = torch.Generator().manual_seed(0), 0, 0
    for _ in range(60):
        x, y = (torch.randn(30, dtype=torch.float64, generator=generator).repeat_interleave(20)[None] for _ in range(2))
        for name, owner in (("chapters", torch.arange(30).repeat_interleave(20)), ("tokens", torch.arange(600))):
            drawn = rank_correlations(x, y, chapter_weights(owner, 199, generator))
            _, low, high = percentile_interval(drawn).flatten().tolist()
            if name == "chapters":
                held += low <= 0 <= high
            else:
                held_by_tokens += low <= 0 <= high
    assert held >= 52 and held_by_tokens <= 40
