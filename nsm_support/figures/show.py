"""One way to show a figure: `show`. One palette, one look, both themes, and words for whoever cannot see it."""

import html
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

PALETTE = ("#3182bd", "#d95f0e", "#1b9e77", "#c05a9f", "#8a8a1c", "#6a6fd0", "#808080")
"""The book's colours, at least 3 to 1 on white and on the dark theme's ground, told apart by the colour-blind."""

BLUE, ORANGE, GREEN, PINK, OLIVE, VIOLET, GREY = PALETTE
COLORS = {"trained": BLUE, "untrained": GREY, "random": ORANGE, "chance": GREY, "optimum": GREEN}
COLORS |= {"nsm": BLUE, "transformer": ORANGE, "lstm": GREEN, "gru": PINK, "mamba": VIOLET, "counter": OLIVE, "cnn": OLIVE}
"""One colour for one model or control, throughout the book."""

INK, GRID = "#1b1c1d", "#c7c8c9"  # stand-ins in the SVG, which the page replaces by its own theme's colours
STATIC = Path(__file__).resolve().parents[1] / "static"
_shown_before = False  # in a live notebook the first figure brings plotly.js along


def setup_style(context: str = "notebook") -> None:
    """Set Matplotlib's defaults to the book's look, in the scale of `notebook` (the book), `paper` or `talk`.

    Raises ValueError for another context.
    """
    import matplotlib
    from cycler import cycler

    sizes = {"paper": 9.0, "notebook": 11.0, "talk": 15.0}
    if context not in sizes:
        raise ValueError(f"setup_style: context {context!r}; accepted: {', '.join(sizes)}")
    inked = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    look: dict[Any, Any] = {**dict.fromkeys(inked, INK), "axes.prop_cycle": cycler(color=PALETTE), "image.cmap": "viridis"}
    look |= {"axes.facecolor": "none", "figure.facecolor": "none", "legend.frameon": False, "axes.axisbelow": True}
    look |= {"axes.grid": False, "grid.color": GRID, "axes.spines.top": False, "axes.spines.right": False}
    look |= {"font.size": sizes[context], "axes.titlesize": "medium", "figure.figsize": (6.4, 3.8)}
    matplotlib.rcParams.update({**look, "figure.constrained_layout.use": True, "svg.fonttype": "path"})


def svg(figure, name: str) -> str:
    """A Matplotlib figure as inline SVG that takes its ink from the page, the same bytes for the same figure."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    width = float(text.split('viewBox="0 0 ', 1)[1].split(" ", 1)[0]) * 96 / 72  # points to CSS pixels
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = text.replace("<svg", f'<svg aria-hidden="true" focusable="false" style="width:{width:.0f}px"', 1)
    # Several drawings share a page: their inner names must not.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace(INK, "currentColor").replace(GRID, "var(--nsm-grid, #c7c8c9)")


def is_range(choices: Sequence) -> bool:
    """Whether a slider chooses among these: three numbers or more. It opens at its end, a drop-down at its first choice."""
    return all(isinstance(choice, (int, float)) for choice in choices) and len(choices) > 2


def _controls(controls: Mapping[str, Sequence]) -> str:
    """Native inputs: a range for numbers in order, a drop-down for anything else."""
    parts = []
    for label, choices in controls.items():
        key, text = html.escape(label), [html.escape(str(choice)) for choice in choices]
        if is_range(choices):
            last = len(choices) - 1
            parts.append(
                f'<label>{key} <input type="range" data-control="{key}" min="0" max="{last}" value="{last}" '
                f"data-choices='{json.dumps(text)}'> <output>{text[-1]}</output></label>"
            )
        else:
            options = "".join(f'<option value="{i}">{one}</option>' for i, one in enumerate(text))
            parts.append(f'<label>{key} <select data-control="{key}">{options}</select></label>')
    return f'<div class="nsm-controls">{"".join(parts)}</div>'


def _prelude() -> str:
    """What a live notebook needs once and the site has anyway: plotly.js, the figure script and its style."""
    global _shown_before
    if _shown_before:
        return ""
    _shown_before = True
    from plotly.offline import get_plotlyjs

    css, js = ((STATIC / name).read_text() for name in ("figures.css", "figures.js"))
    return f"<style>{css}</style><script>{get_plotlyjs()}</script><script>{js}</script>"


def show(
    figure,
    *,
    name: str,
    alt: str,
    caption: str,
    still=None,
    controls: Mapping[str, Sequence] | None = None,
    frames: Mapping[tuple, Sequence[dict[str, Any]]] | None = None,
) -> None:
    """Show a Matplotlib or plotly figure in a page.

    Args:
        figure: a Matplotlib or a plotly figure, or one of `explore`, which has its twin, controls and frames with it.
        name: unique on the page; the figure can be linked to as `#fig-NAME`.
        alt: what is seen, in words, for whoever does not see it.
        caption: what was measured, on what, how often. HTML.
        still: for a plotly figure, its twin drawn by Matplotlib: for print, for no JavaScript, and until it loads.
        controls: for a plotly figure, native inputs: label → choices. Numbers make a slider that starts at its end, anything else
            a drop-down that starts at its first choice.
        frames: for each combination of choices (a tuple, in the controls' order) one dict a trace, with what changes in that
            trace, e.g. `{("7", 0): [{"z": weights}]}`.

    Raises ValueError if name, alt or caption is empty, a plotly figure has no twin, or a combination has no frame; TypeError for
    something that is neither kind of figure.
    """
    from IPython.display import display

    if hasattr(figure, "frames") and hasattr(figure, "still"):
        figure, still, controls, frames = figure
    _check_words(name, alt, caption)
    data: dict[str, Any] = {}
    if hasattr(figure, "savefig"):
        if controls or frames or still:
            raise ValueError(f"show({name!r}): still, controls and frames belong to a plotly figure")
        drawing = svg(figure, name)
        body = f'<div class="nsm-drawing" role="img" tabindex="0" aria-label="{html.escape(alt)}">{drawing}</div>'
    elif hasattr(figure, "to_plotly_json"):
        body, data = interactive(figure, name, alt, still, controls or {}, frames or {})
    else:
        raise TypeError(f"show({name!r}): accepts a Matplotlib or a plotly figure, got {type(figure).__name__}")
    text = f'<figure class="nsm-figure" id="fig-{name}">{body}<figcaption>{caption}</figcaption></figure>'
    if data and "NSM_BOOK_RUN" not in os.environ:
        text, data = _prelude() + text, {}
    display({"text/html": text, "text/plain": f"Figure {name}: {alt}", **data}, raw=True)
    import matplotlib.pyplot as plt

    for drawn in (figure, still):  # else Matplotlib shows it a second time
        if hasattr(drawn, "savefig"):
            plt.close(drawn)


def _check_words(name: str, alt: str, caption: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise ValueError(f"show: name {name!r}; accepted: lower-case letters, digits and '-'")
    for what, words in (("alt", alt), ("caption", caption)):
        if len(words.split()) < 4:
            raise ValueError(f"show({name!r}): {what}={words!r} does not say what is seen; accepted: a sentence")


def interactive(figure, name: str, alt: str, still, controls, frames) -> tuple[str, dict[str, Any]]:
    """The HTML of a plotly figure with its controls and its still twin, and its own MIME bundle; arguments as of `show`.

    Raises ValueError without a twin, or if controls and frames do not match.
    """
    if still is None or not hasattr(still, "savefig"):
        raise ValueError(f"show({name!r}): a plotly figure needs still=, its twin drawn by Matplotlib")
    missing = [choice for choice in product(*controls.values()) if choice not in frames] if controls else list(frames)
    if missing:
        raise ValueError(f"show({name!r}): controls and frames do not match, e.g. at {missing[0]!r}")
    figure.update_layout(template="none", colorway=PALETTE, hoverlabel={"namelength": -1})
    if not figure.layout.margin.to_plotly_json():
        figure.update_layout(margin={"l": 50, "r": 15, "t": 35, "b": 45})
    if figure.layout.height is None:
        figure.update_layout(height=380)
    spec = json.loads(figure.to_json())
    from plotly.io.json import to_json_plotly

    moving = {}
    for choice, traces in frames.items():
        key = ",".join(str(list(choices).index(one)) for choices, one in zip(controls.values(), choice, strict=True))
        moving[key] = json.loads(to_json_plotly(list(traces)))
    payload = json.dumps({"figure": spec, "frames": moving}, sort_keys=True, separators=(",", ":")).replace("<", "\\u003c")
    words = html.escape(alt)
    body = (
        f'{_controls(controls) if controls else ""}<div class="nsm-plot" role="img" aria-label="{words}">'
        f'<div class="nsm-drawing nsm-still">{svg(still, name)}</div><div class="nsm-live"></div></div>'
        f'<script type="application/json" class="nsm-data">{payload}</script>'
    )
    return body, {"application/vnd.plotly.v1+json": spec}
