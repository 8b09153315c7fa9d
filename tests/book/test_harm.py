"""Input that means harm: it runs no code, writes nowhere else, reaches no reader as markup; it is run or refused in one line."""

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
from hypothesis import strategies as st

from nsm_book import BookError, gate
from nsm_book.fingerprint import record, with_checksum
from nsm_book.schema import Page, Parameter
from nsm_support.blockffn.checkpoint import load_checkpoint
from nsm_support.results import GLUE_MIME, read_product
from nsm_support.studies.language_model import load_trained
from nsm_support.training import CheckpointError, load_model
from tests.book.test_schema import EVIL, PIECES, TEXT, VALUE, WHOLE, fuzz, refused
from tests.conftest import Checkout
from tests.site.browser import browser, served
from tests.support.test_blockffn_checkpoint import COMMON, KINDS


@pytest.fixture(scope="module")
def harmed(tmp_path_factory):
    """A small book whose page has a parameter for any text: 20 accepted values of it run in one sweep, and EVIL on the page."""
    book = Checkout(tmp_path_factory.mktemp("harmed") / "book", results=True)
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
            row = {name: Parameter(name, kind, "", "").accept(value, "x") for name, (kind, value) in given.items()}
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
            for figure in tab.locator(".nsm-figure:has(.nsm-plot)").all():
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
    return gate.problems(page, Page(name="group/first", budget={"quick": 1, "full": 1}, memory=1), prose=False)


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
    told = gate.problems(notebook, Page(name="group/first", budget={"quick": 1, "full": 1}, memory=1), prose=False)
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
    run.write_text(json.dumps(with_checksum(json.loads(nbformat.writes(notebook)))))
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
