"""`show`: words, twins, controls, themes; and the same bytes for the same figure."""

import json
import re

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import plotly.graph_objects as go
import pytest

from nsm_book import gate
from nsm_support import figures
from nsm_support.figures import COLORS, PALETTE, setup_style, show, svg

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


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"alt": ""}, "does not say what is seen"),
        ({"alt": "a figure"}, "does not say what is seen"),
        ({"caption": ""}, "does not say what is seen"),
        ({"name": "Two words"}, "accepted: lower-case letters"),
    ],
)
def test_a_figure_without_words_is_refused(change, told):
    with pytest.raises(ValueError, match=told):
        show(curve(), **(WORDS | change))


def test_a_plotly_figure_without_its_twin_or_a_frame_is_refused():
    with pytest.raises(ValueError, match="needs still="):
        show(go.Figure(go.Bar(y=[1])), **WORDS)
    with pytest.raises(ValueError, match=r"do not match, e.g. at \('b',\)"):
        show(go.Figure(go.Bar(y=[1])), **WORDS, still=curve(), controls={"Kind": ["a", "b"]}, frames={("a",): [{}]})
    with pytest.raises(TypeError, match="got list"):
        show([1], **WORDS)


def test_style_refuses_an_unknown_context():
    with pytest.raises(ValueError, match="accepted: paper, notebook, talk"):
        setup_style("poster")


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
