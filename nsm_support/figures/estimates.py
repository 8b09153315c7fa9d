"""Estimates with their intervals, drawn alike on every page."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nsm_support.figures.show import PALETTE
from nsm_support.results import Interval


def intervals(
    axes: Any,
    estimates: Mapping[str, Interval | None] | Iterable[Interval | None],
    *,
    at: Iterable[float] | None = None,
    vertical: bool = False,
    color: str | Iterable[str] = PALETTE[0],
    marker: str = "D",
    label: str | None = None,
    runs: Iterable[ArrayLike] | None = None,
    beside: float = 0.0,
    run_marker: str = "o",
    **look: Any,
) -> None:
    """Draw estimates as marks with their intervals, a row each from the top, or from the left if `vertical`.

    Args:
        axes: of Matplotlib.
        estimates: if named, the names stand at the axis. None leaves a row its runs alone.
        at: the places of the rows; 0, 1, 2, … by default.
        color: one for all, or one for each.
        runs: for each row what its single runs gave, as small marks.
        beside: how far from the interval these stand.
        look: of the marks and bars, as `Axes.errorbar` takes it.
    """
    rows = list(estimates.values() if isinstance(estimates, Mapping) else estimates)
    places = np.arange(len(rows)) if at is None else np.array(list(at), dtype=float)
    colors = [color] * len(rows) if isinstance(color, str) else list(color)
    if runs is not None:
        for place, values, ink in zip(places, runs, colors, strict=True):
            _marks(axes, values, place + beside, run_marker, ink, vertical)
    look = {"ls": "none", "ms": 6.0, "lw": 2.0, **look}
    for ink in dict.fromkeys(colors):  # one call for each colour, so that a line may join its marks
        mine = [(p, one) for p, one, own in zip(places, rows, colors, strict=True) if own == ink and one is not None]
        middle = np.array([one.estimate for _, one in mine])
        reach = np.array([[one.estimate - one.low, one.high - one.estimate] for _, one in mine]).reshape(-1, 2).T
        where = np.array([place for place, _ in mine])
        points = (where, middle, reach) if vertical else (middle, where, None, reach)
        axes.errorbar(*points, color=ink, marker=marker, label=label, **look)
    if isinstance(estimates, Mapping):
        _name_rows(axes, places, list(estimates), vertical)


def _name_rows(axes: Any, places: Any, names: list[str], vertical: bool) -> None:
    """The names at the axis, and room for half a row beyond the outer ones."""
    set_ticks, set_limits = (axes.set_xticks, axes.set_xlim) if vertical else (axes.set_yticks, axes.set_ylim)
    set_ticks(places, names)
    set_limits(*((-0.5, len(names) - 0.5) if vertical else (len(names) - 0.5, -0.5)))


def _marks(axes: Any, values: ArrayLike, place: float, marker: str, color: str, vertical: bool) -> None:
    """Single runs as small marks at the place of their row."""
    spread = np.asarray(values, dtype=float).ravel(), np.full(np.size(values), place)
    size = 13.0 if marker == "|" else 4.0
    axes.plot(*(spread[::-1] if vertical else spread), marker, color=color, ms=size, alpha=0.55, zorder=1)
