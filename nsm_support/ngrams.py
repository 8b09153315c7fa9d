"""Counting contexts, and smoothing what was counted: what a language model has to beat.

Letters: V vocabulary, n tokens. A gram of m + 1 tokens is a context of m tokens and the token after it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nsm_support.checks import check, check_sizes, refuse


def kneser_ney(train: Sequence[Tensor], test: Sequence[Tensor], vocab_size: int, *, order: int = 3) -> tuple[Tensor, ...]:
    """−ln p of every token but the first of each test chapter, nats [n−1] float64, by interpolated Kneser–Ney counting.

    For the m = `order` − 1 tokens before it, each chapter by itself,

        p(t | context) = (max(c(context, t) − d, 0) + d·N(context)·p(t | context without its first token)) / c(context)

    with N(context) different tokens after it, and d = n₁/(n₁ + 2 n₂) from what is counted once and twice (n₁ at least 1). In all
    orders but the highest c counts different tokens before, not occurrences; below them all is 1/V. (Kneser and Ney 1995;
    interpolated, Chen and Goodman 1999, whose modified form, with three discounts, predicts a little better.) Order 1 is the best
    constant, 2 the bigram. Unlike `metrics.ngram_baseline` it holds no table of V^order entries, and has nothing to tune.

    Args:
        train, test: chapters, token numbers [n] each, n ≥ 2.
        order: tokens in a count, the predicted one included.

    Raises ValueError for an order below 1, a chapter below 2 tokens, a token outside the vocabulary.
    """
    check_sizes("kneser_ney", order=order)
    for name, chapters in (("train", train), ("test", test)):
        _check_chapters(name, chapters, vocab_size)
    chapters = [*train, *test]
    token, depth = torch.cat(chapters), torch.cat([torch.arange(len(one)) for one in chapters])  # tokens before it
    trained = torch.arange(len(token)) < sum(map(len, train))
    scored = (~trained & (depth > 0)).nonzero()[:, 0]
    probability = torch.full((len(token),), 1 / vocab_size, dtype=torch.float64)
    # The number of the gram of m tokens that ends at each place, m = 0 … order; one across chapters is never read
    grams = [torch.zeros_like(token)]
    for m in range(order):
        grams.append((grams[m].roll(1) * vocab_size + token).unique(return_inverse=True)[1])
    for m in range(order):
        context, gram = grams[m].roll(1), grams[m + 1]
        # The places that c counts: every one, or in lower orders one for each gram with the token before it
        counted = (trained & (depth >= min(m + 1, order - 1))).nonzero()[:, 0]
        if m < order - 1:
            counted = _one_each(grams[m + 2], counted)
        times = gram[counted].bincount(minlength=len(token)).double()  # c(context, t), by the gram's number
        different = context[_one_each(gram, counted)].bincount(minlength=len(token))  # N(context)
        total = context[counted].bincount(minlength=len(token))  # c(context)
        once, twice = ((times == k).sum().item() for k in (1, 2))
        discount = max(once, 1) / (max(once, 1) + 2 * twice)
        # At the start of a chapter, and after a context never counted, the longest one there is serves
        at = scored[(depth[scored] >= m) & (total[context[scored]] > 0)]
        kept = (times[gram[at]] - discount).clamp(min=0)
        probability[at] = (kept + discount * probability[at] * different[context[at]]) / total[context[at]]
    return (-probability[scored].log()).split([len(one) - 1 for one in test])


def _check_chapters(name: str, chapters: Sequence[Tensor], vocab_size: int) -> None:
    if not chapters or min(map(len, chapters)) < 2:
        raise refuse("kneser_ney", "chapters of at least 2 tokens", **{f"{name}, in tokens": [len(one) for one in chapters][:5]})
    least, most = min(int(one.min()) for one in chapters), max(int(one.max()) for one in chapters)
    check("kneser_ney", 0 <= least <= most < vocab_size, f"0 to {vocab_size - 1}", **{f"tokens of {name}": (least, most)})


def _one_each(gram: Tensor, places: Tensor) -> Tensor:
    """Of these places, one for each gram that ends there."""
    one = gram.new_full((len(gram),), -1).index_copy_(0, gram[places], places)
    return one[one >= 0]
