"""Figures that a reader moves, each described once: for plotly, and for the twin that Matplotlib draws."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nsm_support.figures.show import PALETTE, is_range

Traces = list[dict[str, Any]]
DASHES = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}  # as Matplotlib and as plotly names them


@dataclass(frozen=True)
class Line:
    """A line y over x, with a band from low to high around it if one is given."""

    x: ArrayLike
    y: ArrayLike
    label: str = ""
    _: KW_ONLY
    color: str = PALETTE[0]
    dash: str = "-"
    marker: bool = False
    band: tuple[ArrayLike, ArrayLike] | None = None

    def traces(self) -> list[dict[str, Any]]:
        x, y = _listed(self.x), _listed(self.y)
        line = {"color": self.color, "dash": DASHES[self.dash], "width": 2.5}
        mode = "lines+markers" if self.marker else "lines"
        found = [{"type": "scatter", "x": x, "y": y, "mode": mode, "line": line, "name": self.label}]
        if self.band is not None:
            low, high = map(_listed, self.band)
            around = {"x": [*x, *x[::-1]], "y": [*high, *low[::-1]], "line": {"width": 0, "color": self.color}}
            look: dict[str, Any] = {"fill": "toself", "opacity": 0.3, "hoverinfo": "skip"}
            found.insert(0, {"type": "scatter", **around, **look, "name": ""})
        return found

    def draw(self, axes: Any) -> None:
        axes.plot(self.x, self.y, self.dash, color=self.color, label=self.label or None, marker="." if self.marker else "")
        if self.band is not None:
            axes.fill_between(self.x, *self.band, color=self.color, alpha=0.3, lw=0)


@dataclass(frozen=True)
class Bars:
    """Upright bars of heights y at x."""

    x: ArrayLike
    y: ArrayLike
    label: str = ""
    _: KW_ONLY
    color: str = PALETTE[0]

    def traces(self) -> list[dict[str, Any]]:
        bars = {"x": _listed(self.x), "y": _listed(self.y), "marker": {"color": self.color}}
        return [{"type": "bar", **bars, "name": self.label}]

    def draw(self, axes: Any) -> None:
        axes.bar(self.x, self.y, color=self.color, label=self.label or None)


@dataclass(frozen=True)
class Heat:
    """A table z [rows, columns], its first row at the top; NaN stays empty.

    `colors` is the name of a scale that plotly and Matplotlib share, or a colour for each of the values 0, 1, 2, …; `notes`
    are words under the pointer, cell by cell; `numbers` writes each value into its cell; `scale` names the colour bar.
    """

    z: ArrayLike
    x: Sequence[Any] | None = None
    y: Sequence[Any] | None = None
    _: KW_ONLY
    colors: str | Sequence[str] = "viridis"
    limits: tuple[float, float] = (0.0, 1.0)
    notes: ArrayLike | None = None
    numbers: bool = False
    scale: str = ""

    @property
    def ends(self) -> tuple[float, float]:
        return self.limits if isinstance(self.colors, str) else (-0.5, len(self.colors) - 0.5)

    def traces(self) -> list[dict[str, Any]]:
        steps = [] if isinstance(self.colors, str) else [(i, c) for i, c in enumerate(self.colors)]
        scale = [[(i + end) / len(steps), c] for i, c in steps for end in (0, 1)] or self.colors
        data: dict[str, Any] = {"z": _listed(self.z), "hovertemplate": "%{y}, %{x}: %{z}<extra></extra>"}
        data |= {key: list(names) for key, names in (("x", self.x), ("y", self.y)) if names is not None}
        if self.notes is not None:
            data |= {"text": np.asarray(self.notes).tolist(), "hovertemplate": "%{text}<extra></extra>"}
        if self.numbers:
            data["texttemplate"] = "%{z}"
        gap = int(max(np.shape(self.z)) <= 24)
        look = {"colorscale": scale, "zmin": self.ends[0], "zmax": self.ends[1], "xgap": gap, "ygap": gap}
        bar = {"showscale": bool(self.scale), "colorbar": {"title": {"text": self.scale}}}
        return [{"type": "heatmap", **data, **look, **bar}]

    def draw(self, axes: Any) -> None:
        from matplotlib.colors import ListedColormap

        z = np.asarray(self.z, dtype=float)
        colors = self.colors if isinstance(self.colors, str) else ListedColormap(list(self.colors))
        low, high = self.ends
        image = axes.imshow(z, cmap=colors, vmin=low, vmax=high, aspect="auto", interpolation="none")
        for names, ticks in ((self.x, axes.set_xticks), (self.y, axes.set_yticks)):
            if names is not None:
                some = range(0, len(names), -(-len(names) // 12))
                ticks(some, [names[i] for i in some])
        if self.scale:
            axes.figure.colorbar(image, ax=axes, label=self.scale)
        for row, column in np.argwhere(~np.isnan(z)) if self.numbers else ():
            value = z[row, column]
            dark = sum(w * c for w, c in zip((0.3, 0.6, 0.1), image.cmap(image.norm(value)), strict=False)) < 0.5
            axes.text(column, row, f"{value:g}", ha="center", va="center", size=9, color="white" if dark else "black")


@dataclass(frozen=True)
class Panel:
    """What one pair of axes shows. `square` gives cells equal sides, `bare` hides the axes."""

    marks: Sequence[Line | Bars | Heat]
    title: str = ""
    _: KW_ONLY
    xlabel: str = ""
    ylabel: str = ""
    ylim: tuple[float | None, float | None] | None = None
    square: bool = False
    bare: bool = False

    def traces(self) -> list[dict[str, Any]]:
        return [trace for mark in self.marks for trace in mark.traces()]

    def draw(self, axes: Any, title: str) -> None:
        for mark in self.marks:
            mark.draw(axes)
        axes.set(title=title, xlabel=self.xlabel, ylabel=self.ylabel)
        if self.ylim is not None:
            axes.set_ylim(*self.ylim)
        if self.square:
            axes.set_aspect("equal")
        if self.bare:
            axes.set_axis_off()


class Explorer(NamedTuple):
    """A figure that a reader moves, as `show` takes it: plotly's, Matplotlib's, the controls, and what they change."""

    figure: Any
    still: Any
    controls: Mapping[str, Sequence[Any]]
    frames: dict[tuple[Any, ...], list[dict[str, Any]]]


def explore(
    draw: Callable[..., Sequence[Panel]],
    controls: Mapping[str, Sequence[Any]],
    *,
    columns: int = 1,
    stills: Sequence[tuple[Any, ...]] = (),
    heights: Sequence[float] | None = None,
    widths: Sequence[float] | None = None,
    height: int = 430,
    size: tuple[float, float] | None = None,
) -> Explorer:
    """One description of a figure for plotly, which a reader moves, and for Matplotlib, which stands still.

    Args:
        draw: takes one choice of each control, in order, and returns the panels; as many lines and tables whatever is chosen.
        controls: label → choices, as `show` has them.
        stills: the choices that the still figure shows, under one another, each named in its titles; that with which the page
            opens if none is given.
        heights, widths: of the rows and of the `columns` of panels, relatively.
        height, size: of plotly's figure in pixels, of the still figure in inches.

    Raises ValueError if two choices have other lines or tables.
    """
    panels = {choice: list(draw(*choice)) for choice in product(*controls.values())}
    traces = {choice: [trace for one in found for trace in one.traces()] for choice, found in panels.items()}
    opening = tuple(choices[-1 if is_range(choices) else 0] for choices in controls.values())
    frames = _frames(traces, opening)
    grid = min(columns, len(panels[opening])), heights, widths
    shown = [(one, title) for choice, title in _titled(stills or [opening], controls) for one in panels[choice]]
    named = [(one, ", ".join(filter(None, [one.title, title]))) for one, title in shown]
    return Explorer(_moving(panels[opening], *grid, height), _still(named, columns, heights, widths, size), controls, frames)


def _frames(traces: dict[tuple[Any, ...], Traces], opening: tuple[Any, ...]) -> dict[tuple[Any, ...], Traces]:
    """For each choice what changes in its traces. Raises ValueError for traces of another kind than the opening's."""
    for choice, found in traces.items():
        if [one["type"] for one in found] != [one["type"] for one in traces[opening]]:
            raise ValueError(f"explore: {choice!r} has other lines or tables than {opening!r}; all choices have the same")
    changing = {
        (i, key)
        for found in traces.values()
        for i, (one, first) in enumerate(zip(found, traces[opening], strict=True))
        for key in ("x", "y", "z", "text")
        if one.get(key) != first.get(key)
    }
    return {
        choice: [{key: one[key] for key in one if (i, key) in changing} for i, one in enumerate(found)]
        for choice, found in traces.items()
    }


def _titled(stills: Sequence[tuple[Any, ...]], controls: Mapping[str, Sequence[Any]]) -> list[tuple[tuple[Any, ...], str]]:
    """The choices of a still figure, each with the words for what differs between them."""
    varied = [i for i in range(len(controls)) if len({choice[i] for choice in stills}) > 1]
    labels = list(controls)
    words = [[c if isinstance(c, str) else f"{labels[i]} = {c}" for i, c in enumerate(choice)] for choice in stills]
    return [(choice, ", ".join(word[i] for i in varied)) for choice, word in zip(stills, words, strict=True)]


def _moving(panels: list[Panel], columns: int, heights: Any, widths: Any, height: int) -> Any:
    """The panels of one choice by plotly."""
    from plotly.subplots import make_subplots

    rows, titles = -(-len(panels) // columns), [one.title for one in panels]
    figure = make_subplots(
        rows, columns, subplot_titles=titles, row_heights=heights, column_widths=widths, vertical_spacing=0.24 / rows
    )
    seen = {""}
    for place, one in enumerate(panels):
        at = {"row": place // columns + 1, "col": place % columns + 1}
        for trace in one.traces():
            in_legend = {} if trace["type"] == "heatmap" else {"showlegend": trace["name"] not in seen}
            seen.add(trace.get("name", ""))
            figure.add_trace({**trace, **in_legend}, **at)
        across, upward = _axes(one, place)
        figure.update_xaxes(title=one.xlabel, visible=not one.bare, **across, **at)
        figure.update_yaxes(title=one.ylabel, visible=not one.bare, **upward, **at)
    return figure.update_layout(height=height, legend={"orientation": "h", "y": -75 / (height - 80)}, showlegend=len(seen) > 1)


def _axes(panel: Panel, place: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """How plotly lays out the two axes of a panel."""
    tables = [mark for mark in panel.marks if isinstance(mark, Heat)]
    named = {"type": "category"} if any(isinstance(name, str) for mark in tables for name in mark.x or ()) else {}
    square = {"constrain": "domain"} if panel.square else {}
    joined = {"scaleanchor": f"x{place + 1 if place else ''}"} if panel.square else {}
    span = {"range": list(panel.ylim)} if panel.ylim else {"autorange": "reversed"} if tables else {}
    return {**named, **square}, {**joined, **square, **span}


def _still(panels: list[tuple[Panel, str]], columns: int, heights: Any, widths: Any, size: Any) -> Any:
    """Panels under their titles by Matplotlib."""
    import matplotlib.pyplot as plt

    rows = -(-len(panels) // columns)
    ratios = {"height_ratios": heights if heights and len(heights) == rows else None, "width_ratios": widths}
    still, axes = plt.subplots(rows, columns, figsize=size or (6.4, 2.8 * rows + 0.6), squeeze=False, **ratios)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, (one, title) in zip(axes.flat, panels, strict=False):
        one.draw(ax, title)
    named = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if named:
        still.legend(named.values(), named.keys(), loc="outside upper center", ncols=min(3, len(named)))
    return still


def _listed(values: ArrayLike) -> list[Any]:
    """Numbers as JSON holds them, to four decimals; None for NaN."""
    array = np.asarray(values)
    if array.dtype.kind != "f":
        return array.tolist()
    rounded = np.round(array.astype(float), 4).astype(object)
    rounded[np.isnan(array)] = None
    return rounded.tolist()
