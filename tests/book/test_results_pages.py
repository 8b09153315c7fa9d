"""The results pages, executed in a real kernel on a made-up store: values, links, escaping."""

import html
import json
import re
from pathlib import Path

import jupytext
import nbformat
import papermill
import pytest

from nsm_book import gate
from nsm_book.schema import Page
from nsm_support.statistics import t_interval
from nsm_support.store import read_store

ROOT = Path(__file__).resolve().parents[2]
MARKUP = "<img src=x onerror=alert(1)>$y$"
FACTS = {"seconds": 5.0, "peak_memory_mb": 1234.6, "device": "cpu", "commit": "abc", "date": "d"}
UP = {"supported": "low > 0", "refuted": "high < 0", "min_n": 3}
DOWN = {"supported": "high < 2", "refuted": "low > 4", "min_n": 3}


def claim(id, page, rule=UP, question="Is it?"):
    return {"id": id, "page": page, "question": question, "metric": "mean of the sample", "rule": rule}


def answer(id, estimate, low, high, n, verdict):
    given = {id: estimate, f"{id}_low": low, f"{id}_high": high, f"{id}_n": n, f"{id}_verdict": verdict}
    return {key: {"value": value, "measured": False} for key, value in given.items()}


def record(page, values, **versions):
    software = {"python": "3.11", "platform": "Linux", "versions": {"numpy": "2", "torch": "2"} | versions}
    return FACTS | software | {"page": page, "values": values}


def run(id, parameters, values, done=True, today=True, notebook=True, **versions):
    link = f"../sweeps/grow/{id}.ipynb" if notebook and done else None
    about = {"id": id, "status": "done" if done else "failed", "today": today, "notebook": link, "parameters": parameters}
    return about | {"facts": FACTS if done else dict.fromkeys(FACTS), "values": values, "versions": versions}


def sweep(name, runs, **more):
    about = {"page": "group/first", "profile": "quick", "question": None, "measure": None, "runs_missing": 0, "large": False}
    return {"name": name, **about, "runs": runs, **more}


def write_store(folder, **more):
    """A store of two pages and three claims, without sweeps if `more` brings none."""
    parameter = {"name": "count", "type": "int", "default": 3, "meaning": f"how many {MARKUP}"}
    kind = {"name": "kind", "type": "str | None", "default": "up", "meaning": "which way", "quick": None}
    page = {"budget": 20, "memory": 500, "cores": 1}
    pages = [
        {"name": "group/second", "title": "The `second`", **page, "parameters": []},
        {"name": "group/first", "title": "The first", **page, "parameters": [parameter, kind]},
    ]
    claims = [
        claim("up_it_goes", "group/first", question=MARKUP),
        claim("down", "group/first", DOWN),
        claim("late", "group/second"),
    ]
    book = {"profile": "quick", "pages": pages, "claims": claims, "reruns": {"group/first": {"same": True, "cells": 4}}}
    book |= {"sweeps": [], "sweeps_not_run": ["later"]} | more
    first = answer("up_it_goes", 2.0, 1.0, 4.0, 5, "supported") | answer("down", 3.0, 1.5, 4.5, 5, "undecided")
    second = answer("late", 0.0, 0.0, 0.0, 0, "undecided")
    folder.mkdir(parents=True)
    (folder / "book.json").write_text(json.dumps(book))
    (folder / "results.json").write_text(json.dumps([record("group/first", first), record("group/second", second, torch="9")]))
    return folder


def execute(name, store, probe=""):
    """The page's HTML, what it glued, and the value of an expression in its kernel at the end."""
    notebook = jupytext.read(ROOT / "book" / f"{name}.md")
    notebook.cells.append(nbformat.v4.new_code_cell(probe))
    path = store.with_name(f"{store.name}-{name.replace('/', '-')}.ipynb")
    nbformat.write(notebook, path)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"NSM_BOOK_RESULTS": store, "NSM_BOOK_RUN": 1, "MPLBACKEND": "agg", "PYTHONPATH": ROOT}.items():
            patch.setenv(key, str(value))
        papermill.execute_notebook(path, path, kernel_name="python3", progress_bar=False, cwd=store.parent)
    done = nbformat.read(path, as_version=4)
    last = done.cells.pop().outputs
    assert gate.problems(done, Page(name=name, budget={"quick": 1, "full": 1}, memory=1)) == []
    outputs = [output.get("data", {}).get("text/html", "") for cell in done.cells for output in cell.get("outputs", ())]
    glued = {key: entry["value"] for key, entry in gate.glued(done).items()}
    return "\n".join(outputs), glued, eval(last[0].data["text/plain"]) if last else None


def rows_of(text, label):
    """The texts of a table's cells, row by row, and its whole HTML."""
    table = re.search(rf'aria-label="{re.escape(label)}">(.*?)</table>', text, re.DOTALL)[1]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr")[1:]]
    return [[html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in row] for row in rows], table


def figures_of(text):
    return [json.loads(data) for data in re.findall(r'class="nsm-data">(.*?)</script>', text)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with three sweeps: of two parameters and seeds, of one parameter with text that is markup, and a large one."""
    grid = [(count, scale, seed) for count in (10, 3) for scale in (2.0, 1.0) for seed in (0, 1, 2)]
    same = {"python": "3.11", "platform": "Linux", "numpy": "2", "torch": "2"}
    grow = [
        run(
            f"{c}-{s:.0f}-{seed}",
            {"count": c, "scale": s, "seed": seed},
            {"mean": c * s + seed, "fixed": 1},
            today=(c, s, seed) != (3, 1.0, 0),
            **same,
        )
        for c, s, seed in grid
    ]
    own = {"mean": 2.0, "mean_low": 1.0, "mean_high": 4.0, "spread": 1.0}
    kind = [
        run("a", {"kind": MARKUP}, own),
        run("b", {"kind": "plain"}, {"mean": 3.0, "mean_low": 5.0, "mean_high": 6.0, "spread": 2.0}),
        run("c", {"kind": "failed"}, {}, done=False),
    ]
    large = [run(f"l{i}", {"count": i}, {"mean": i}, notebook=False) for i in range(3)]
    sweeps = [
        sweep("grow", grow, question="Is a < b?", measure="mean", runs_missing=2),
        sweep("kind", kind),
        sweep("many", large, large=True),
    ]
    return write_store(tmp_path_factory.mktemp("results") / "full", sweeps=sweeps)


@pytest.mark.kernel
def test_claims_are_counted_drawn_and_lead_to_the_sections_that_answer_them(store):
    text, glued, places = execute("results/claims", store, "places[1:].round(3).to_numpy().tolist()")
    assert glued == {"questions": 3, "supported": 1, "refuted": 0, "undecided": 2}
    (head, late), table = rows_of(text, "Answers to the questions of: The second")  # first in the reader's order
    assert head == ["The second", "verdict", "reason", "estimate", "interval", "n"]
    assert late == ["Is it?", "undecided", "this run did not measure at the size asked about", "–", "–", "0"]
    assert '<a href="../group/second.html#claim-late">' in table and '<tr id="late">' in table
    (_, up, down), table = rows_of(text, "Answers to the questions of: The first")
    assert up == [MARKUP, "supported", "the whole interval is above 0", "2", "1 to 4", "5"] and "<img" not in text
    assert '<a href="../group/first.html#claim-up-it-goes">' in table and down[4] == "1.5 to 4.5"
    assert text.index("The second") < text.index("The first") and text.index("<svg") < text.index("<table")
    rules = rows_of(text, "Rules and metrics of: The first")[0]
    assert rules[2][1:] == [
        "supported if the whole interval is below 2, refuted if the whole interval is above 4; n at least 3",
        "mean of the sample",
    ]
    assert "3 questions, by page" in text and "1 supported, 0 refuted, 2 undecided" in text
    assert places[0] == [0.5, 0.25, 1.0, 0.0]  # estimate, low, high, second bound; what speaks for yes lies to the right
    assert places[1] == [-0.4, 0.2, -1.0, -0.8]  # mirrored: below 2 is yes


@pytest.mark.kernel
def test_sweeps_are_drawn_with_intervals_and_lead_to_their_runs(store):
    text, glued, _ = execute("results/compare", store)
    assert (glued["sweeps"], glued["drawn"]) == (4, 3)
    assert rows_of(text, "All sweeps and their runs")[0][1:] == [
        ["grow", "group/first", "quick", "12", "0", "2", "1", "nsm-book sweep grow"],
        ["kind", "group/first", "quick", "2", "1", "0", "0", "nsm-book sweep kind"],
        ["many", "group/first", "quick", "3", "0", "0", "–", "nsm-book sweep many"],
        ["later", "–", "–", "–", "–", "–", "–", "nsm-book sweep later"],
    ]
    grow, grid, kind, many = figures_of(text)
    assert set(grow["frames"]) == {"0,0", "0,1", "1,0", "1,1"}  # mean and seconds, along count and along scale
    first, second, layout = grow["frames"]["0,0"]
    assert (first["name"], first["y"], second["y"]) == ("scale = 1.0", [4.0, 11.0], [7.0, 21.0])
    assert first["x"] == [-0.03, 0.97] and layout["xaxis"]["ticktext"] == ["3", "10"]  # in order of size
    assert first["customdata"] == ["#grow-3-1-0", "#grow-10-1-0"] and "(n = 3)" in first["hovertext"][0]
    assert first["error_y"]["array"][0] == pytest.approx(t_interval([3.0, 4.0, 5.0]).high - 4.0)
    assert layout["yaxis"]["title"]["text"] == "mean" and "Is a &lt; b? 12 runs of group/first" in text
    assert grid["frames"]["0,0"][0]["z"] == [[4.0, 11.0], [7.0, 21.0]] and grid["frames"]["0,0"][0]["y"] == ["1.0", "2.0"]
    assert rows_of(text, "Settings of the sweep grow")[0][1][:3] == ["3", "1.0", "4, 1.52 to 6.48"]
    (head, line, *rest), table = rows_of(text, "Runs of the sweep grow")
    assert head == ["run", "status", "count", "scale", "seed", "mean", "seconds"] and len(rest) == 11
    assert line[:6] == ["10-2-0", "done", "10", "2.0", "0", "20"]
    assert '<tr id="grow-10-2-0">' in table and '<a href="../sweeps/grow/10-2-0.ipynb">' in table
    trace = kind["figure"]["data"][0]
    assert trace["error_y"]["array"] == [2.0, 0.0] and trace["error_y"]["arrayminus"] == [
        1.0,
        0.0,
    ]  # its own, if it holds the mean
    assert trace["customdata"] == ["../sweeps/grow/a.ipynb", "../sweeps/grow/b.ipynb"]
    assert kind["figure"]["layout"]["xaxis"]["ticktext"][0] == "&lt;img src=x onerror=alert(1)&gt;&#36;y&#36;"
    assert "<img" not in text and rows_of(text, "Runs of the sweep kind")[0][3][:2] == ["c", "failed"]
    assert many["figure"]["data"][0]["customdata"] == [None] * 3 and "Runs of the sweep many" not in text
    assert "_build/sweeps/many.parquet" in text


@pytest.mark.kernel
def test_runs_tell_what_they_took_and_what_differs_between_them(store):
    text, glued, _ = execute("results/runs", store)
    assert (glued["pages"], glued["seconds"], glued["alike"]) == (2, "10", "numpy 2, platform Linux, python 3.11")
    (head, second, first), table = rows_of(text, "Runs of the pages")
    assert head[-1] == "versions that differ"
    assert second == ["group/second", "not run again", "5", "25", "1,235", "cpu", "abc", "d", "torch 9"]
    assert first[:2] == ["group/first", "same, 4 cells"] and '<a href="../group/first.html">' in table
    assert (glued["sweeps"], glued["runs"], glued["swept_seconds"]) == (3, "18", "85")


@pytest.mark.kernel
def test_parameters_stand_as_python_writes_them(store):
    text, glued, _ = execute("reference/parameters", store)
    assert rows_of(text, "Parameters of group/first")[0][1:] == [
        ["count", "int", "3", "–", f"how many {MARKUP}"],
        ["kind", "str | None", "'up'", "None", "which way"],
    ]
    assert (glued["pages"], glued["parameters"]) == (1, 2) and "<summary>The first: group/first</summary>" in text


@pytest.mark.kernel
def test_a_book_that_has_asked_nothing_has_its_page_too(tmp_path):
    text, glued, _ = execute("results/claims", write_store(tmp_path / "bare", claims=[]))
    assert set(glued.values()) == {0} and "0 questions, by page" in text


def test_the_store_is_the_nearest_checkouts_and_its_full_profile_first(tmp_path, monkeypatch):
    monkeypatch.delenv("NSM_BOOK_RESULTS", raising=False)
    (tmp_path / "book").mkdir()
    monkeypatch.chdir(tmp_path / "book")
    with pytest.raises(FileNotFoundError, match=r"NSM_BOOK_RESULTS is not set, and there is no .* which `make book` writes"):
        read_store()
    write_store(tmp_path / "_build/results/quick")
    assert read_store().profile == "quick"
    write_store(tmp_path / "_build/results/full", profile="full", claims=[claim("else", "group/first")])
    with pytest.raises(ValueError, match="the run of group/first does not answer the claim 'else': has no else"):
        read_store()
    assert list(read_store(tmp_path / "_build/results/quick").claims.id) == ["late", "up_it_goes", "down"]
