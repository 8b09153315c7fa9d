"""Kneser–Ney counts against the formula, one token at a time."""

import math
from collections import Counter

import pytest
import torch

from nsm_support.ngrams import kneser_ney


def draw(*shape, below=5, seed=0):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def by_the_formula(train, test, V, order):
    """Kneser–Ney, one token at a time: dictionaries, no vectors."""

    def occurrences(m):  # a Counter of (context, token)
        return Counter((tuple(one[i - m : i]), one[i]) for one in train for i in range(m, len(one)))

    levels = []
    for m in range(order):
        levels.append(occurrences(m) if m == order - 1 else Counter((c[1:], t) for c, t in occurrences(m + 1)))

    def probability(context, token):
        m = len(context)
        shorter = probability(context[1:], token) if m else 1 / V
        counts = levels[m]
        after = {t: n for (c, t), n in counts.items() if c == context}
        if not after:
            return shorter
        times = Counter(counts.values())
        once = max(times[1], 1)
        d = once / (once + 2 * times[2])
        return (max(after.get(token, 0) - d, 0) + d * len(after) * shorter) / sum(after.values())

    return [[-math.log(probability(tuple(one[max(0, i - order + 1) : i]), one[i])) for i in range(1, len(one))] for one in test]


@pytest.mark.parametrize("order", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("below", [9, 3])  # of 3 letters, 0 to 0 to 1, every context that crosses a chapter's end is known
def test_counting_is_the_formula(order, below):
    chapters = [draw(n, below=below, seed=n).pow(2) // 4 for n in (40, 2, 31)]  # 0 … 16, some of them never
    test = [draw(n, below=below, seed=n).pow(2) // 4 for n in (2, 3, 50)]
    found = kneser_ney(chapters, test, 17, order=order)
    wanted = by_the_formula([c.tolist() for c in chapters], [c.tolist() for c in test], 17, order)
    assert [len(one) for one in found] == [1, 2, 49]
    for one, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, torch.tensor(plain, dtype=torch.float64), rtol=1e-12, atol=0)


def test_any_vocabulary_of_any_order():
    """Of a published tokenizer's size, where V^order is far beyond 64 bits: the last tokens are counted as the first are."""
    chapters, test = [draw(300, below=5, seed=seed) for seed in range(2)], [draw(40, below=5, seed=9)]
    (first,) = kneser_ney(chapters, test, 73_448, order=6)
    (last,) = kneser_ney([73_443 + one for one in chapters], [73_443 + one for one in test], 73_448, order=6)
    torch.testing.assert_close(last, first, rtol=1e-12, atol=0)
    wanted = by_the_formula([one.tolist() for one in chapters], [test[0].tolist()], 73_448, 6)
    torch.testing.assert_close(first, torch.tensor(wanted[0], dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": 0}, "order = 0; accepted is a whole number"),
        ({"vocab_size": 4}, r"tokens of train = \(0, 4\); accepted is 0 to 3"),
        ({"test": [torch.tensor([1])]}, "at least 2 tokens"),
        ({"train": []}, "at least 2 tokens"),
    ],
)
def test_counting_refuses(change, message):
    given = {"train": [draw(60)], "test": [draw(9)], "vocab_size": 5, "order": 2} | change
    with pytest.raises(ValueError, match=message):
        kneser_ney(**given)
