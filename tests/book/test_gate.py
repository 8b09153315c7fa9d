"""The gate that holds a page's prose to its verdicts, and the anchors that claims are linked to."""

import nbformat
import pytest

from nsm_book import gate, markup
from nsm_book.schema import Claim, Page

UP = {"supported": "low > 0", "refuted": "high < 0", "min_n": 3}
PAGE = Page(name="group/first", budget={"quick": 10, "full": 20}, memory=500)


def answer(id="positive", estimate=2.0, low=1.0, high=3.0, n=5, verdict="supported"):
    return {id: estimate, f"{id}_low": low, f"{id}_high": high, f"{id}_n": n, f"{id}_verdict": verdict}


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


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Let the book ask one question of the page."""
    entry = {"id": "positive", "page": PAGE.name, "question": "Is it above zero?", "metric": "mean of the sample", "rule": UP}
    monkeypatch.setattr(gate, "claims_of", lambda name: [Claim(**entry)])


def test_a_page_that_answers_by_its_rule_and_says_so_may_be_published():
    good = notebook("# Title", answer(), "That it is above is *{glue:text}`positive_verdict`*.")
    assert gate.problems(good, PAGE) == []
    between = "```{note}\nA note.\n```\n\nIt is *{glue:text}`positive_verdict`*.\n\n````{tip}\nA tip.\n````"
    assert gate.problems(notebook("# Title", answer(), between), PAGE) == []


@pytest.mark.parametrize(
    ("glued", "sentence", "message"),
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
def test_a_page_that_says_otherwise_is_not_published(glued, sentence, message):
    (problem,) = gate.problems(notebook("# Title", glued, sentence), PAGE)
    assert message in problem and problem.startswith("group/first")
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


def test_each_claim_leads_to_the_nearest_heading_above_its_cell():
    third = "Words.\n\n## Early\n\nWords\n\n## Late\n\n```bash\n# no heading\n```"
    book = notebook("# Title", {"other": 1}, third, {"a": 1, "b_c": 2}, "## After", {"d": 3}, "no heading here", {"e": 4})
    markup.anchored(book, ["other", "a", "b_c", "e"])
    assert book.cells[0].source == "(claim-other)=\n# Title"
    assert "## Early\n\nWords\n\n(claim-a)=\n(claim-b-c)=\n## Late" in book.cells[2].source
    assert book.cells[4].source == "(claim-e)=\n## After" and book.cells[6].source == "no heading here"
