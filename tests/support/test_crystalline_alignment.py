"""Agreement of codes and states: against counting by hand, against the seed's loop and against scikit-learn."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_mutual_info_score, completeness_score, homogeneity_score
from torch import tensor
from torch.nn.functional import one_hot

from nsm_support.crystalline.codes.alignment import (
    NO_STATE,
    align,
    align_all,
    code_labels,
    contingency,
    contingency_reference,
    held_out_alignment,
    plot_code_state_alignment,
    purity,
    random_codebook_codes,
    seed_purity,
    token_codes,
)

SHAPES = [(1, 1, 1, 1, 1), (2, 63, 5, 3, 2), (3, 7, 33, 8, 4), (4, 9, 8, 8, 1), (2, 5, 6, 2, 6)]  # B, T, K, S, k


def draw(B, T, K, S, k, seed=0):
    """Random codes, k a position, and random states."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(B, T, K, generator=generator).topk(k).indices
    return torch.zeros(B, T, K).scatter_(-1, chosen, 1), torch.randint(S, (B, T), generator=generator)


def noisy(B, T, S, error=0.2, seed=0):
    """One code a state, permuted, and wrong now and then; so there is something to find."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randint(S, (B, T), generator=generator)
    wrong = torch.rand(B, T, generator=generator) < error
    codes = torch.where(wrong, torch.randint(S, (B, T), generator=generator), (states + 1) % S)
    return one_hot(codes, S + 2).float(), states  # the last two codes are dead


def uses(hard, states):
    """Each use of a code as (code, state), by plain loops."""
    return [(code, states[b, t].item()) for b, t, code in product(*map(range, hard.shape)) if hard[b, t, code]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_counts_equal_the_seeds_triple_loop(shape, dtype):
    hard, states = draw(*shape)
    counts = contingency(hard.to(dtype), states, shape[3])
    assert counts.dtype == torch.int64 and torch.equal(counts, contingency_reference(hard, states, shape[3]))
    assert counts.sum() == shape[0] * shape[1] * shape[4]


def test_purities_by_hand():
    counts = tensor([[6, 2], [0, 4], [0, 0], [1, 0]])
    assert purity(counts) == 11 / 13
    assert seed_purity(counts) == (6 / 8 + 1 + 0 + 1) / 4  # a dead code is a zero, a code used once a one
    assert code_labels(counts).tolist() == [0, 1, NO_STATE, 0]
    assert code_labels(tensor([[2, 2]])).tolist() == [0]  # the first of equals
    # labels from elsewhere: code 1 stands for state 0, and code 3 had no use there
    assert purity(counts, tensor([0, 0, 1, NO_STATE])) == 6 / 13
    with pytest.raises(ValueError, match="no code is active"):
        purity(torch.zeros(3, 2, dtype=torch.int64))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 12), st.integers(1, 34), st.integers(1, 5), st.data())
def test_measures_of_random_codes_are_those_of_scikit_learn(seed, B, T, K, S, data):
    k = data.draw(st.integers(1, min(K, 3)))
    hard, states = draw(B, T, K, S, k, seed)
    found = align(hard, states, S, permutations=1)
    sets = ["".join(map(str, row)) for row in hard.int().flatten(0, 1).tolist()]
    truth = states.flatten().tolist()
    assert found.homogeneity == pytest.approx(homogeneity_score(truth, sets), abs=1e-9)
    assert found.completeness == pytest.approx(completeness_score(truth, sets), abs=1e-9)
    assert found.ami == pytest.approx(adjusted_mutual_info_score(truth, sets), abs=1e-9)
    pairs = uses(hard, states)
    commonest = {code: max([s for c, s in pairs if c == code], key=[s for c, s in pairs if c == code].count) for code, _ in pairs}
    most = sum(pairs.count((code, state)) for code, state in commonest.items())
    assert found.purity == pytest.approx(most / len(pairs)) and found.active_codes == len(commonest)
    assert found.majority == max(truth.count(s) for s in truth) / len(truth)
    shares = np.array([sum(c == code for c, _ in pairs) for code in commonest]) / len(pairs)
    assert found.perplexity == pytest.approx(np.prod(shares**-shares))


def test_detection_by_several_codes_by_hand():
    # positions: codes {0,1}, {0,2}, {1,2} | {0,1}, {2,3}, {3,0}; labels: 0 and 1 → state 0, 2 → state 1, 3 → none
    hard = torch.zeros(2, 3, 4)
    for place, codes in enumerate([(0, 1), (0, 2), (1, 2), (0, 1), (2, 3), (3, 0)]):
        hard[place // 3, place % 3, list(codes)] = 1
    states = tensor([[0, 1, 1], [0, 2, 0]])
    found = align(hard, states, 4, labels=tensor([0, 0, 1, NO_STATE]))
    # uses of code 0 in state 0: 3 of 4; of code 1 in state 0: 2 of 3; of code 2 in state 1: 2 of 3; code 3 has no state
    assert found.purity == pytest.approx(7 / 12)
    # state 0 is detected at positions 0, 1, 2, 3, 5, state 1 at 1, 2, 4; states 2 and 3 have no code, 3 never occurs
    assert found.state_precision[:2].tolist() == pytest.approx([3 / 5, 2 / 3])
    assert found.state_recall[:3].tolist() == pytest.approx([1, 1, 0])
    assert found.state_precision[2:].isnan().all() and found.state_recall[3].isnan()


def test_the_null_is_what_codes_without_knowledge_reach():
    """Codes that know nothing lie within their null, which lies above the majority share; codes that know far above it."""
    p_values, excess = [], []
    for seed in range(40):
        found = align(*draw(12, 20, 16, 4, 1, seed), 4, permutations=19)
        p_values.append(found.null_p)
        excess.append(found.purity - found.null)
    assert np.mean(np.array(p_values) <= 0.1) < 0.25 and 0.3 < np.mean(p_values) < 0.7
    assert abs(np.mean(excess)) < 3 * np.std(excess) / math.sqrt(40)
    assert found.null > found.majority + 0.03
    known = align(*noisy(12, 20, 4), 4, permutations=19)
    assert known.null_p == 1 / 20 and known.purity > known.null + 0.3


def test_the_null_keeps_what_hangs_on_the_place_in_the_sequence():
    """Codes and states that both follow the clock agree without any knowledge: shuffled sequences show it."""
    states = (torch.arange(24) // 4 % 3).expand(10, -1)
    found = align(one_hot(torch.arange(24) % 12, 12).expand(10, -1, -1), states, 3)
    assert found.purity == found.null and found.null_p == 1 and found.majority == pytest.approx(1 / 3)


def test_labels_are_held_out():
    """Random codes look pure under labels of their own, and are at chance under labels of another split."""
    own, other = [], []
    for seed in range(20):
        first, second = draw(4, 25, 60, 5, 1, seed), draw(4, 25, 60, 5, 1, seed + 1000)
        labels = align(*first, 5, permutations=1).labels
        own.append(align(*second, 5, permutations=1).purity)
        other.append(align(*second, 5, labels=labels, permutations=1).purity)
    assert np.mean(own) > 0.5 and np.mean(other) < 0.23


def infos_of(*hards):
    return [{"attn": {"hard_codes": attn}, "mlp": {"hard_codes": mlp}} for attn, mlp in zip(hards[::2], hards[1::2], strict=True)]


def test_the_bottleneck_is_chosen_on_one_split_and_reported_on_the_other():
    """Of four bottlenecks one is good on the first split and bad on the second, another the other way round."""
    S, errors = 4, [0.6, 0.1, 0.3, 0.5]
    first = [noisy(8, 40, S, error, seed=3)[0] for error in errors]
    second = [noisy(8, 40, S, error, seed=4)[0] for error in reversed(errors)]
    truth, other_truth = noisy(8, 40, S, seed=3)[1], noisy(8, 40, S, seed=4)[1]
    for measure in ("purity", "ami", "homogeneity", "completeness"):
        held = held_out_alignment((infos_of(*first), truth), (infos_of(*second), other_truth), S, measure=measure)
        assert held.name == "block 0, mlp" and list(held.all_reported) == [
            "block 0, attn",
            "block 0, mlp",
            "block 1, attn",
            "block 1, mlp",
        ]
        assert torch.equal(held.chosen.counts, contingency(first[1], truth, S))
        assert torch.equal(held.reported.counts, contingency(second[1], other_truth, S))
        assert torch.equal(held.reported.labels, code_labels(held.chosen.counts))
        best = max(held.all_reported.values(), key=lambda found: getattr(found, measure))
        assert getattr(held.reported, measure) < getattr(best, measure), "not the best of what is reported"
    # labels of the first split, not of the second: there codes are shifted by one more
    shifted = infos_of(*(hard.roll(1, -1) for hard in second))
    held = held_out_alignment((infos_of(*first), truth), (shifted, other_truth), S)
    assert held.reported.purity < 0.3 < 0.5 < align_all(shifted, other_truth, S)["block 0, mlp"].purity


def test_one_code_a_token_is_pure_without_any_state():
    """The seed's machine: tokens 3i, 3i+1, 3i+2 belong to state i, so the token alone tells the state."""
    tokens = torch.randint(24, (20, 32), generator=torch.Generator().manual_seed(0))
    found = align(token_codes(tokens, 32), tokens // 3, 8)
    assert found.purity == 1 and found.active_codes == 24 and 0.6 < found.completeness < 0.7
    with pytest.raises(ValueError, match="token 23 has no code of its own among 8"):
        token_codes(tokens, 8)


def test_a_random_codebook_takes_the_most_similar_directions():
    inputs = torch.randn(3, 50, 6, generator=torch.Generator().manual_seed(1))
    hard = random_codebook_codes(inputs, 10, 2, torch.Generator().manual_seed(2))
    assert torch.equal(hard, random_codebook_codes(5 * inputs, 10, 2, torch.Generator().manual_seed(2)))
    assert not torch.equal(hard, random_codebook_codes(inputs, 10, 2, torch.Generator().manual_seed(3)))
    assert hard.sum(-1).eq(2).all() and hard.flatten(0, 1).any(0).all()
    codebook = torch.randn(10, 6, generator=torch.Generator().manual_seed(2))
    similarity = torch.cosine_similarity(inputs[:, :, None], codebook, dim=-1)  # (3, 50, 10)
    assert (similarity.where(hard == 1, 2).amin(-1) >= similarity.where(hard == 0, -2).amax(-1)).all()
    with pytest.raises(ValueError, match=r"num_codes_k = 11; accepted is 1 to codebook_size \(10\)"):
        random_codebook_codes(inputs, 10, 11, torch.Generator())


def test_the_figure_shows_each_active_codes_shares():
    counts = np.array([[0, 6, 2], [5, 0, 0], [0, 0, 0], [0, 1, 3], [8, 2, 0]])
    figure = plot_code_state_alignment(counts, 3, 5, 0.5, "Here")
    axis = figure.axes[0]
    assert axis.get_title() == "Here\n4 of 5 codes active, purity 0.500"
    assert [int(label.get_text()) for label in axis.get_yticklabels()] == [4, 1, 0, 3]  # by state, then by use
    np.testing.assert_allclose(axis.images[0].get_array(), [[0.8, 0.2, 0], [1, 0, 0], [0, 0.75, 0.25], [0, 0.25, 0.75]])
    with pytest.raises(ValueError, match=r"shape = \(5, 3\), sum = 27.0; accepted is counts \[5, 4\]"):
        plot_code_state_alignment(counts, 4, 5)


HARD, STATES = draw(2, 5, 4, 3, 1)


@pytest.mark.parametrize(
    ("codes", "states", "options", "message"),
    [
        (torch.ones(2, 3, 4), torch.zeros(2, 4).long(), {}, r"\[2, 3, 4\], states = \[2, 4\]; accepted is \[B, T, K\]"),
        (torch.ones(2, 3, 4), torch.full((2, 3), 3), {}, "lowest = 3, highest = 3; accepted is integers from 0 to 2"),
        (torch.ones(2, 3, 4), torch.zeros(2, 3), {}, "torch.float32"),
        (torch.full((2, 3, 4), 0.25), torch.zeros(2, 3).long(), {}, r"hard_codes = \[0.25\]; accepted is 0 and 1"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3).long(), {}, "no code is active"),
        (HARD, STATES, {"labels": tensor([0, 1, 2])}, r"labels = \[0, 1, 2\].*; accepted is 4 integers from -1 to 2"),
        (HARD, STATES, {"labels": tensor([0, 1, 2, 3])}, "4 integers from -1 to 2"),
        (HARD[:1], STATES[:1], {}, "got 1 labels"),  # one sequence has no other to change states with
    ],
)
def test_misfits_are_refused(codes, states, options, message):
    with pytest.raises(ValueError, match=message):
        align(codes, states, 3, **options)
    split = infos_of(HARD, HARD), STATES
    with pytest.raises(ValueError, match="two splits are needed"):
        held_out_alignment(split, split, 3)
