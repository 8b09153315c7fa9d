"""Measures of routing and of prediction, and the simple counters that stand beside every model.

Letters as in the book: S states, N tokens, V vocabulary, T time. Logarithms are natural: entropies and information in
nats. Sums run in float64. Leading dimensions "..." are whatever the caller has: [B, T, S], or [B, H, T, S] per head.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsm_support.checks import Shape, check

TABLE_LIMIT = 2**25  #: most entries that a counter's table may have (256 MB of float64)


class Baseline(NamedTuple):
    """What a counter scores: mean cross-entropy (nats a token), accuracy, and the loss of every token [..., T−1]."""

    cross_entropy: float
    accuracy: float
    losses: Tensor


def _weights(weights: Tensor, function: str) -> Tensor:
    """Routing weights as float64, or an error: each row is a distribution over the states."""
    fits = weights.is_floating_point() and weights.ndim > 0 and weights.numel() > 0
    given = f"{weights.dtype} {tuple(weights.shape)}"
    check(function, fits, "floating point [..., S], at least one token and one state", weights=given)
    weights = weights.detach().double()
    if not torch.isfinite(weights).all():
        raise ValueError(f"{function}: the weights hold NaN or infinity")
    error = (weights.sum(-1) - 1).abs().max().item()
    accepted = "a distribution in each row over the last axis, not negative and of sum 1"
    least = weights.min().item()
    check(function, least >= 0 and error <= 1e-3, accepted, **{"least weight": least, "largest error of a sum": error})
    return weights


def _labels(labels: Tensor, function: str) -> Tensor:
    fits = not (labels.is_floating_point() or labels.is_complex()) and labels.numel() > 0
    accepted = "at least one integer class (of logits take `.argmax(-1)` first)"
    check(function, fits, accepted, labels=f"{labels.dtype} {tuple(labels.shape)}")
    return labels


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Share of predicted classes [...] that equal the labels [...], both integers; of logits take `.argmax(-1)` first.

    Raises ValueError if the shapes differ, nothing is given, or the predictions are not integers.
    """
    _labels(predictions, "accuracy")
    _labels(labels, "accuracy")
    if predictions.shape != labels.shape:
        raise ValueError(f"accuracy: predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)} differ")
    return (predictions == labels).double().mean().item()


def majority_share(labels: Tensor) -> float:
    """Share of the commonest class among labels [...]: the accuracy, and the purity, that knowing nothing gives.

    Raises ValueError if there are none or they are not integers.
    """
    labels = _labels(labels, "majority_share")
    return labels.unique(return_counts=True)[1].max().item() / labels.numel()


def routing_entropy(weights: Tensor) -> Tensor:
    """Normalised entropy of each token's routing weights [..., S], H/ln S: 0 for one state alone, 1 for all alike.

    With a single state there is nothing to choose, and the entropy is 0.
    Returns [...] float64, between 0 and 1. Raises ValueError if a row is not a distribution.
    """
    weights = _weights(weights, "routing_entropy")
    entropy = torch.special.entr(weights).sum(-1)  # (...,)
    states = weights.shape[-1]
    return torch.zeros_like(entropy) if states == 1 else (entropy / math.log(states)).clamp(0, 1)


def state_load(weights: Tensor) -> Tensor:
    """Share of all routing mass that each state receives, from routing weights [..., S].

    Returns [S] float64 of sum 1; 1/S each if the load is balanced. Raises ValueError if a row is not a distribution.
    """
    mass = _weights(weights, "state_load").reshape(-1, weights.shape[-1]).sum(0)  # (S,)
    return mass / mass.sum()


def mutual_information(weights: Tensor, labels: Tensor) -> float:
    """Information (nats) that the state of a token gives about its class: I = H(state) + H(class) − H(state, class).

    The state is drawn with the routing weights and the class is given, so p(s, c) is the mean over tokens of w_s in class c. This
    is the plug-in estimate: it is above 0 by chance alone, by about (S−1)(C−1)/2N for hard assignments (Miller 1955), so
    `statistics.permutation_null` belongs beside it. At most min(ln S, ln C).

    Args:
        weights: [N, S], or [N, ..., S] where all tokens of a unit share its label; the mean over "..." gives the same number, so
            take it first where this is called often, as for a permutation null.
        labels: [N], or any leading part of the weights' shape; integers.

    Raises ValueError if the shapes do not fit, the labels are not integers, or a row is not a distribution.
    """
    weights = _weights(weights, "mutual_information")
    labels = _labels(labels, "mutual_information").to(weights.device)
    if labels.ndim < 1 or labels.ndim >= weights.ndim or labels.shape != weights.shape[: labels.ndim]:
        raise ValueError(f"mutual_information: labels {tuple(labels.shape)} do not lead weights {tuple(weights.shape)}")
    mass = weights.flatten(labels.ndim, -2).mean(labels.ndim) if weights.ndim > labels.ndim + 1 else weights
    mass = mass.flatten(0, -2)  # (units, S): all tokens of a unit count alike
    classes, index = labels.flatten().unique(return_inverse=True)
    joint = mass.new_zeros(len(classes), mass.shape[-1]).index_add_(0, index, mass)  # (C, S)
    joint = joint / joint.sum()
    entropy = torch.special.entr
    information = entropy(joint.sum(0)).sum() + entropy(joint.sum(1)).sum() - entropy(joint).sum()
    return max(information.item(), 0.0)


def ngram_baseline(train: Tensor, test: Tensor, vocabulary_size: int, *, order: int = 2, smoothing: float = 1.0) -> Baseline:
    """Predict the next token by counting: order 1 is the best constant, 2 the bigram, 3 the trigram.

    p_n(t | context) = (count(context, t) + λ·p_{n−1}(t | shorter context)) / (count(context) + λ), with p_0 = 1/V and λ =
    `smoothing` (MacKay and Peto 1995). Fitted on one split and scored on another. Every order scores the same tokens, all but the
    first of each row; near a row's start the longest context there is serves.

    Args:
        train, test: tokens to count [..., T] and to predict [..., T'], on one device; 0 … V−1, with V = `vocabulary_size`.
        order: tokens in a count, the predicted one included.
        smoothing: λ in counts, above 0.

    Raises ValueError if a token lies outside the vocabulary, a row is shorter than 2, or V^order passes 2^25 entries.
    """
    check("ngram_baseline", order >= 1 and smoothing > 0, "at least 1 and above 0", order=order, smoothing=smoothing)
    entries = vocabulary_size**order
    accepted = f"up to {TABLE_LIMIT:,}: lower the order or the vocabulary"
    check("ngram_baseline", entries <= TABLE_LIMIT, accepted, **{"entries of the table": entries})
    for name, tokens in (("train", train), ("test", test)):
        _labels(tokens, f"ngram_baseline, {name}")
        rows = tokens.ndim > 0 and tokens.shape[-1] > 1
        check("ngram_baseline", rows, "rows of at least 2", **{f"shape of {name}": tuple(tokens.shape)})
        least, most = tokens.min().item(), tokens.max().item()
        known = 0 <= least <= most < vocabulary_size
        check("ngram_baseline", known, f"0 to {vocabulary_size - 1}", **{f"tokens of {name}": (least, most)})

    def contexts(tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The numbers of all contexts of `length` tokens, and the tokens that follow them (never a row's first)."""
        first = max(length, 1)
        number = torch.zeros_like(tokens[..., first:])
        for back in range(length, 0, -1):  # the nearest token is the last digit
            number = number * vocabulary_size + tokens[..., first - back : tokens.shape[-1] - back]
        return number, tokens[..., first:]

    train, test = train.long(), test.long()
    probabilities = torch.full((1, vocabulary_size), 1 / vocabulary_size, dtype=torch.float64, device=train.device)
    losses = torch.zeros(test[..., 1:].shape, dtype=torch.float64, device=test.device)
    right = torch.zeros_like(losses)
    for length in range(order):
        number, target = contexts(train, length)
        table = (vocabulary_size**length, vocabulary_size)
        counts = torch.bincount((number * vocabulary_size + target).flatten(), minlength=table[0] * table[1])
        counts = counts.view(table).double()  # (contexts, V)
        shorter = probabilities.repeat(table[0] // len(probabilities), 1)  # drops the farthest token of the context
        probabilities = (counts + smoothing * shorter) / (counts.sum(1, keepdim=True) + smoothing)
        number, target = contexts(test, length)
        scored = slice(max(length, 1) - 1, None)  # what has no longer context keeps the score of the shorter one
        losses[..., scored] = -probabilities[number, target].log()
        right[..., scored] = (probabilities.argmax(1)[number] == target).double()
    return Baseline(losses.mean().item(), right.mean().item(), losses)


@torch.no_grad()
def token_losses(
    model: Callable[[Tensor], Tensor], tokens: Tensor, *, window: int, stride: int | None = None, batch_size: int = 16
) -> Tensor:
    """−ln p(token t | those before it in its window) of every token but the first: nats, [n−1] float64.

    Windows begin `stride` tokens apart. In each, only what the window before did not reach is scored; the rest is context. The
    last window ends with the text and overlaps as far as it must. So each token is scored exactly once, and with `window` −
    `stride` + 1 tokens of context at least, but for those of the first window.

    Args:
        model: token numbers [B,T] → logits [B,T,V], in eval mode if it has one.
        tokens: [n], n ≥ 2.
        window: T, most tokens that the model is given at once.
        stride: 1 … window; None for `window`: no overlap, each token read once.
        batch_size: windows at a time; changes time and memory only.

    Raises ValueError for tokens of another shape, a window below 1, or a stride outside 1 … window.
    """
    stride = window if stride is None else stride
    check("token_losses", tokens.dim() == 1 and len(tokens) > 1, "[n], n at least 2", tokens=Shape(tokens.shape))
    check("token_losses", 1 <= stride <= window, "1 ≤ stride ≤ window", window=window, stride=stride)
    n = len(tokens) - 1  # tokens to score
    window = min(window, n)
    starts = torch.arange(0, n - window + stride, stride).clamp(max=n - window).tolist()
    losses = torch.empty(n, dtype=torch.float64, device=tokens.device)
    scored = 0
    for first in range(0, len(starts), batch_size):
        chosen = starts[first : first + batch_size]
        logits = model(torch.stack([tokens[start : start + window] for start in chosen]))  # (B, T, V)
        targets = torch.stack([tokens[start + 1 : start + window + 1] for start in chosen])
        nats = F.cross_entropy(logits.mT, targets, reduction="none").double()
        for start, row in zip(chosen, nats, strict=True):
            losses[scored : start + window] = row[scored - start :]
            scored = start + window
    return losses


def perplexity(losses: Tensor) -> float:
    """e to the mean of losses in nats: of V equally likely tokens, V."""
    return math.exp(losses.double().mean().item())
