"""Metrics against closed forms, against scikit-learn on hard assignments, and against counting by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score
from torch import tensor
from torch.nn.functional import one_hot

from nsm_support.metrics import accuracy, majority_share, mutual_information, ngram_baseline, routing_entropy, state_load

TOKENS = tensor([0, 1, 2])


def random_weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_accuracy_and_majority_share():
    assert accuracy(tensor([1, 2, 2, 0]), tensor([1, 2, 0, 0])) == 0.75
    assert accuracy(tensor([[1, 0], [1, 1]]), tensor([[1, 1], [0, 0]])) == 0.25
    assert majority_share(tensor([3, 3, 1, 3, 0])) == 0.6
    assert majority_share(tensor([[7], [7]])) == 1


def test_entropy_in_closed_form():
    weights = tensor([[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.7, 0.1, 0.1, 0.1]])
    last = -(0.7 * math.log(0.7) + 0.3 * math.log(0.1)) / math.log(4)
    assert routing_entropy(weights).tolist() == pytest.approx([1, 0, 0.5, last])
    assert routing_entropy(torch.ones(3, 2, 1)).tolist() == [[0, 0]] * 3  # one state leaves nothing to choose
    assert routing_entropy(torch.full((2, 64), 1 / 64, requires_grad=True)).max() <= 1


def test_load_is_the_share_of_mass():
    weights = tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], [[0.0, 0.25, 0.75], [0.0, 0.0, 1.0]]])
    assert state_load(weights).tolist() == pytest.approx([0.375, 0.1875, 0.4375])
    assert state_load(tensor([0.2, 0.8])).tolist() == pytest.approx([0.2, 0.8])


def test_information_in_closed_form():
    labels = tensor([0, 0, 1, 1])
    assert mutual_information(one_hot(labels).float(), labels) == pytest.approx(math.log(2))
    assert mutual_information(one_hot(labels).float()[:, [1, 0]], labels) == pytest.approx(math.log(2))
    assert mutual_information(torch.full((4, 8), 1 / 8), labels) == 0
    assert mutual_information(torch.ones(4, 1), labels) == 0
    assert mutual_information(random_weights(4, 3), tensor([2, 2, 2, 2])) == pytest.approx(0, abs=1e-12)
    # a noisy channel with error 0.1 and balanced classes: ln 2 − H(0.1)
    noisy = tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]])
    channel = math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1)
    assert mutual_information(noisy, labels) == pytest.approx(channel)
    assert mutual_information(noisy, tensor([-5, -5, 9, 9])) == pytest.approx(channel)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=60))
def test_information_of_hard_assignments_is_scikit_learns(pairs):
    states, labels = (list(column) for column in zip(*pairs, strict=True))
    ours = mutual_information(one_hot(tensor(states), 6).float(), tensor(labels))
    assert ours == pytest.approx(max(mutual_info_score(states, labels), 0), abs=1e-9)


def test_labels_of_whole_units_count_for_all_their_tokens():
    weights, labels = random_weights(6, 5, 4), tensor([0, 1, 2, 0, 1, 2])
    every_token = mutual_information(weights, labels[:, None].expand(6, 5))
    assert mutual_information(weights, labels) == pytest.approx(every_token)
    assert mutual_information(weights.flatten(0, 1), labels.repeat_interleave(5)) == pytest.approx(every_token)
    assert mutual_information(weights.mean(1), labels) == pytest.approx(every_token)
    heads = weights[:, None].expand(6, 3, 5, 4)
    assert mutual_information(heads, labels) == pytest.approx(every_token)


@pytest.mark.parametrize("metric", [routing_entropy, state_load, lambda w: mutual_information(w, tensor([0, 1]))])
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (tensor([[0.5, 0.6], [0.5, 0.5]]), "error of a sum = 0.1"),
        (tensor([[-0.5, 1.5], [0.5, 0.5]]), "least weight = -0.5"),
        (tensor([[float("nan"), 1], [0, 1]]), "NaN"),
        (tensor([[0, 1], [1, 0]]), "torch.int64"),
        (torch.empty(0, 4), r"\(0, 4\)"),
    ],
)
def test_what_is_no_distribution_is_refused(metric, weights, message):
    with pytest.raises(ValueError, match=message):
        metric(weights)


def naive_losses(train: list[list[int]], test: list[list[int]], size: int, order: int, smoothing: float) -> list[float]:
    """The formula of the docstring, word for word, one token at a time."""

    def probability(context: tuple[int, ...], token: int) -> float:
        shorter = probability(context[1:], token) if context else 1 / size
        seen = [
            row[i] for row in train for i in range(max(len(context), 1), len(row)) if tuple(row[i - len(context) : i]) == context
        ]
        return (seen.count(token) + smoothing * shorter) / (len(seen) + smoothing)

    return [-math.log(probability(tuple(row[max(0, i - order + 1) : i]), row[i])) for row in test for i in range(1, len(row))]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [2, 3, 9])
def test_counters_of_any_order_are_the_formula(order, length):
    generator = torch.Generator().manual_seed(order)
    train, test = torch.randint(3, (2, 4, length), generator=generator)
    baseline = ngram_baseline(train, test, 3, order=order, smoothing=0.7)
    expected = naive_losses(train.tolist(), test.tolist(), 3, order, 0.7)
    assert baseline.losses.shape == (4, length - 1)
    assert baseline.losses.flatten().tolist() == pytest.approx(expected)
    assert baseline.cross_entropy == pytest.approx(sum(expected) / len(expected))
    known = tensor([0, 1, 0, 1, 0, 0, 1, 0])  # followers: four 0, three 1; of a 0, three 1 and one 0
    assert [ngram_baseline(known, tensor([0, 1, 1]), 2, order=n).accuracy for n in (1, 2)] == [0, 0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mutual_information(torch.full((4, 2), 0.5), tensor([0, 1, 1])), r"do not lead weights \(4, 2\)"),
        (lambda: accuracy(torch.rand(3), tensor([0, 1, 2])), "argmax"),
        (lambda: accuracy(tensor([1]), tensor([1, 2])), "differ"),
        (lambda: majority_share(torch.empty(0, dtype=torch.long)), "at least one"),
        (lambda: ngram_baseline(TOKENS, TOKENS, 3, order=0), "order = 0"),
        (lambda: ngram_baseline(TOKENS, TOKENS, 3, smoothing=0), "smoothing = 0"),
        (lambda: ngram_baseline(TOKENS, TOKENS, 2), r"\(0, 2\); accepted is 0 to 1"),
        (lambda: ngram_baseline(TOKENS, TOKENS, 10_000), "table = 100000000"),
        (lambda: ngram_baseline(TOKENS, tensor([1]), 3), "rows of at least 2"),
        (lambda: ngram_baseline(torch.rand(5), TOKENS, 3), "torch.float32"),
    ],
)
def test_misfits_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
