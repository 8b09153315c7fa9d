"""`show`: words, twins, controls, themes; and the same bytes for the same figure."""

import json
import re

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from nsm_book import gate
from nsm_support import figures
from nsm_support.figures import COLORS, PALETTE, Bars, Heat, Line, Panel, setup_style, show, svg
from nsm_support.statistics import Estimate

WORDS = {"name": "curve", "alt": "A curve that rises to the right", "caption": "Squares of the first three numbers."}


@pytest.fixture
def shown(monkeypatch):
    monkeypatch.setenv("NSM_BOOK_RUN", "1")
    calls = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: calls.append(data))
    return calls


def curve():
    setup_style()
    figure, axes = plt.subplots()
    axes.plot([1, 2, 3], [1, 4, 9])
    axes.set(xlabel="number", title="squares")
    axes.grid()
    return figure


def test_svg_is_the_same_twice_and_takes_the_pages_ink():
    one, two = svg(curve(), "curve"), svg(curve(), "curve")
    assert one == two
    assert "currentColor" in one and "var(--nsm-grid" in one
    assert figures.INK not in one and figures.GRID not in one.replace("var(--nsm-grid, #c7c8c9)", "") and "<metadata" not in one
    assert set(re.findall(r'(?:href="#|url\(#)([a-z]+)-', one)) == {"curve"}


def test_matplotlib_figure_has_words_and_is_closed(shown):
    figure = curve()
    show(figure, **WORDS)
    html = shown[0]["text/html"]
    assert 'role="img"' in html and f'aria-label="{WORDS["alt"]}"' in html and 'id="fig-curve"' in html
    assert "<figcaption>Squares" in html and "<svg" in html
    assert not plt.fignum_exists(figure.number)


def test_plotly_figure_has_a_twin_native_controls_and_its_frames(shown):
    bars = go.Figure(go.Bar(x=["a", "b"], y=[1, 2]))
    frames = {
        (kind, step): [{"y": [step, step * (2 if kind == "<up>" else 3)]}] for kind in ("<up>", "down") for step in (0, 5, 10)
    }
    show(bars, **WORDS, still=curve(), controls={"Kind": ["<up>", "down"], "Step": [0, 5, 10]}, frames=frames)
    data = shown[0]
    html = data["text/html"]
    assert '<select data-control="Kind">' in html and 'type="range"' in html and "nsm-still" in html
    assert "&lt;up&gt;" in html
    payload = json.loads(re.search(r'class="nsm-data">(.*?)</script>', html).group(1))
    assert payload["frames"]["1,2"] == [{"y": [10, 30]}] and payload["figure"]["data"][0]["type"] == "bar"
    assert "<up>" not in re.search(r"<script.*?</script>", html).group(0)
    assert data["application/vnd.plotly.v1+json"]["data"][0]["type"] == "bar"


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("ground", ["#ffffff", "#121212"])
@pytest.mark.parametrize("colour", PALETTE)
def test_every_colour_can_be_seen_in_both_themes(colour, ground):
    """WCAG 2.1, 1.4.11: at least 3 : 1 for what a figure says."""
    light, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 3


def test_roles_share_the_palette():
    assert set(COLORS.values()) <= set(PALETTE)


def test_table_escapes_names_its_rows_and_links(shown):
    frame = pd.DataFrame({"<page>": ["a & b", "c"], "loss": [0.12345, float("nan")], "steps": [12_000, -3], "done": [True, None]})
    figures.table(frame, label='Runs "today"', links={(1, "loss"): "c.html?a&b"}, ids=["one", "two"], folded="All <runs>")
    html = shown[0]["text/html"]
    assert html.startswith('<details class="nsm-fold"><summary>All &lt;runs&gt;</summary><div class="nsm-table"')
    assert 'role="region" tabindex="0" aria-label="Runs &quot;today&quot;"' in html
    assert '<th scope="col">&lt;page&gt;</th><th scope="col">loss</th>' in html
    assert '<tr id="one"><th scope="row">a &amp; b</th><td>0.123</td><td>12,000</td><td>True</td></tr>' in html
    assert '<tr id="two"><th scope="row">c</th><td><a href="c.html?a&amp;b">–</a></td><td>−3</td><td>–</td></tr>' in html
    assert gate.output_problem(nbformat.v4.new_output("display_data", data=shown[0])) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": " "}, "accepts a sentence"),
        ({"links": {(2, "a"): "x"}}, r"no cell \(2, 'a'\) to link; accepts \(row 0 to 1"),
        ({"links": {(0, "b"): "x"}}, r"no cell \(0, 'b'\)"),
        ({"ids": ["one"]}, "1 ids for 2 rows"),
    ],
)
def test_table_refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        figures.table(pd.DataFrame({"a": [1, 2]}), **({"label": "Two rows"} | change))


def test_intervals_stand_in_rows_with_their_runs():
    _, axes = plt.subplots()
    some = {"one": Estimate(2.0, 1.0, 4.0, 3), "none": None, "two": Estimate(5.0, 5.0, 6.0, 3)}
    figures.intervals(axes, some, color=PALETTE[:3], runs=[[1, 3], [9], [5]], beside=0.25)
    assert [text.get_text() for text in axes.get_yticklabels()] == list(some) and axes.get_ylim() == (2.5, -0.5)
    runs, marks = axes.lines[:3], axes.lines[3:]
    assert [line.get_xydata().tolist() for line in runs] == [[[1, 0.25], [3, 0.25]], [[9, 1.25]], [[5, 2.25]]]
    assert [line.get_xydata().tolist() for line in marks] == [[[2, 0]], [], [[5, 2]]]
    assert [line.get_color() for line in marks] == list(PALETTE[:3])
    bars = [bar.get_segments() for bar in axes.collections]
    assert bars[0][0].tolist() == [[1, 0], [4, 0]] and bars[2][0].tolist() == [[5, 2], [6, 2]]


def test_upright_intervals_may_be_joined_and_stand_where_they_are_put():
    _, axes = plt.subplots()
    figures.intervals(axes, [Estimate(2.0, 1.0, 4.0, 3)] * 2, at=[1, 8], vertical=True, ls="-")
    assert axes.lines[0].get_xydata().tolist() == [[1, 2], [8, 2]] and axes.lines[0].get_linestyle() == "-"
    assert axes.collections[0].get_segments()[1].tolist() == [[8, 1], [8, 4]]


def panels(kind, step):
    scale = 2 if kind == "up" else -2
    line = Line([0, 1, 2], np.array([0, 1, 4]) * scale * step, "a line", dash="--", band=([0, 0, 0], [1, 2, 3]))
    cells = Heat([[0.0, float("nan")], [step, 1.0]], ["x", "y"], limits=(0, 3), numbers=True, notes=[["p", "q"], ["r", "s"]])
    return [Panel([line], "lines", ylim=(-9, 9)), Panel([cells], "cells", square=True), Panel([Bars([0, 1], [3, 4])], bare=True)]


def test_one_description_makes_the_figure_and_its_twin(shown):
    explorer = figures.explore(panels, {"Kind": ["up", "down"], "Step": [1, 2, 3]}, columns=2)
    band, line, cells, bars = explorer.figure.data
    assert list(line.y) == [0, 6, 24] and line.line.dash == "dash" and line.showlegend and not band.showlegend  # opens at 3
    assert list(band.y) == [1, 2, 3, 0, 0, 0] and list(cells.z[0]) == [0.0, None] and cells.texttemplate == "%{z}"
    assert list(bars.y) == [3, 4]
    assert explorer.figure.layout.xaxis2.type == "category" and explorer.figure.layout.yaxis2.autorange == "reversed"
    frame = explorer.frames["down", 1]  # what does not change is not repeated
    assert frame == [{}, {"y": [0, -2, -8]}, {"z": [[0.0, None], [1.0, 1.0]]}, {}]
    lines, table, *_ = explorer.still.axes
    assert lines.lines[0].get_ydata().tolist() == [0, 6, 24] and lines.get_ylim() == (-9, 9) and lines.get_title() == "lines"
    assert [text.get_text() for text in table.texts] == ["0", "3", "1"]  # an empty cell has no number
    show(explorer, **WORDS)
    assert '<select data-control="Kind">' in shown[0]["text/html"] and "nsm-still" in shown[0]["text/html"]


def test_a_still_twin_may_show_several_choices():
    explorer = figures.explore(panels, {"Kind": ["up", "down"], "Step": [1, 2, 3]}, columns=3, stills=[("up", 1), ("down", 2)])
    assert [axes.get_title() for axes in explorer.still.axes[:6]] == [
        "lines, up, Step = 1",
        "cells, up, Step = 1",
        "up, Step = 1",
        "lines, down, Step = 2",
        "cells, down, Step = 2",
        "down, Step = 2",
    ]


BAR = go.Figure(go.Bar(y=[1]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: show(curve(), **WORDS | {"alt": ""}), "does not say what is seen"),
        (lambda: show(curve(), **WORDS | {"alt": "a figure"}), "does not say what is seen"),
        (lambda: show(curve(), **WORDS | {"caption": ""}), "does not say what is seen"),
        (lambda: show(curve(), **WORDS | {"name": "Two words"}), "accepted: lower-case letters"),
        (lambda: show(BAR, **WORDS), "needs still="),
        (
            lambda: show(BAR, **WORDS, still=curve(), controls={"K": ["a", "b"]}, frames={("a",): [{}]}),
            r"match, e.g. at \('b',\)",
        ),
        (lambda: show([1], **WORDS), "got list"),
        (lambda: setup_style("poster"), "accepted: paper, notebook, talk"),
        (lambda: figures.explore(lambda n: [Panel([Line([0], [0])] * n)], {"n": [1, 2]}), r"explore: \(2,\) has other lines"),
    ],
)
def test_what_cannot_be_shown_is_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
