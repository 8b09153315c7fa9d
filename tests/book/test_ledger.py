"""The pages under `results/`, and the gate that holds a page's prose to its verdicts: values, refusals, markup."""

import json
import re
import shutil
import types

import nbformat
import pyarrow
import pyarrow.parquet
import pytest

from nsm_book import BookError, compare, drawings, gate, ledger, markup, runs, series, swept
from nsm_book.schema import Claim as Asked
from nsm_book.schema import Page
from nsm_support.results import Claim
from nsm_support.statistics import t_interval

UP = {"supported": "low > 0", "refuted": "high < 0", "min_n": 3}
DOWN = {"supported": "high < 2", "refuted": "low > 4", "min_n": 3}
PAGE = Page(name="group/first", budget={"quick": 10, "full": 20}, memory=500)


def entry(id="positive", page="group/first", rule=UP, question="Is it above zero?"):
    return {"id": id, "page": page, "question": question, "metric": "mean of the sample", "rule": rule}


def answer(id="positive", estimate=2.0, low=1.0, high=3.0, n=5, verdict="supported"):
    return {id: estimate, f"{id}_low": low, f"{id}_high": high, f"{id}_n": n, f"{id}_verdict": verdict}


def values(**given):
    return {key: {"value": value, "measured": False} for key, value in given.items()}


def notebook(*cells):
    """Markdown cells are text; code cells a dict of what they glue."""
    made = []
    for cell in cells:
        if isinstance(cell, str):
            made.append(nbformat.v4.new_markdown_cell(cell))
            continue
        outputs = [
            nbformat.v4.new_output("display_data", metadata={"scrapbook": {"name": key, "value": value}})
            for key, value in cell.items()
        ]
        made.append(nbformat.v4.new_code_cell("glue(...)", outputs=outputs))
    return nbformat.v4.new_notebook(cells=made)


@pytest.fixture
def asked(monkeypatch):
    """Let the book ask these claims."""

    def ask(*entries):
        claims = [Asked(**entry) for entry in entries]
        monkeypatch.setattr(ledger, "claims", lambda: claims)
        monkeypatch.setattr(gate, "claims_of", lambda name: claims)
        monkeypatch.setattr(ledger, "pages", lambda: {one["page"]: None for one in entries})
        monkeypatch.setattr(ledger, "page", lambda name: name)
        monkeypatch.setattr(ledger, "title", lambda name: f"The page {name}")

    return ask


# The gate.
def test_a_page_that_answers_by_its_rule_and_says_so_may_be_published(asked):
    asked(entry())
    good = notebook("# Title", answer(), "That it is above is *{glue:text}`positive_verdict`*.")
    assert gate.problems(good, PAGE) == []
    between = "```{note}\nA note.\n```\n\nIt is *{glue:text}`positive_verdict`*.\n\n````{tip}\nA tip.\n````"
    assert gate.problems(notebook("# Title", answer(), between), PAGE) == []


@pytest.mark.parametrize(
    ("glued", "sentence", "told"),
    [
        (answer(), "It is above.", "no sentence says how 'positive' came out: accepts {glue:text}`positive_verdict`"),
        (
            answer(verdict="refuted"),
            "It is {glue:text}`positive_verdict`.",
            "positive_verdict is 'refuted', and the rule in book/claims.yml says 'supported'",
        ),
        (
            answer(n=2),
            "It is {glue:text}`positive_verdict`.",
            "positive_verdict is 'supported', and the rule in book/claims.yml says 'undecided'",
        ),
        (
            {"positive_verdict": "supported"},
            "It is {glue:text}`positive_verdict`.",
            "does not answer 'positive' of book/claims.yml: no cell glues 'positive'",
        ),
        (answer(low=2.5), "It is {glue:text}`positive_verdict`.", "the interval [2.5, 3.0] does not hold the estimate 2.0"),
        (
            answer(),
            "It is {glue:text}`positive`, ``{glue:text}`positive_verdict` ``.\n% {glue:text}`positive_verdict`\n",
            "no sentence says how 'positive' came out",
        ),
        (answer(), "So it is refuted, see {glue:text}`positive_verdict`.", "refuted is typed by hand"),
        (
            answer(),
            "It is {glue:text}`positive_verdict`, that is: *supported*.",
            "group/first, cell 3 (It is {glue:text}`positive_verdict`, that is: *supported*.): *supported* is typed by hand",
        ),
    ],
)
def test_a_page_that_says_otherwise_is_not_published(asked, glued, sentence, told):
    asked(entry())
    (problem,) = gate.problems(notebook("# Title", glued, sentence), PAGE)
    assert told in problem and problem.startswith("group/first")
    assert gate.problems(notebook("# Title", glued, sentence), PAGE, prose=False) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is *supported*.", ["*supported*"]),
        ("**Refuted**: no.", ["**Refuted**"]),
        ("_undecided_ so far", ["_undecided_"]),
        ("That is *not supported at all*, we\nsay", ["*not supported at all*"]),
        ("***supported***", ["***supported***"]),
        ("It is *{glue:text}`a_verdict`* (because).", []),
        ("It is `supported` and undecided.", []),
        ("It is *{glue:text}`a_verdict`* and undecided.", ["undecided"]),
        ("Refuted is a word.\n\n*{glue:text}`a_verdict`*", []),
        ("It is {glue:text}`a/b:x_verdict` or {glue:text}`y_verdict`, so it is supported.", ["supported"]),
        ("```text\n*{glue:text}`x_verdict`*\n\nor refuted\n```", []),
        ("A ``{glue:text}`x_verdict` `` is supported or refuted.", []),
        ("```{note}\nA note.\n```\n\nIt is *supported*.\n\n```{tip}\nA tip.\n```", ["*supported*"]),
        ("````{note}\n```python\n*refuted*\n```\nIt is *undecided*.\n````\n% *refuted*", ["*undecided*"]),
        ("<em>refuted</em> or <b class='x'>not supported</b>", ["<em>refuted</em>", "<b class='x'>not supported</b>"]),
        ("A *well-put* rule supported *it*.", []),
        ("``*supported*`` is markup", []),
        ("```text\n*supported*\n```", []),
        ("a_supported_b and 2 * supported * 3", []),
        ("```{solution} x\nIt is *refuted*.\n```", ["*refuted*"]),
    ],
)
def test_only_emphasised_verdicts_in_prose_count_as_typed(text, found):
    assert gate.typed_verdicts(nbformat.v4.new_markdown_cell(text)) == found
    assert gate.typed_verdicts(nbformat.v4.new_code_cell(text)) == []


# The ledger.
def test_each_claim_leads_to_the_nearest_heading_above_its_cell():
    third = "Words.\n\n## Early\n\nWords\n\n## Late\n\n```bash\n# no heading\n```"
    book = notebook("# Title", {"other": 1}, third, {"a": 1, "b_c": 2}, "## After", {"d": 3}, "no heading here", {"e": 4})
    ledger.anchored(book, ["other", "a", "b_c", "e"])
    assert book.cells[0].source == "(claim-other)=\n# Title"
    assert "## Early\n\nWords\n\n(claim-a)=\n(claim-b-c)=\n## Late" in book.cells[2].source
    assert book.cells[4].source == "(claim-e)=\n## After" and book.cells[6].source == "no heading here"


@pytest.mark.parametrize(
    ("rule", "given", "points", "bounds"),
    [
        (UP, (2.0, 1.0, 4.0), (0.5, 0.25, 1.0), [0.0]),
        (UP, (-2.0, -4.0, 0.0), (-0.5, -1.0, 0.0), [0.0]),
        (DOWN, (1.0, 0.0, 3.0), (0.5, 1.0, -0.5), [-1.0, 0.0]),  # mirrored: what is supported lies to the right
        (UP, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), [0.0]),
    ],
)
def test_a_strip_lies_to_the_right_of_its_bound_if_supported(rule, given, points, bounds):
    found, lines = ledger.scale(rule, Claim("x", *given, 5, "undecided", ""))
    assert (found["estimate"], found["low"], found["high"]) == points and lines == bounds


def test_a_strip_tells_its_verdict_by_shape_and_in_words():
    shapes = {}
    for word in ledger.WORDS:
        drawn = ledger.strip(UP, Claim("x", 2.0, 1.0, 4.0, 5, word, "low > 0"))
        assert f'aria-label="estimate 2, interval 1 to 4, {word}: low &gt; 0"' in drawn
        shapes[word] = re.search(r'(<(?:circle|rect)(?: class="hollow")?)', drawn)[1]
    assert len(set(shapes.values())) == 3
    assert "M122.5 10H190.0" in drawn and 'cx="145.0"' in drawn


def test_a_question_that_a_run_does_not_answer_shows_no_numbers(asked):
    asked(entry())
    records = {"group/first": {"values": values(**answer(n=0, verdict="undecided"))}}
    page = ledger.ledger_page(records, ["group/first"])
    why = "this run did not measure at the size asked about"
    assert f"<strong>undecided</strong>, because {why}. Estimate –, 95 % interval –, n = 0.</dd>" in page
    (drawn,) = re.findall(r"<svg.*?</svg>", page)
    assert f'aria-label="undecided: {why}"' in drawn
    assert 'class="bound"' in drawn and 'class="interval"' not in drawn and "<circle" not in drawn


def test_the_ledger_counts_groups_in_the_readers_order_and_links(asked):
    asked(entry(), entry("below", rule=DOWN, question="Is <b>it</b> below two?"), entry("late", page="group/second"))
    records = {
        "group/first": {"values": values(**answer(), **answer("below", 3.0, 1.5, 4.5, verdict="undecided"))},
        "group/second": {"values": values(**answer("late", -2.0, -3.0, -1.0, verdict="refuted"))},
    }
    page = ledger.ledger_page(records, ["intro", "group/second", "group/first"])
    assert "Questions: 3; **1 supported**, **1 refuted**, **1 undecided**." in page
    assert page.index("## The page group/second") < page.index("## The page group/first")
    assert page.index('class="nsm-ledger"') < page.index("## ")  # the picture comes first
    answers = re.findall(r"<dt id=.*?(?=<dt|</dl)", page)
    assert len(answers) == 3 and answers[0].startswith(
        '<dt id="late"><a href="../group/second.html#claim-late">Is it above zero?</a></dt><dd><strong>refuted</strong>'
    )
    assert re.findall(r"<dd>(.*?)</dd>", answers[2]) == [
        "<strong>undecided</strong>, because neither is it so that the whole interval is below 2, nor that the whole interval is "
        "above 4. Estimate 3, 95 % interval 1.5 to 4.5, n = 5.",
        "Rule: supported if the whole interval is below 2, refuted if the whole interval is above 4; n at least 3.",
        "Measured: mean of the sample.",
    ]
    assert "<b>it" not in page and 'id="below"' in answers[2] and '<a href="#below">' in page


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "positive: group/first did not answer it"),
        ({"group/first": {"values": values(positive_verdict="supported")}}, "positive: group/first did not answer it"),
        ({"group/first": {"values": values(**answer(verdict="refuted"))}}, "says 'refuted', and the rule says 'supported'"),
    ],
)
def test_a_claim_without_its_answer_is_an_error(asked, given, told):
    asked(entry())
    with pytest.raises(BookError, match=re.escape(told)):
        ledger.ledger_page(given, ["group/first"])


# Markup.
def test_tables_escape_what_they_hold_and_scroll_by_themselves():
    text = markup.table(["a<b"], [[markup.Cell("<script>", 'x"y', "i")], ["plain"]], 'la"bel')
    assert '<th scope="row" id="i"><a href="x&quot;y">&lt;script&gt;</a></th>' in text and "a&lt;b" in text
    assert 'tabindex="0"' in text and 'aria-label="la&quot;bel"' in text and "<script" not in text
    block = markup.raw("a\n````\nb")
    assert markup.raw("x").startswith("```{raw}") and block.startswith("`````{raw}")
    assert block.splitlines()[0] == block.splitlines()[-1] + "{raw} html"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (-0.0, "0"),
        (1234.5, "1,234"),
        (0.012345, "0.0123"),
        (-2.5, "−2.5"),
        (3, "3"),
        (True, "True"),
        ("a", "a"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_are_short(value, text):
    assert markup.number(value) == text


# Sweeps.
def row(id="r1", seed=0, count=3, scale=1.0, status="done", today=True, whole=True, **glued):
    facts = (
        dict.fromkeys(swept.FACTS)
        if status == "failed"
        else {"seconds": 2.0, "peak_memory_mb": 100.0, "device": "cpu", "commit": "abc", "date": "2026-01-01"}
    )
    return swept.Row(
        id=id,
        page="group/first",
        profile="quick",
        status=status,
        facts=facts,
        whole=whole,
        today=today,
        parameters={"count": count, "scale": scale, "kind": "up", "seed": seed},
        values=glued,
        versions={},
    )


def grid(**more):
    return [
        row(f"{count}-{scale}-{seed}".replace(".", ""), seed, count, scale, mean=count * scale + seed, fixed=1, **more)
        for count in (10, 3)
        for scale in (2.0, 1.0)
        for seed in (0, 1, 2)
    ]


def test_what_varies_but_seeds_is_compared_in_the_order_of_its_values():
    rows = grid()
    assert series.varied(rows) == ["count", "scale"] and series.in_order(rows, "count") == ["3", "10"]
    assert series.varied([row(seed=0), row(seed=1)]) == ["seed"] and series.varied([row()]) == ["count"]
    assert [choice.label() for choice in series.choices(rows)] == ["count, a line for each scale", "scale, a line for each count"]
    assert series.measures(rows) == ["mean", "seconds"]  # what never differs is no measure; seconds always are


def test_answers_are_measured_first_and_then_what_has_an_interval():
    glued = {
        "plain": 1.0,
        "spread": 2.0,
        "spread_low": 1.0,
        "spread_high": 3.0,
        "spread_n": 3,
        "claim": 4.0,
        "claim_low": 3.0,
        "claim_high": 5.0,
        "claim_n": 3,
        "claim_verdict": "undecided",
    }
    rows = [row("a", **glued), row("b", **{key: value if isinstance(value, str) else value + 1 for key, value in glued.items()})]
    assert series.measures(rows) == ["claim", "spread", "plain", "seconds"]


def test_a_table_tells_runs_apart_by_what_differs_and_the_seed(monkeypatch):
    assert series.told_apart(grid()) == ["count", "scale", "seed"] and series.told_apart([row(seed=0), row(seed=1)]) == ["seed"]
    monkeypatch.setattr(runs, "page", lambda name: PAGE)
    rows = [row("a", count=3, seed=1), row("b", count=5, seed=1, today=False), row("c", count=7, status="failed", whole=False)]
    table = "".join(runs.sweep_part(sweep_of(rows), []))
    assert [re.findall(r"<td>(.*?)</td>", line)[:5] for line in table.split("<tr>")[2:]] == [
        ["done", "count = 3, seed = 1", "quick", "2.0", "20%"],
        ["done, by an earlier version of the page", "count = 5, seed = 1", "quick", "2.0", "20%"],
        ["failed", "count = 7, seed = 0", "quick", "–", "–"],
    ]
    assert "2 of 3 runs of [](../group/first.md) are done, in 4 s" in table


def test_the_page_of_runs_puts_versions_that_differ_beside_each_run(monkeypatch):
    monkeypatch.setattr(runs, "page", lambda name: PAGE)
    monkeypatch.setattr(runs, "read_all", lambda: [])
    monkeypatch.setattr(runs, "came_again", lambda profile: {"group/first": "same, 4 cells"})
    facts = {"seconds": 5.0, "peak_memory_mb": 99.0, "device": "cpu", "commit": "abc", "date": "d", "python": "3.11"}
    records = {
        "group/second": {**facts, "versions": {"torch": "2", "numpy": "1"}},
        "group/first": {**facts, "versions": {"torch": "1", "numpy": "1"}},
    }
    page = runs.runs_page("quick", records, ["intro", "group/first", "group/second"])
    lines = page.split("<tr>")[2:]
    assert "group/first" in lines[0] and "<td>same, 4 cells</td><td>quick</td><td>5.0</td><td>50%</td>" in lines[0]
    assert "<td>torch 1</td>" in lines[0] and "<td>torch 2</td>" in lines[1] and "<td>not re-run</td>" in lines[1]
    assert "took 10 s in sum" in page and "All runs had numpy 1, python 3.11." in page and "No sweep has run here yet" in page
    same = runs.runs_page("quick", {"group/first": records["group/first"]}, ["group/first"])
    assert "versions that differ" not in same and "torch 1" in same


def test_a_third_parameter_is_held_and_the_fullest_setting_comes_first():
    rows = [row("a", mean=1), *[row(f"b{s}", count=5, scale=s, mean=s) for s in (1.0, 2.0)]]
    rows = [
        swept.Row(**{**{f: getattr(one, f) for f in one.__slots__}, "parameters": {**one.parameters, "kind": kind}})
        for one, kind in zip(rows, ("up", "down", "down"), strict=True)
    ]
    first = series.choices(rows)[0]
    assert (first.along, first.line, first.held) == ("count", "scale", (("kind", "down"),))
    assert first.label() == "count, a line for each scale; kind = down"
    assert set(series.points(rows, first, "mean")) == {("1.0", "5"), ("2.0", "5")}


def test_a_point_is_the_mean_over_seeds_with_students_interval():
    found = series.points(grid(), series.choices(grid())[0], "mean")
    point = found["2.0", "10"]
    assert (point.mean, point.low, point.high) == t_interval([20.0, 21.0, 22.0])[:3] and len(point.rows) == 3
    assert set(found) == {("1.0", "3"), ("1.0", "10"), ("2.0", "3"), ("2.0", "10")}


def test_a_single_run_has_the_interval_that_its_page_reports_or_none():
    own = series.point([row(mean=2.0, mean_low=1.0, mean_high=4.0)], "mean")
    assert (own.mean, own.low, own.high) == (2.0, 1.0, 4.0)
    assert series.point([row(mean=2.0)], "mean")[:3] == (2.0, None, None)
    assert series.point([row(mean=2.0, mean_low=3.0, mean_high=4.0)], "mean")[:3] == (2.0, None, None)
    assert series.point([row(mean=None)], "mean") is None and series.point([row(mean="no")], "mean") is None
    assert [series.told(one) for one in (own, series.point([row(mean=2.0)], "mean"), None)] == ["2, 1 to 4", "2", "–"]


def sweep_of(rows, **more):
    return swept.Swept(name="grow", page=PAGE, rows=rows, **more)


def data_of(figure):
    return json.loads(re.search(r'class="nsm-data">(.*?)</script>', figure)[1])


def test_frames_hold_every_choice_and_lead_to_the_notebooks():
    rows = [one for one in grid() if one.parameters["seed"] == 0]
    lines, heat = drawings.drawings(sweep_of(rows), rows, series.choices(rows), series.measures(rows), "sweep-1")
    data = data_of(lines)
    assert set(data["frames"]) == {"0,0", "0,1", "1,0", "1,1"} and len(data["figure"]["data"]) == 2
    first, second, layout = data["frames"]["0,0"]
    assert (first["x"], first["y"], first["name"]) == ([-0.03, 0.97], [3.0, 10.0], "scale = 1.0") and second["y"] == [6.0, 20.0]
    assert second["x"] == [0.03, 1.03] and first["hovertext"] == layout["xaxis"]["ticktext"] == ["3", "10"]
    assert first["customdata"] == ["../sweeps/grow/3-10-0.ipynb", "../sweeps/grow/10-10-0.ipynb"]
    assert layout["xaxis"]["title"]["text"] == "count" and layout["yaxis"]["title"]["text"] == "mean"
    assert data["frames"]["0,1"][2]["xaxis"]["title"]["text"] == "scale" and data["frames"]["1,0"][0]["y"] == [2.0, 2.0]
    assert data["figure"]["data"][0]["y"] == [3.0, 10.0] and data["figure"]["layout"]["xaxis"]["title"]["text"] == "count"
    cells = data_of(heat)["frames"]["0,0"][0]
    assert cells["z"] == [[3.0, 10.0], [6.0, 20.0]] and cells["y"] == ["1.0", "2.0"]
    assert cells["customdata"][1][0] == "../sweeps/grow/3-20-0.ipynb"
    for figure in (lines, heat):
        assert figure.count("<select") == 2 and "nsm-still" in figure and "<svg" in figure and "<figcaption>" in figure


def test_a_mean_over_seeds_leads_to_the_table_and_has_its_bar():
    lines, _ = drawings.drawings(sweep_of(grid()), grid(), series.choices(grid()), ["mean"], "sweep-1")
    trace = data_of(lines)["frames"]["0"][0]
    assert trace["customdata"] == ["#grow-3-10-0", "#grow-10-10-0"]
    up = t_interval([3.0, 4.0, 5.0])
    assert trace["error_y"]["array"][0] == pytest.approx(up.high - 4.0) and "n = 3" in trace["text"][0]
    own = [row("a", count=3, mean=2.0, mean_low=1.0, mean_high=4.0), row("b", count=5, mean=2.0)]
    (lines,) = drawings.drawings(sweep_of(own), own, series.choices(own), ["mean"], "sweep-1")
    bars = data_of(lines)["figure"]["data"][0]["error_y"]
    assert bars["array"] == [2.0, 0.0] and bars["arrayminus"] == [1.0, 0.0]


def test_one_parameter_and_one_measure_need_neither_heatmap_nor_controls():
    rows = [row("a", count=3), row("b", count=5)]
    (only,) = drawings.drawings(sweep_of(rows), rows, series.choices(rows), ["seconds"], "sweep-1")
    assert "<select" not in only and data_of(only)["frames"] == {} and data_of(only)["figure"]["data"][0]["y"] == [2.0, 2.0]


def test_text_of_a_run_is_never_markup(monkeypatch):
    monkeypatch.setattr(runs, "page", lambda name: PAGE)
    rows = [
        swept.Row(**{**{f: getattr(one, f) for f in one.__slots__}, "parameters": {"kind": kind, "seed": 0}})
        for one, kind in ((row("a", mean=1), "<img src=x onerror=alert(1)>"), (row("b", mean=2), "$x$ </script>"))
    ]
    for figure in [
        *drawings.drawings(sweep_of(rows), rows, series.choices(rows), series.measures(rows), "sweep-1"),
        compare.run_table(sweep_of(rows), series.measures(rows)),
        *runs.sweep_part(sweep_of(rows), []),
    ]:
        assert "<img" not in figure and figure.count("</script>") <= 1
    layout = data_of(drawings.drawings(sweep_of(rows), rows, series.choices(rows), ["mean"], "s")[0])["figure"]["layout"]
    assert layout["xaxis"]["ticktext"] == ["&lt;img src=x onerror=alert(1)&gt;", "$x$ &lt;/script&gt;"]


def test_the_page_tells_failed_old_and_too_many_runs(monkeypatch):
    monkeypatch.setattr(compare, "sweeps", lambda: {"grow": None, "later": None})
    rows = [row("a", count=3, mean=1, today=False), row("b", count=5, mean=2), row("c", count=7, status="failed", whole=False)]
    monkeypatch.setattr(compare, "read_all", lambda: [sweep_of(rows)])
    page = compare.compare_page()
    assert "2 runs of [](../group/first.md), in the quick profile; 1 failed." in page
    assert "**1 of these runs are of an earlier version of the page**" in page
    assert "nsm-book sweep later" in page and page.count('<tr><th scope="row"') == 3 and "failed</td>" in page
    assert '<a href="../sweeps/grow/a.ipynb">a</a>' in page and "grow/c.ipynb" not in page and 'id="grow-c"' in page
    monkeypatch.setattr(compare, "read_all", lambda: [sweep_of(grid())])
    monkeypatch.setattr(compare, "MOST_FRAMES", 2)
    assert "1 settings with the fewest runs are not drawn" in compare.compare_page()
    monkeypatch.setattr(compare, "read_all", lambda: [sweep_of(grid(), question="Is a < b?", measure="seconds")])
    page = compare.compare_page()
    assert ">Is a &lt; b?<" in page and data_of(page)["figure"]["layout"]["yaxis"]["title"]["text"] == "seconds"
    monkeypatch.setattr(compare, "read_all", lambda: [sweep_of(grid(), measure="maen")])
    assert data_of(compare.compare_page())["figure"]["layout"]["yaxis"]["title"]["text"] == "mean"  # as of an older page
    monkeypatch.setattr(compare, "read_all", lambda: [sweep_of([rows[2]])])
    assert "0 runs of" in compare.compare_page() and "<figure" not in compare.compare_page()


def test_a_sweep_too_large_to_show_is_counted_and_its_files_are_left_alone(tmp_path, monkeypatch):
    left(tmp_path, monkeypatch)
    monkeypatch.setattr(swept, "MOST_RUNS", 1)
    monkeypatch.setattr(compare, "sweeps", lambda: {"grow": None})
    (found,) = swept.read_all()
    assert found.large and not found.rows[0].whole and found.rows[0].values == {"mean": 2.0}
    page = compare.compare_page()
    assert "1 runs of" in page and "earlier version" not in page and "<table" not in page and "<tr>" not in page
    data = data_of(page)["figure"]["data"][0]
    assert data["y"] == [2.0] and data["customdata"] == [None] and "Click a point" not in page
    monkeypatch.setattr(compare, "MOST_PLACES", 0)
    assert "More than 0 settings are not drawn" in compare.compare_page() and "<figure" not in compare.compare_page()
    told = "\n".join(runs.sweep_part(found, []))
    assert "1 of 2 runs of" in told and "in 2 s of" in told and "<table" not in told


def test_a_drawing_keeps_to_the_names_and_points_that_it_has_room_for(monkeypatch):
    assert [*drawings.ticks(["x"] * 24)] == [*range(24)] and [*drawings.ticks(["x"] * 25)] == [*range(0, 25, 2)]
    assert len(drawings.ticks(["x"] * 5000)) <= 24 and len(drawings.line_axis("a", ["x"] * 99)["ticktext"]) == 20
    rows = [one for one in grid() if one.parameters["seed"] == 0]  # four settings, two measures, two choices
    assert tuple(map(len, compare.summary(rows, None)[:2])) == (2, 2)
    for points, drawn in ((16, (2, 2)), (8, (1, 2)), (4, (1, 1)), (1, (1, 1))):
        monkeypatch.setattr(compare, "MOST_POINTS", points)
        assert tuple(map(len, compare.summary(rows, None)[:2])) == drawn
    monkeypatch.setattr(compare, "read_all", lambda: [sweep_of(rows)])
    monkeypatch.setattr(compare, "sweeps", lambda: {})
    assert "1 of 2 measures are drawn" in compare.compare_page()


def test_without_a_sweep_the_page_says_how_to_run_one(monkeypatch):
    monkeypatch.setattr(compare, "read_all", lambda: [])
    monkeypatch.setattr(compare, "sweeps", lambda: {"states": None})
    assert "```bash\nnsm-book sweep states\n```" in compare.compare_page()
    monkeypatch.setattr(compare, "sweeps", lambda: {})
    assert "There is no sweep in `book/sweeps` yet." in compare.compare_page()


# Runs.
def test_facts_of_a_run_with_its_share_of_the_budget(monkeypatch):
    monkeypatch.setattr(runs, "page", lambda name: PAGE)
    run = {"seconds": 5.0, "peak_memory_mb": 1234.6, "device": "cpu", "commit": "abc", "date": "d"}
    assert runs.facts("group/first", "full", run) == ["full", "5.0", "25%", "1,235", "cpu", "abc", "d"]
    assert runs.facts("group/first", "quick", dict.fromkeys(swept.FACTS)) == ["quick", "–", "–", "–", "–", "–", "–"]


def test_only_versions_that_differ_are_told_run_by_run():
    every = [{"torch": "1", "numpy": "2"}, {"torch": "1", "numpy": "3"}, {}]
    assert runs.differing(every) == ["numpy"] and runs.differing(every[:1]) == []
    assert runs.versions_told(every[1], ["numpy"]) == "numpy 3" and runs.versions_told({}, ["numpy"]) == "–"


def test_a_page_is_told_as_run_again_only_for_the_run_that_was(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "BUILD", tmp_path)
    assert runs.came_again("quick") == {}
    pages = {name: tmp_path / "runs/quick/group" / f"{name}.ipynb" for name in ("same", "other", "newer")}
    pages["same"].parent.mkdir(parents=True)
    found = {}
    for name, path in pages.items():
        path.write_text(name)
        found[f"group/{name}"] = {"digest": swept.digest(path), "same": name != "other", "cells": 4}
    pages["newer"].write_text("has run since")
    runs.rerun_record("quick").parent.mkdir()
    runs.rerun_record("quick").write_text(json.dumps(found))
    assert runs.came_again("quick") == {"group/same": "same, 4 cells", "group/other": "OTHER NUMBERS"}
    runs.rerun_record("quick").write_text(json.dumps(found)[:20])
    assert runs.came_again("quick") == {}


# What a sweep has left.
def left(tmp_path, monkeypatch, runs="ab", **changes):
    """A table of two runs, one of which failed, in a store of its own; `changes` go into its record.

    `runs` stand in the sweep today.
    """
    monkeypatch.setattr("nsm_book.schema.BUILD", tmp_path)
    monkeypatch.setattr(swept, "sweeps", lambda: {"grow": None, "later": None})
    monkeypatch.setattr(swept, "fingerprint", lambda page, profile, given: {"source": "abc", "parameters": given})
    monkeypatch.setattr(
        swept,
        "read_sweep",
        lambda name: types.SimpleNamespace(
            question=f"Does {name}?", measure="mean", page=PAGE, profile="quick", runs=dict.fromkeys(runs)
        ),
    )
    place = tmp_path / "sweeps" / "grow" / "a"
    place.mkdir(parents=True)
    (place / "run.ipynb").write_text("the notebook")
    record = {
        "fingerprint": {"source": "abc", "parameters": {"count": 3}, "files": {}},
        "digest": swept.digest(place / "run.ipynb"),
        "seconds": 2.0,
        "date": "d",
        "python": "3.11",
        "versions": {"torch": "2"},
        **changes,
    }
    (place / "results.json").write_text(json.dumps([record]))
    facts = {
        "seconds": [2.0, None],
        "peak_memory_mb": [9.0, None],
        "device": ["cpu", None],
        "commit": ["abc", None],
        "date": ["d", None],
    }
    table = {
        "run": ["a", "b"],
        "page": ["group/first"] * 2,
        "profile": ["quick"] * 2,
        "status": ["done", "failed"],
        **facts,
        "parameters.count": [3, 5],
        "values.mean": [2.0, None],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "sweeps" / "grow.parquet")
    return place


def test_a_sweep_is_read_back_with_its_notebooks(tmp_path, monkeypatch):
    left(tmp_path, monkeypatch)
    (found,) = swept.read_all()
    done, failed = found.rows
    assert found.question == "Does grow?" and found.measure == "mean"
    assert done.whole and done.today and done.values == {"mean": 2.0} and done.parameters == {"count": 3}
    assert done.versions == {"python": "3.11", "torch": "2"} and done.facts["seconds"] == 2.0
    assert not failed.whole and not failed.today and found.notebook(failed) is None
    swept.copy_notebooks(tmp_path / "site")
    copied = [path for path in (tmp_path / "site").rglob("*") if path.is_file()]
    assert copied == [tmp_path / "site/sweeps/grow/a.ipynb"] and copied[0].read_text() == "the notebook"


def test_a_failed_run_leads_nowhere_though_an_earlier_one_lies_there(tmp_path, monkeypatch):
    place = left(tmp_path, monkeypatch)
    shutil.copytree(place, place.with_name("b"))
    done, failed = swept.read_all()[0].rows
    assert done.whole and not failed.whole and not failed.today


def test_a_run_of_an_earlier_page_is_told_and_a_damaged_notebook_not_linked(tmp_path, monkeypatch):
    place = left(tmp_path, monkeypatch, fingerprint={"source": "old", "parameters": {}, "files": {}})
    assert not swept.read_all()[0].rows[0].today and swept.read_all()[0].rows[0].whole
    (place / "run.ipynb").write_text("half")
    assert not swept.read_all()[0].rows[0].whole
    (place / "results.json").unlink()
    assert not swept.read_all()[0].rows[0].whole and swept.read_all()[0].rows[0].versions == {}


def test_a_table_is_not_told_beside_the_notebooks_of_a_sweep_that_was_begun_again(tmp_path, monkeypatch):
    place = left(tmp_path, monkeypatch, seconds=3.0)
    (done, _) = swept.read_all()[0].rows
    assert not done.today and not done.whole and done.values == {"mean": 2.0}
    assert (place / "run.ipynb").exists()


def test_only_runs_that_stand_in_the_sweep_today_are_shown(tmp_path, monkeypatch):
    left(tmp_path, monkeypatch, runs="acd")
    (found,) = swept.read_all()
    assert [row.id for row in found.rows] == ["a"] and found.missing == 2
    left(tmp_path / "other", monkeypatch, runs="cd")
    assert swept.read_all() == []


def test_a_table_that_is_not_whole_is_refused_by_name(tmp_path, monkeypatch):
    left(tmp_path, monkeypatch)
    path = tmp_path / "sweeps" / "grow.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BookError, match=r"grow\.parquet: is no whole Parquet file"):
        swept.read_all()
    pyarrow.parquet.write_table(pyarrow.table({"run": ["a"], "loss": [1.0]}), path)
    with pytest.raises(BookError, match="is no table of a sweep: has no page, profile, status, seconds"):
        swept.read_all()
