"""How much a token matters, in nats, beside what its routing says; and rank correlations whose units are chapters.

Letters: B windows, T tokens of one, P places looked at in a window, L layers, E experts, C chapters, N tokens of a
sample, R resamples.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nsm_support.blockffn.attention import CausalAttention
from nsm_support.blockffn.model import BlockFFNModel
from nsm_support.blockffn.objectives import token_sparsity
from nsm_support.blockffn.signals import RoutingExtractor
from nsm_support.statistics import CONFIDENCE
from nsm_support.training import evaluating

_FUNCTION_WORDS = """
    a an the and but or nor for so yet if because that than as when while though lest not no also even
    i me my mine we us our ours thou thee thy thine ye you your yours he him his she her hers it its they them their
    theirs this these those who whom whose which what all any every each some such both either neither other himself
    of in on at by to from with without into unto upon out up down over under before after against among between
    through until till about above there here then now where
    am is are was were be been being art wast do does did doth hath has have had having shall shalt should will wilt
    would may might can could let
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())  #: articles, conjunctions, particles; pronouns; prepositions; auxiliaries
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


class Sample(NamedTuple):
    """Tokens of held-out text, one of B windows a row, and what a model makes of them."""

    activations: Tensor  # [L,B,T,E], the routers' before their norm
    sparsity: Tensor  # [L,B,T]
    losses: Tensor  # [B,T] nats, of the token after each


def observe(model: BlockFFNModel, windows: Tensor, batch_size: int = 16) -> Sample:
    """Run a model on windows [B,T+1], each by itself: how it routes the first T tokens, and what the next ones cost it."""
    recorded, losses = [], []
    with RoutingExtractor(model) as extractor:
        for rows in windows.split(batch_size):
            recorded.append(extractor(rows[:, :-1]).cpu())
    with evaluating(model):
        for rows in windows.split(batch_size):
            losses.append(_losses(model, rows).cpu())
    activations = torch.cat(recorded, 1)
    return Sample(activations, token_sparsity(activations).double(), torch.cat(losses))


@contextmanager
def hidden_from_later(model: BlockFFNModel, places: Tensor) -> Iterator[None]:
    """Meanwhile token `places[b]` of row b is seen by no later token, at any layer: as if it had never been there.

    Positions stay as they are. The token still sees itself, so outputs up to it are the same but for rounding. For the
    ordinary layers of a model, in passes over all tokens of len(places) rows.
    """

    def without(attention: CausalAttention, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (x,) = arguments
        t = torch.arange(x.shape[1], device=x.device)
        hidden = (t == places[:, None, None]) & (t[:, None] > places[:, None, None])  # (B, query, key)
        seen = (t <= t[:, None]) & ~hidden
        k, v = attention.keys_values(x)
        attended = F.scaled_dot_product_attention(attention.queries(x, t), k, v, seen[:, None], enable_gqa=True)
        return attention.o_proj(attended.transpose(1, 2).flatten(-2))

    attentions = [module for module in model.modules() if isinstance(module, CausalAttention)]
    with ExitStack() as hooks:
        for attention in attentions:
            hooks.enter_context(attention.register_forward_hook(without))
        yield


def mask_importance(model: BlockFFNModel, windows: Tensor, places: Tensor, horizon: int, batch_size: int = 32) -> Tensor:
    """What later tokens lose when one is hidden from them: nats a token, [B,P] float64.

        importance(t) = 1/h Σ_{s=t+1}^{t+h} (−ln p(x_{s+1} | x_0 … x_s without x_t) + ln p(x_{s+1} | x_0 … x_s))

    Exact, a pass for each place. The token right after x_t is not among the h = `horizon` that count: it is predicted
    at x_t itself.

    Args:
        windows: [B,T+1] token numbers; places: [B,P] positions t, each with t + h at most T − 1.
        batch_size: passes at a time; changes time and memory only.

    Raises ValueError for a horizon below 1, or a place that has fewer tokens after it.
    """
    length = windows.shape[1] - 1
    if horizon < 1 or places.min() < 0 or places.max() + horizon > length - 1:
        accepted = f"in windows of {length} tokens, {horizon} after each place count (at least 1)"
        given = f"{places.min().item()} … {places.max().item()}"
        raise ValueError(f"{accepted}, so that places lie in 0 … {length - 1 - horizon}; got {given}")
    later = torch.arange(1, horizon + 1, device=windows.device)
    rows = torch.arange(len(windows), device=windows.device).repeat_interleave(places.shape[1])
    found = []
    with evaluating(model):
        before = torch.cat([_losses(model, some) for some in windows.split(batch_size)])  # (B, T)
        for row, place in zip(rows.split(batch_size), places.flatten().split(batch_size), strict=True):
            with hidden_from_later(model, place):
                change = _losses(model, windows[row]) - before[row]
            found.append(change.gather(1, place[:, None] + later).mean(1))
    return torch.cat(found).view(places.shape).cpu()


def _losses(model: BlockFFNModel, windows: Tensor) -> Tensor:
    """Nats of the tokens after each of the first T: windows [B,T+1] → [B,T] float64."""
    return F.cross_entropy(model(windows[:, :-1]).mT, windows[:, 1:], reduction="none").double()


def word_classes(content: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """What each token is, by the characters start … end of a text that it covers: "function" or "content" for a whole
    word, of the closed list or another; "part" for less or more than one; "mark" if it holds no letter.
    """
    words = {match.span(): match.group().lower() for match in WORD.finditer(content)}
    classes = []
    for start, end in spans:
        piece = content[start:end]
        word = words.get((start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())))
        if word is not None:
            classes.append("function" if word in FUNCTION_WORDS else "content")
        else:
            classes.append("part" if any(map(str.isalpha, piece)) else "mark")
    return classes


# Rank correlations


def chapter_weights(chapters: Tensor, resamples: int, generator: Generator) -> Tensor:
    """How often each token of N counts, [R+1,N] float64: once in the first row, the sample itself; then as often as its
    chapter, numbered [N] from 0, is drawn when as many chapters are drawn with replacement.
    """
    count = int(chapters.max()) + 1
    drawn = torch.randint(count, (resamples, count), generator=generator)
    times = torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    return torch.cat((torch.ones(1, len(chapters), dtype=torch.float64), times[:, chapters]))


def weighted_ranks(values: Tensor, weights: Tensor) -> Tensor:
    """Ranks of values [N], ties in the middle, in samples that hold value n weights[r,n] times: [R,N], mean 1/2.

    A rank is the share of the sample that lies below, and half of what is equal.
    """
    distinct, place = values.unique(return_inverse=True)
    mass = weights.new_zeros(len(weights), len(distinct)).index_add_(1, place, weights)
    return ((mass.cumsum(1) - mass / 2) / weights.sum(1, keepdim=True))[:, place]


def rank_correlations(signals: Tensor, measures: Tensor, weights: Tensor, groups: Tensor | None = None) -> Tensor:
    """Spearman's correlation of signals [S,N] with measures [M,N], in each of the weighted samples [R,N]: [R,S,M].

    With `groups` [N] it is the partial one, given the group: the mean rank of each group is taken off first.

    NaN in a resample where a signal or a measure happens to be the same throughout. Raises ValueError if a signal or a measure
    is not finite, or never changes (within groups) in the first sample.
    """
    for name, rows in (("signals", signals), ("measures", measures)):
        if not rows.isfinite().all():
            raise ValueError(f"{name} hold {int((~rows.isfinite()).sum())} numbers that are NaN or infinite")
    group = None if groups is None else groups.unique(return_inverse=True)[1]
    found = []
    for some in weights.split(64):  # so many samples at once, so that memory does not grow with them
        x, y = (torch.stack([_centred(row, some, group) for row in rows.double()], 1) for rows in (signals, measures))
        weighted = some[:, None] * x  # (r, S, N)
        squares = (weighted * x).sum(-1)[:, :, None] * (some[:, None] * y * y).sum(-1)[:, None]
        found.append((weighted @ y.mT / squares.sqrt()).where(squares > 1e-12, torch.nan))
    drawn = torch.cat(found)
    if drawn[0].isnan().any():
        raise ValueError("a signal or a measure never changes: it has no rank correlation")
    return drawn


def _centred(values: Tensor, weights: Tensor, group: Tensor | None) -> Tensor:
    ranks = weighted_ranks(values, weights)
    if group is None:
        return ranks - 0.5
    sums, mass = (
        torch.zeros(len(weights), int(group.max()) + 1, dtype=torch.float64).index_add_(1, group, rows)
        for rows in (weights * ranks, weights)
    )
    return ranks - (sums / mass.clamp(min=1))[:, group]


def percentile_interval(draws: Tensor) -> Tensor:
    """Estimate and 95 % interval [3,...] of a statistic [R+1,...]: of the sample in the first row, then of its resamples.

    Resamples that have no such statistic (NaN) are left out.
    """
    tail = (1 - CONFIDENCE) / 2
    low, high = draws[1:].nanquantile(torch.tensor([tail, 1 - tail], dtype=draws.dtype), 0)
    return torch.stack((draws[0], torch.minimum(low, draws[0]), torch.maximum(high, draws[0])))
