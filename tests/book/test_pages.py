"""What every page of the book keeps to, read from its source and from its last run."""

import ast
import re

import jupytext
import jupytext.cli
import nbformat
import pytest
import yaml

from nsm_book import ROOT, gate, schema

PAGES = list(schema.pages().values())
TOC = (ROOT / "_toc.yml").read_text()


def code_cells(page):
    return [cell for cell in jupytext.read(page.source).cells if cell.cell_type == "code"]


def calls(page, name: str):
    """Every call of a function of that name on the page."""
    for cell in code_cells(page):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", None)) == name:
                yield node


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request):
    return request.param


@pytest.fixture(params=[page for page in PAGES if not page.reads_results], ids=lambda page: page.name)
def study(request):
    """A page that measures something of its own, and does not show what the others measured."""
    return request.param


def test_every_source_with_code_is_a_page_and_in_the_toc():
    sources = {
        str(path.relative_to(schema.BOOK).with_suffix(""))
        for path in schema.BOOK.rglob("*.md")
        if "{code-cell}" in path.read_text()
    }
    assert sources == set(schema.pages())
    assert all(f"file: {name}" in TOC for name in sources)


def test_head_names_the_pair_and_the_kernel(page):
    head = yaml.safe_load(page.source.read_text().split("---")[1])
    assert head["jupytext"]["formats"] == "ipynb,md:myst" and head["kernelspec"]["name"] == "python3"
    assert jupytext.read(page.source).cells[0].source.startswith("# ")


def test_one_parameters_cell_with_meanings_and_a_device(study):
    found = schema.parameters(study)  # refuses anything but one cell of `name: type = default  # meaning`
    assert {"device"} <= found.keys() and {"seed", "seeds"} & found.keys()
    assert schema.profile_parameters(study, "quick")


def test_no_cell_is_long_or_reaches_outside(page):
    for number, cell in enumerate(code_cells(page), start=1):
        lines = cell.source.splitlines()
        assert len(lines) <= 40, f"code cell {number} has {len(lines)} lines"
        assert max(map(len, lines), default=0) <= 88, f"code cell {number} has a line that a page cannot hold"
        assert not re.search(r"^\s*[!%]", cell.source, re.MULTILINE), f"code cell {number}: shell or magic"
        assert not re.search(r"""["'](/|~|[A-Za-z]:\\)[\w.]""", cell.source), f"code cell {number}: absolute path"
        assert "sys.path" not in cell.source


def test_every_figure_goes_through_show_with_words(study):
    shown = list(calls(study, "show"))
    names = []
    for call in shown:
        assert isinstance(call.func, ast.Name), "figure.show() has neither alt text nor a twin"
        words = {key.arg: key.value for key in call.keywords}
        assert isinstance(words["alt"], ast.Constant) and len(words["alt"].value.split()) >= 6, ast.unparse(call)[:100]
        assert "caption" in words
        names.append(ast.literal_eval(words["name"]))
    assert shown and len(names) == len(set(names))
    text = study.source.read_text()
    assert not re.search(r"plt\.show\(|!\[\]\(", text)
    for name in names:
        assert f'href="#fig-{name}"' in text, f"figure {name} is never referred to"


@pytest.mark.built
def test_glue_keys_resolve_and_are_used(study):
    run = nbformat.read(study.run_file("quick"), 4)
    keys = gate.glued(run)
    used = {key for cell in run.cells if cell.cell_type == "markdown" for key in gate.GLUE_ROLE.findall(cell.source)}
    assert used and used <= keys.keys()
    assert not gate.problems(run, study)


def test_prose_holds_no_result_typed_by_hand(page):
    """A decimal number in prose is a result unless it stands in code or in a formula."""
    for cell in jupytext.read(page.source).cells:
        if cell.cell_type == "markdown":
            prose = re.sub(r"`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|```.*?```|\([^)]*\)=|<[^>]*>", "", cell.source, flags=re.DOTALL)
            assert not re.search(r"\d+\.\d+ ?(%|×|ms|s\b)|\d ?%", prose.replace("95 %", "")), prose[:200]


@pytest.mark.built
def test_claims_keep_to_their_schema_and_are_answered():
    for claim in schema.claims():
        keys = gate.glued(nbformat.read(schema.page(claim.page).run_file("quick"), 4))
        assert f"{claim.id}_verdict" in keys
        assert f"`{claim.id}_verdict`" in schema.page(claim.page).source.read_text()


def test_exercise_names_are_unique():
    names = [name for page in PAGES for name in re.findall(r"^:label: (\S+)", page.source.read_text(), re.MULTILINE)]
    assert len(names) == len(set(names))


def test_pairing_leaves_the_sources_as_they_are(tmp_path, page):
    """`make notebooks`, and the edit of a notebook that is taken back, must not make a page run again."""
    copy = tmp_path / page.source.name
    copy.write_text(page.source.read_text())
    jupytext.cli.jupytext(["--quiet", "--sync", str(copy)])
    assert copy.with_suffix(".ipynb").exists() and copy.read_text() == page.source.read_text()
