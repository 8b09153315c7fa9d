"""Counting contexts, as well as it is done: what a language model with a large vocabulary has to beat.

Letters: V vocabulary, n tokens. A context of length m is the m tokens before the one to predict.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST = 2**62  # contexts are numbered in int64


def kneser_ney(train: Sequence[Tensor], test: Sequence[Tensor], vocab_size: int, *, order: int = 3) -> tuple[Tensor, ...]:
    """−ln p of every token but the first of each test chapter, nats [n−1] float64, by interpolated Kneser–Ney counting.

    For the m = `order` − 1 tokens before it, each chapter by itself,

        p(t | context) = (max(c(context, t) − d, 0) + d·N(context)·p(t | context without its first token)) / c(context)

    with N(context) different tokens after it, and d = n₁/(n₁ + 2 n₂) from what is counted once and twice (n₁ at least 1).
    In all orders but the highest c counts different tokens before, not occurrences; below them all is 1/V. (Kneser and
    Ney 1995; interpolated, Chen and Goodman 1999, section 4.1.6.) Order 1 is the best constant, 2 the bigram. Unlike
    `metrics.ngram_baseline` it holds no table of V^order entries, and has nothing to tune.

    Args:
        train, test: chapters, token numbers [n] each, n ≥ 2.
        order: tokens in a count, the predicted one included.

    Raises:
        ValueError: for an order below 1 or too high to number its contexts, a chapter below 2 tokens, a token outside
            the vocabulary.
    """
    if order < 1 or vocab_size**order > LARGEST:
        raise ValueError(f"order is at least 1 and vocab_size^order at most 2^62; got {order!r} of {vocab_size!r}")
    for name, chapters in (("train", train), ("test", test)):
        if not chapters or min(map(len, chapters)) < 2:
            raise ValueError(f"{name} holds chapters of at least 2 tokens; got {[len(one) for one in chapters][:5]}")
        least, most = min(int(one.min()) for one in chapters), max(int(one.max()) for one in chapters)
        if least < 0 or most >= vocab_size:
            raise ValueError(f"{name} holds tokens from {least} to {most}; 0 to {vocab_size - 1} are accepted")
    counts = _counts(train, vocab_size, order)
    lengths = [len(one) - 1 for one in test]
    probability = torch.full((sum(lengths),), 1 / vocab_size, dtype=torch.float64)
    for m, (grams, times) in enumerate(counts):
        # At the start of a chapter the longest context there is serves
        scored = torch.cat([torch.arange(n) >= m - 1 for n in lengths])
        wanted = torch.cat([_grams(one, vocab_size, m)[m == 0 :] for one in test])
        contexts, group = (grams // vocab_size).unique_consecutive(return_inverse=True)
        total = torch.zeros(len(contexts), dtype=torch.float64).index_add_(0, group, times)  # c(context)
        once, twice = ((times == k).sum().item() for k in (1, 2))
        discount = max(once, 1) / (max(once, 1) + 2 * twice)
        place, known = _find(contexts, wanted // vocab_size)
        here, seen = _find(grams, wanted)
        count = torch.where(seen, times[here], 0.0)
        shorter = probability[scored]
        longer = ((count - discount).clamp(min=0) + discount * group.bincount()[place].double() * shorter) / total[place]
        probability[scored] = torch.where(known, longer, shorter)
    return (-probability.log()).split(lengths)


def _grams(chapter: Tensor, vocab_size: int, m: int) -> Tensor:
    """The numbers of m tokens and the one after them, everywhere in a chapter [n] → [n−m]; the last is the last digit."""
    number = torch.zeros(max(len(chapter) - m, 0), dtype=torch.int64)
    for first in range(m + 1):
        number = number * vocab_size + chapter[first : first + len(number)]
    return number


def _counts(chapters: Sequence[Tensor], vocab_size: int, order: int) -> list[tuple[Tensor, Tensor]]:
    """For contexts of 0 … order − 1 tokens: the grams that occur, sorted, and c of each, float64."""
    counts = []
    for m in range(order):
        if m == order - 1:
            grams = torch.cat([_grams(one, vocab_size, m) for one in chapters])
        else:  # each different token before it counts once
            longer = torch.cat([_grams(one, vocab_size, m + 1) for one in chapters])
            grams = longer.sort().values.unique_consecutive() % vocab_size ** (m + 1)
        grams, times = grams.sort().values.unique_consecutive(return_counts=True)  # faster than `unique`
        counts.append((grams, times.double()))
    return counts


def _find(sorted_values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where each wanted value stands, and whether it does (else the place is any)."""
    place = torch.searchsorted(sorted_values, wanted).clamp(max=len(sorted_values) - 1)
    return place, sorted_values[place] == wanted
