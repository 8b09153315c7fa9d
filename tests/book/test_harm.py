"""Input that means harm: it runs no code, writes nowhere else, reaches no reader as markup; it is run or refused in one line."""

import ast
import csv
import io
import itertools
import json
import os
import pickle
import re
import shlex
import shutil

import nbformat
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsm_book import BookError, execute, gate, pages, table
from nsm_book.fingerprint import record, sealed
from nsm_support.blockffn.checkpoint import load_checkpoint
from nsm_support.results import GLUE_MIME, read_product
from nsm_support.studies.corpus import load_trained
from nsm_support.training import CheckpointError, load_model
from tests.conftest import Checkout
from tests.site.browser import browser, served
from tests.support.test_blockffn_checkpoint import COMMON, KINDS

# One string for all readers: HTML, Markdown, MyST, formulas, the shell, Python, paths, and the book's own rewriting.
EVIL = (
    "</code></td></table></details><script>hit(1)</script><img src=x onerror=hit(2)>\n\n# Title\n\n`a` | b ``` $x^2$ "
    "\\(y\\) [go](javascript:hit(3)) ![i](x.png) [](first.md) {glue:text}`lost` {{ mean }} {count} *supported* _refuted_ "
    "<!-- ${7*7} $(touch hit) `touch hit`; touch hit; \" + __import__('os').system('touch hit') + \" ' \\ ../../hit "
    "\u202e\x1b[31m\u2028\tü https://hit.example &lt;"
)
PIECES = [
    EVIL,
    "<b>x</b>",
    "$x$",
    "\\$x$",
    "../../hit",
    "/etc/passwd",
    "a|b",
    "`",
    "'",
    '"',
    '"""',
    "\n",
    "\r\n",
    "\0",
    "\ud800",
    "((",
    "nan",
    "inf",
    "-1e999",
    "1e308",
    "None",
    "True",
    "true",
    "[",
    "]",
    "{",
    "}",
    "{[]: 1}",
    "[1, 2]",
    "['a']",
    "'None'",
    "5",
    "1_0",
    "0x" + "f" * 5000,
    "9" * 5000,
    "\\N{BULLET}",
    "__import__('os').system('touch hit')",
    "*supported*",
    "--profile",
    "{glue:text}`mean`",
    "=cmd|'/C calc'!A0",
    "%s",
    "{0.__class__}",
    "!!python/object/apply:os.system [touch hit]",
    "&a [*a]",
    "<<: {count: 1}",
    "!!bool maybe",
    "!!int ''",
    "!!timestamp x",
    "1:1:1",
    "2020-13-01",
    ",",
    "#",
    "? [a]",
    "---",
    "- ",
    ": ",
    "- &",
    "\ufeff",
    "é" * 90,
    "𝒳" * 72,
    "page",
    "count",
    "group/first",
]
TEXT = st.one_of(
    st.sampled_from(PIECES),
    st.text(max_size=30),
    st.lists(st.sampled_from(PIECES), max_size=4).map("".join),
    st.characters(codec=None).map(str),
)
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 9),
    st.sampled_from([2**63, -(2**63), 10**400]),
    st.floats(),
    st.binary(max_size=3),
    st.dates(),
    TEXT,
)
ANY = st.recursive(
    PLAIN, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=2)), max_leaves=6
)
VALUE = st.one_of(ANY, ANY.map(pages.brief), st.lists(st.integers(-3, 9), max_size=3).map(str))
WHOLE = st.integers(-(2**63), 2**63 - 1)


def fuzz(examples: int, check, *strategies) -> None:
    """Give a check so many examples, the same ones every time."""
    how = settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    how(given(*strategies)(check))()


def refused(error: BookError) -> str:
    """What a person is told: one line that a terminal shows as it stands, and no more than a person reads."""
    message = str(error)
    assert message.isprintable() and 10 < len(message) < 900, message
    return message


def test_any_value_of_any_parameter_is_accepted_as_it_is_or_refused():
    """3,000 values, one after the other given to a parameter of each type that the book's pages have."""
    from papermill.translators import PythonTranslator

    by_type = {p.type: (page, p) for page in pages.pages().values() for p in pages.parameters(page).values()}
    assert len(by_type) >= 8
    accepted, told = [], []

    def check(kind, value):
        page, parameter = by_type[kind]
        try:
            (found,) = pages.check(page, {parameter.name: value}).values()
        except BookError as error:
            told.append(refused(error))
            assert page.name in told[-1] and parameter.name in told[-1]
            assert not (kind in ("str", "str | None") and isinstance(value, str) and value.isprintable()), value
            return
        accepted.append(found)
        assert pages.check(page, {parameter.name: found}) == {parameter.name: found}
        assert json.loads(json.dumps(found).encode()) == found
        code = PythonTranslator.translate(found)  # what papermill writes into the kernel's cell: a literal, and no more
        assert "\n" not in code and ast.literal_eval(code) == found
        again = shlex.split(execute.reproduce_line(page, "full", {parameter.name: found}))
        assert pages.check(page, {again[6]: again[7]}) == {parameter.name: found} and "\0" not in again[7]
        name = execute.slug({parameter.name: found})
        assert "/" not in name and "\0" not in name and name.strip(".") and len(f"quick,{name}".encode()) < 256

    for kind, value in itertools.product(sorted(by_type), PIECES):
        check(kind, value)
    fuzz(3000, check, st.sampled_from(sorted(by_type)), VALUE)
    assert len(accepted) > 600 and len(told) > 1200


GOOD = {
    "count": WHOLE,
    "scale": st.floats(allow_nan=False, allow_infinity=False),
    "kind": st.sampled_from(["up", "down"]),
    "names": st.lists(st.one_of(st.just(EVIL), st.text(max_size=9)), max_size=3),
}
NAMES = st.one_of(st.sampled_from([*GOOD, "seed"]), TEXT)


def some(values):
    return st.lists(values, min_size=1, max_size=3, unique_by=repr)


GOOD_YAML = st.fixed_dictionaries(
    {"page": st.just("group/first")},
    optional={
        "profile": st.sampled_from(["quick", "full"]),
        "seeds": some(WHOLE),
        "rows": some(st.fixed_dictionaries({name: GOOD[name] for name in ("count", "names")})),
        "grid": st.fixed_dictionaries({}, optional={name: some(GOOD[name]) for name in ("scale", "kind")}),
    },
)
WILD_YAML = st.dictionaries(
    st.sampled_from([*table.KEYS, *table.KEYS, ""]),
    st.one_of(
        VALUE,
        st.just("group/first"),
        st.lists(st.dictionaries(NAMES, VALUE, max_size=3), max_size=3),
        st.dictionaries(NAMES, st.lists(VALUE, max_size=3), max_size=3),
    ),
    max_size=4,
)
GOOD_CSV = some(st.tuples(st.just("group/first"), WHOLE.map(str), GOOD["names"].map(str), GOOD["kind"]))
WILD_CSV = st.lists(st.lists(st.one_of(TEXT, st.sampled_from(["group/first", "3", "[]", "up"])), max_size=4), max_size=4)


@st.composite
def mutated(draw, texts):
    """A text as it is, or with a piece of harm put in somewhere in place of a few characters."""
    text = draw(texts)
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at, length = draw(st.integers(0, len(text))), draw(st.integers(0, 4))
        text = text[:at] + draw(TEXT) + text[at + length :]
    return text


def as_csv(rows) -> str:
    out = io.StringIO()
    csv.writer(out).writerows([["page", "count", "names", "kind"], *rows])
    return out.getvalue()


def test_any_table_of_runs_is_accepted_or_refused_in_one_line(small):
    """2,000 tables: whole ones, wrong ones, and ones with harm put in at any place."""
    accepted, told = [], []

    def check(name, text):
        try:
            found = small(name, text.encode("utf-8", "surrogatepass"))
        except BookError as error:
            told.append(refused(error))
            assert told[-1].startswith(f"book/sweeps/{name}: ")
            return
        accepted.append(found)
        for run in found.runs.values():
            assert pages.check(found.page, run.parameters) == run.parameters
            assert re.fullmatch("[0-9a-f]{12}", run.id) and run.label.isprintable()

    for piece in PIECES:
        check("y.yml", f"page: group/first\nrows: {piece}\n")
        check("y.yml", f"page: group/first\ngrid: {{count: [1, {piece}]}}\n")
    fuzz(1000, check, st.just("x.csv"), mutated(st.one_of(GOOD_CSV, WILD_CSV).map(as_csv)))
    fuzz(1000, check, st.just("y.yml"), mutated(st.one_of(GOOD_YAML, WILD_YAML).map(yaml.dump)))
    assert len(accepted) > 300 and len(told) > 800


@pytest.fixture(scope="module")
def harmed(tmp_path_factory):
    """A small book whose page has a parameter for any text: 20 accepted values of it run in one sweep, and EVIL on the page."""
    book = Checkout(tmp_path_factory.mktemp("harmed") / "book")
    book.edit("book/group/first.md", "seed: int = 0", "words: str = 'plain'  # any text\nseed: int = 0")
    book.edit("book/group/first.md", "\nmean = ", "\nglue('said', words)\nmean = ")
    book.edit("book/group/first.md", "positive_verdict`.", "positive_verdict`, it is called {glue:text}`said`.")
    quick = {"group/first": {"count": 5, "words": EVIL, "names": [EVIL]}}
    (book.folder / "book/params/quick.yml").write_text(yaml.safe_dump(quick))
    book.edit("book/intro.md", "{glue:text}`group/first:mean:.2f`", "{glue:text}`group/first:said`")
    accepted = []

    def collect(words, names, seed):
        given = {"words": ("str", words), "names": ("list[str]", names), "seed": ("int", seed)}
        try:
            row = {name: pages.Parameter(name, kind, "", "").accept(value, "x") for name, (kind, value) in given.items()}
        except BookError as error:
            refused(error)
            return
        if row not in accepted and len(accepted) < 20:
            accepted.append(row)

    for number, piece in enumerate([EVIL, "<b>x</b>", *PIECES[::5]]):
        collect(piece, [piece], number)
    fuzz(100, collect, VALUE, st.lists(TEXT, max_size=3), WHOLE)
    (book.folder / "book/sweeps").mkdir()
    table_of_runs = {"page": "group/first", "profile": "quick", "rows": accepted}
    (book.folder / "book/sweeps/x.yml").write_text(yaml.safe_dump(table_of_runs))
    code, output = book.book("sweep", "x", "--jobs", "2")
    assert code == 0 and "20 runs, all done" in output, output
    code, output = book.book("build", "--cores", "2")
    assert code == 0, output
    return book, accepted


@pytest.mark.kernel
@pytest.mark.xdist_group("harm")
def test_twenty_accepted_values_go_through_real_kernels_as_they_are(harmed):
    book, rows = harmed
    found = [json.loads(path.read_text())[0] for path in (book.folder / "_build/sweeps/x").glob("*/results.json")]
    records = {json.dumps(record["parameters"], sort_keys=True): record for record in found}
    for row in rows:
        record = records.pop(json.dumps({"count": 5, **row}, sort_keys=True))
        assert record["values"]["said"]["value"] == row["words"] and record["all_parameters"]["names"] == row["names"]
    assert not records and not [*book.folder.parent.rglob("hit*")]
    assert {path.name for path in (book.folder / "_build/sweeps").iterdir()} == {"x", "x.parquet"}


FOREIGN = """() => [...document.querySelectorAll(".bd-article *")].filter((e) => e.matches(
    "script:not([type='application/json']), iframe, object, embed, form, img, h1 ~ h1, main math, mjx-container")
    || [...e.attributes].some((a) => a.name.startsWith("on") || /^\\s*javascript:/i.test(a.value))).map((e) => e.outerHTML)"""
BOX = """(box) => [[...new Set([...box.querySelectorAll("*")].map((e) => e.localName))].sort().join(" "),
    Object.fromEntries([...box.querySelectorAll("tbody tr")].map((row) => [...row.cells].map((cell) => cell.textContent)))]"""


@pytest.mark.browser
@pytest.mark.kernel
@pytest.mark.xdist_group("harm")
def test_a_readers_browser_shows_every_value_as_text(harmed):
    """The box of a page, as Sphinx and as JupyterLab's kind of Markdown have it, and the pages about sweeps."""
    from markdown_it import MarkdownIt

    book, _ = harmed
    swept = next(
        path
        for path in sorted((book.folder / "_build/sweeps/x").glob("*/run.ipynb"))
        if record(path)["all_parameters"]["words"] == EVIL
    )
    box = nbformat.read(swept, as_version=4).cells[-1].source
    assert not set("`$*\\[]{}|\n") & set(box)  # where JupyterLab would look for a formula, before it reads the Markdown
    with browser() as chromium, served(book.folder / "_build/html") as base:
        tab = chromium.new_page()
        asked, hits = [], []
        tab.expose_function("hit", lambda which: hits.append(which))
        tab.on("request", lambda request: asked.append(request.url))

        def shows_box(record: dict) -> None:
            elements, cells = tab.locator("details.this-run").evaluate(BOX)
            assert elements == "code summary table tbody td th thead tr" and cells["Again"] == record["reproduce"]
            given = record["all_parameters"]
            order = ("count", "scale", "kind", "names", "words", "seed")
            assert given["words"] == EVIL and cells["Parameters"] == ", ".join(f"{name} = {given[name]!r}" for name in order)

        tab.set_content(MarkdownIt("gfm-like").render(box))
        shows_box(record(swept))
        for name in ("group/first", "intro", "results/compare", "results/runs", "reference/parameters"):
            tab.goto(f"{base}{name}.html", wait_until="load")
            tab.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
            for figure in tab.locator(".nsm-figure").all():
                figure.scroll_into_view_if_needed()
                figure.locator(".main-svg").first.wait_for(timeout=20_000)
            assert tab.evaluate(FOREIGN) == [], name
            if name == "group/first":
                shows_box(record(book.run(name)))
            if name in ("group/first", "intro"):
                assert EVIL.split("\n")[0] in tab.inner_text("main")
            else:
                words = tab.locator("td").all_inner_texts()
                assert name == "reference/parameters" or any("<b>x</b>" in text for text in words)
                assert any("<img src=x onerror=hit(2)>" in text for text in words)
        assert not hits and not [url for url in asked if not url.startswith((base, "data:", "blob:", "about:"))]


SHOWN = [
    "a &lt;b&gt; onclick=1",
    '<div><style scoped>.a > b {color: red}</style><b title="one = 3, on = 2">x</b></div>',
    '<script type="application/json" class="nsm-data">{"a": "\\u003cscript>"}</script>',
    '<th class="x" ></th>',
    '<svg xmlns:xlink="http://x"><use xlink:href="#m"/><!-- &lt; --></svg><a href="https://x.example/">y</a>',
    '<img alt="" src="data:image/png;base64,AA"><input hidden data-choices=\'["1"]\'>',
    '<div role="img" aria-label="Data: accuracy over steps"><img alt="Data: a line" src="a.png"></div>',
]
HIDDEN = [
    "<script>hit(1)</script>",
    '<script type="text/javascript" type="application/json">hit(1)</script>',
    "<svg/onload=hit(1)>",
    '<img src="x" oNeRRor="1">',
    "<img src=x onerror=hit(1)>",
    '<p x="1"onclick="hit(1)">',
    '<a xlink:href="JAVASCRIPT:hit(1)">',
    '<a href=" java&#10;script&colon;hit(1)">',
    '<a href="data:text/html,x">',
    '<iframe src="x">',
    '<i srcdoc="x">',
    "<form>",
    '<svg><style><img src="x" onerror="hit(1)"></style></svg>',
    '<a title="<img src=x>">',
    "<![CDATA[<b>]]>",
    "a < b",
    '<animate attributeName="href" values="javascript:hit(1)"/>',
    '<meta http-equiv="refresh" content="0">',
    "<!--><script>",
]


def told_of(data: dict) -> list[str]:
    """What the gate says of a page of which one cell has this output."""
    output = nbformat.v4.new_output("display_data", data)
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("show()", outputs=[output])])
    return gate.problems(page, pages.Page(name="group/first", budget={}, memory=1), prose=False)


def test_no_output_reaches_a_reader_as_a_script():
    """The book's own figures and tables pass, and nothing that runs: neither hidden in HTML nor as another kind of output."""
    for text in SHOWN:
        assert told_of({"text/html": text, "text/plain": "<script>"}) == [], text
    for text in HIDDEN:
        (told,) = told_of({"text/html": f"<div>{text}</div>", "text/plain": ""})
        assert told.startswith("group/first, cell 1 (show()): its HTML holds '") and told.isprintable(), text
    assert told_of({GLUE_MIME: "'<script>'"}) == []
    for kind in ("application/javascript", "text/markdown", "text/latex", "application/vnd.jupyter.widget-view+json"):
        assert "accepts text, tables" in told_of({kind: "hit(1)", "text/plain": ""})[0]
    assert "<script>" in told_of({"text/html": "<b>" * 200_000 + "<script>"})[0]  # in a moment


@pytest.mark.parametrize(("value", "held"), [(2**63 - 1, True), (-(2**63), True), (2**63, False), ("é", True), ("\ud800", False)])
def test_a_value_that_no_table_holds_is_refused_with_its_run(value, held):
    output = nbformat.v4.new_output("display_data", {GLUE_MIME: "3"}, metadata={"scrapbook": {"name": "count", "value": value}})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("glue()", outputs=[output])])
    told = gate.problems(notebook, pages.Page(name="group/first", budget={}, memory=1), prose=False)
    assert told == [] if held else told[0].startswith("group/first: 'count' is glued with a value that no table holds: ")


@pytest.mark.kernel
@pytest.mark.xdist_group("harm")
def test_a_page_with_a_script_is_not_published(harmed, tmp_path):
    """Neither of its own cell nor of an executed notebook that was tampered with."""
    book = object.__new__(Checkout)
    book.folder = tmp_path / "copy"
    shutil.copytree(harmed[0].folder, book.folder, symlinks=True)
    site, run = os.readlink(book.folder / "_build/html"), book.run("group/second")
    notebook = nbformat.read(run, as_version=4)
    harm = {"text/html": "<p onclick='hit(1)'>", "text/plain": ""}
    notebook.cells[2].outputs.append(nbformat.v4.new_output("display_data", harm))
    run.write_text(nbformat.writes(notebook))
    code, output = book.book("site")
    assert code == 1 and "group/second.ipynb is not today's" in output, output  # its checksum does not fit
    run.write_text(json.dumps(sealed(json.loads(nbformat.writes(notebook)))))
    code, output = book.book("site")
    assert code == 1 and "group/second, cell 3 (from nsm_support.metrics" in output and "<p onclick='hit(1)'>" in output, output
    cell = "from IPython.display import Javascript\nJavascript('hit(1)')"
    page = book.folder / "book/group/second.md"
    page.write_text(f"{page.read_text()}\n```{{code-cell}} python3\n{cell}\n```\n")
    code, output = book.book("build")
    assert code == 1 and "group/second, cell 6" in output and "'application/javascript'" in output, output
    assert os.readlink(book.folder / "_build/html") == site


@pytest.mark.kernel
@pytest.mark.xdist_group("harm")
def test_a_run_stays_in_its_folder_and_repeats_itself(harmed, tmp_path):
    book, _ = harmed
    out = tmp_path / "{words} $(touch hit); 'ü' \n x"
    words = ["-p", "words", EVIL, "-p", "count", "3", "-p", "names", "['../..']"]
    code, output = book.book("run", "group/first", *words, "-o", str(out))
    assert code == 0, output
    (place,) = (out / "group-first").iterdir()
    assert {path.name for path in place.iterdir()} == {"run.ipynb", "results.json", "numbers.txt"}
    assert re.fullmatch(r"count=3,names=[\w=,.-]+-[0-9a-f]{8}", place.name) and [*tmp_path.iterdir()] == [out]
    assert not [*book.folder.parent.rglob("hit*")]
    (record,) = json.loads((place / "results.json").read_text())
    assert record["values"]["said"]["value"] == EVIL
    line = shlex.split(record["reproduce"])
    assert line[:5] == ["nsm-book", "run", "group/first", "--profile", "full"] and line[line.index("words") + 1] == EVIL
    for name, value in (("words\n<b>", "1"), ("count", "9" * 30), ("count", "\n\nx"), ("words", os.fsdecode(b"\xff"))):
        code, output = book.book("run", "group/first", "-p", name, value, "-o", str(tmp_path / "none"))
        assert code == 1 and output.startswith("nsm-book: group/first: ") and output.rstrip("\n").isprintable(), output
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("form", ["zip", "old", "bare"])
def test_a_checkpoint_that_is_a_bomb_does_not_go_off(tmp_path, monkeypatch, form):
    """In each form that torch.load reads, by each function that reads a checkpoint; nor does code that lies beside it."""
    hit, name = tmp_path / "hit", "pytorch_model.bin"

    class Bomb:  # runs a command in whoever unpickles it
        def __reduce__(self):
            return os.system, (f"touch {shlex.quote(str(hit))}",)

    bomb = {"metadata": {"config": {}, "seeds": [0]}, "state": {"model.norm.weight": Bomb()}}
    (tmp_path / "config.json").write_text(json.dumps(COMMON | KINDS["vanilla"]))  # it has an `auto_map`
    (tmp_path / "modeling_minicpm.py").write_text(f"open({str(hit)!r}, 'w')")
    if form == "bare":
        (tmp_path / name).write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, tmp_path / name, _use_new_zipfile_serialization=form == "zip")
    monkeypatch.setenv("NSM_BOOK_NEEDS", str(tmp_path))
    product = read_product(name)
    for load in (
        lambda: load_model(product, lambda metadata: torch.nn.Linear(1, 1)),
        lambda: load_trained(product),
        lambda: load_checkpoint(tmp_path),
    ):
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged") as error:
            load()
        assert "weights_only" not in str(error.value)  # nobody is told how to open it all the same
        assert not hit.exists()
    pickle.loads(pickle.dumps(bomb))
    assert hit.exists()  # the bomb is one
