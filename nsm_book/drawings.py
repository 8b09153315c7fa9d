"""The drawings of a sweep: lines with intervals and a heatmap, each with native controls, a still twin and words."""

import html
from typing import Any

from nsm_book.markup import number
from nsm_book.series import Choice, Point, in_order, points, settings, told
from nsm_book.swept import Row, Swept
from nsm_support.figures import PALETTE

TICKS = 24  # names along an axis
CELLS = 12  # rows and columns of a heatmap up to which every cell has room for its number
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")
STILL = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
STILL_SYMBOLS = "osD^xP*"


def safe(text: str) -> str:
    """Text that plotly shows as it stands: it reads markup in labels."""
    return html.escape(text, quote=False)  # it knows no &quot;


def link(swept: Swept, point: Point) -> str | None:
    """Where a point leads: the notebook of its one run, or the table's line of its first; None in a large sweep."""
    if swept.large:
        return None
    notebook = swept.notebook(point.rows[0]) if len(point.rows) == 1 else None
    return notebook or f"#{swept.place(point.rows[0])}"


def style(index: int) -> dict[str, str]:
    """Colour, dash and mark of the line with this number; 84 lines look different."""
    return {
        "color": PALETTE[index % len(PALETTE)],
        "dash": DASHES[index // len(PALETTE) % len(DASHES)],
        "symbol": SYMBOLS[index % len(SYMBOLS)],
    }


def axis(name: str, values: list[str]) -> dict[str, Any]:
    return {
        "title": {"text": safe(name)},
        "type": "category",
        "categoryorder": "array",
        "categoryarray": [safe(value) for value in values],
    }


def places(lines: int) -> list[float]:
    """How far each line stands beside the middle of its place along the axis, so that no bar hides another."""
    apart = min(0.06, 0.5 / lines)
    return [apart * (number - (lines - 1) / 2) for number in range(lines)]


def line_axis(name: str, values: list[str]) -> dict[str, Any]:
    named = ticks(values)
    return {
        "title": {"text": safe(name)},
        "type": "linear",
        "tickmode": "array",
        "tickvals": [*named],
        "ticktext": [safe(values[i]) for i in named],
        "range": [-0.5, len(values) - 0.5],
    }


def ticks(values: list[str]) -> range:
    """The places along an axis that have room for their value's name: every second, third … if there are many."""
    return range(0, len(values), -(-len(values) // TICKS))


def line_frame(swept: Swept, rows: list[Row], choice: Choice, measure: str, most: int) -> list[dict[str, Any]]:
    """What each of `most` traces shows for one choice and measure, and the layout behind the last."""
    found, along = points(rows, choice, measure), in_order(rows, choice.along)
    traces, values = [], in_order(rows, choice.line)
    for value, beside in zip(values, places(len(values)), strict=True):
        line = [(i + beside, found[value, x]) for i, x in enumerate(along) if (value, x) in found]
        spans = [(0.0, 0.0) if p.low is None or p.high is None else (p.high - p.mean, p.mean - p.low) for _, p in line]
        name = safe(f"{choice.line} = {value}" if choice.line else measure)
        traces.append(
            {
                "x": [x for x, _ in line],
                "y": [p.mean for _, p in line],
                "visible": bool(line),
                "name": name,
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [up for up, _ in spans],
                    "arrayminus": [down for _, down in spans],
                },
                "customdata": [link(swept, p) for _, p in line],
                "text": [f"{told(p)} (n = {len(p.rows)})" for _, p in line],
                "hovertext": [safe(x) for x in along if (value, x) in found],
                "hovertemplate": f"{safe(choice.along)} = %{{hovertext}}<br>{safe(measure)}: %{{text}}<extra>{name}</extra>",
            }
        )
    traces += [{"x": [], "y": [], "visible": False}] * (most - len(traces))
    return [*traces, {"xaxis": line_axis(choice.along, along), "yaxis": {"title": {"text": safe(measure)}}}]


def grid_frame(swept: Swept, rows: list[Row], choice: Choice, measure: str) -> list[dict[str, Any]]:
    """What the heatmap shows for one choice and measure, and the layout behind it."""
    found = points(rows, choice, measure)
    along, across = in_order(rows, choice.along), in_order(rows, choice.line)
    cells = [[found.get((value, x)) for x in along] for value in across]
    small = len(along) <= CELLS and len(across) <= CELLS
    return [
        {
            "x": [safe(x) for x in along],
            "y": [safe(value) for value in across],
            "z": [[p and p.mean for p in line] for line in cells],
            "customdata": [[p and link(swept, p) for p in line] for line in cells],
            "text": [[number(p.mean) if p else "" for p in line] for line in cells],
            "texttemplate": "%{text}" if small else "",
            "colorbar": {"title": {"text": safe(measure), "side": "right"}},
            "hovertemplate": f"{safe(choice.along)} = %{{x}}<br>{safe(choice.line)} = %{{y}}<br>"
            f"{safe(measure)}: %{{z}}<extra></extra>",
        },
        {"xaxis": axis(choice.along, along), "yaxis": axis(choice.line, across)},
    ]


def still_lines(rows: list[Row], choice: Choice, measure: str):
    """The first drawing, by Matplotlib."""
    figure, axes = _still()
    found, along = points(rows, choice, measure), in_order(rows, choice.along)
    values = in_order(rows, choice.line)
    for index, (value, beside) in enumerate(zip(values, places(len(values)), strict=True)):
        line = [(i + beside, found[value, x]) for i, x in enumerate(along) if (value, x) in found]
        spans = [(0.0, 0.0) if p.low is None or p.high is None else (p.mean - p.low, p.high - p.mean) for _, p in line]
        look = style(index)
        axes.errorbar(
            [x for x, _ in line],
            [p.mean for _, p in line],
            [*zip(*spans, strict=True)] or None,
            capsize=3,
            color=look["color"],
            linestyle=STILL[look["dash"]],
            marker=STILL_SYMBOLS[SYMBOLS.index(look["symbol"])],
            label=f"{choice.line} = {value}".replace("$", r"\$"),
        )
    axes.set_xticks([*ticks(along)], [along[i].replace("$", r"\$") for i in ticks(along)])
    axes.set(xlabel=choice.along, ylabel=measure)
    if choice.line:
        axes.legend(fontsize="small")
    return figure


def still_grid(rows: list[Row], choice: Choice, measure: str):
    """The first heatmap, by Matplotlib."""
    figure, axes = _still()
    found = points(rows, choice, measure)
    along, across = in_order(rows, choice.along), in_order(rows, choice.line)
    cells = [[found[value, x].mean if (value, x) in found else float("nan") for x in along] for value in across]
    figure.colorbar(axes.pcolormesh(cells), ax=axes, label=measure)
    axes.set_xticks([i + 0.5 for i in ticks(along)], [along[i].replace("$", r"\$") for i in ticks(along)])
    axes.set_yticks([i + 0.5 for i in ticks(across)], [across[i].replace("$", r"\$") for i in ticks(across)])
    axes.set(xlabel=choice.along, ylabel=choice.line)
    return figure


def _still():
    from matplotlib.figure import Figure

    figure = Figure()
    return figure, figure.add_subplot()


def drawings(swept: Swept, rows: list[Row], kept: list[Choice], names: list[str], name: str) -> list[str]:
    """The figures of a sweep as HTML: lines, and a heatmap if two parameters differ.

    Args:
        rows: the runs that are done.
        kept: the choices of parameters; the first is shown first.
        names: the measures; the first is shown first.
        name: what the figures' names begin with.
    """
    import matplotlib
    import plotly.graph_objects as go

    from nsm_support.figures import setup_style

    most = max(len(in_order(rows, choice.line)) for choice in kept)
    base = []
    for look in map(style, range(most)):
        base.append(
            go.Scatter(
                mode="lines+markers",
                line={key: look[key] for key in ("color", "dash")},
                marker={"symbol": look["symbol"], "size": 9},
                error_y={"color": look["color"]},
            )
        )
    spans = (
        "Student's 95 % interval over runs that differ by their seed alone; of a single run, "
        if len(rows) > settings(rows)
        else ""
    ) + "the 95 % interval that the run itself reports, where it does"
    about = f"{len(rows)} runs of {swept.page.name}"
    with matplotlib.rc_context():
        setup_style()
        found = [
            _figure(
                f"{name}-lines",
                go.Figure(base),
                still_lines(rows, kept[0], names[0]),
                kept,
                names,
                lambda choice, measure: line_frame(swept, rows, choice, measure, most),
                alt=f"Lines with intervals: {names[0]} along {kept[0].label()}, from {about}.",
                caption=f"{about}. A point is the mean of the runs at its place, its bar {spans}."
                + (
                    ""
                    if swept.large
                    else " Click a point to open its executed notebook, or, of several runs, their lines in the table."
                ),
            )
        ]
        if kept[0].line:
            found.append(
                _figure(
                    f"{name}-grid",
                    go.Figure(go.Heatmap(colorscale="Viridis")),
                    still_grid(rows, kept[0], names[0]),
                    kept,
                    names,
                    lambda choice, measure: grid_frame(swept, rows, choice, measure),
                    alt=f"Heatmap: {names[0]} along {kept[0].label()}, from {about}.",
                    caption=f"The same means, as a map; blank where no run has been. {about}.",
                )
            )
    return found


def _figure(name: str, figure, still, kept: list[Choice], names: list[str], frame, *, alt: str, caption: str) -> str:
    """One figure: what is chosen first in its traces, all else in its frames."""
    from nsm_support.figures import interactive

    controls: dict[str, list[str]] = {}
    if len(names) > 1:
        controls["measure"] = names
    if len(kept) > 1:
        controls["parameters"] = [choice.label() for choice in kept]
    *first, layout = frame(kept[0], names[0])
    for trace, changes in zip(figure.data, first, strict=True):
        trace.update(changes)
    figure.update_layout({**layout, "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"}})
    frames = {}
    for measure in names:
        for choice in kept:
            key = tuple(chosen for label, chosen in (("measure", measure), ("parameters", choice.label())) if label in controls)
            frames[key] = frame(choice, measure)
    body, _ = interactive(figure, name, alt, still, controls, frames if controls else {})
    return f'<figure class="nsm-figure" id="fig-{name}">{body}<figcaption>{html.escape(caption)}</figcaption></figure>'
