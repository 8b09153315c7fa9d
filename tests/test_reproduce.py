"""`reference/reproduce`: its commands, taken from the page and run in the page's order, in a copy of the whole project."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from nsm_support.book.pages import BOOK
from tests.conftest import ROOT

pytestmark = [pytest.mark.kernel, pytest.mark.xdist_group("slurm")]
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", (BOOK / "reference/reproduce.md").read_text(), re.DOTALL | re.MULTILINE)
HOURS = "make book PROFILE=full"
CLUSTER = next(place for place, (_, text) in enumerate(BLOCKS) if "profiles/slurm" in text)

if not (ROOT / "_build/results/quick/results.parquet").exists():
    pytest.skip("there is no built book: make book", allow_module_level=True)


def run(folder: Path, kind: str, text: str) -> subprocess.CompletedProcess:
    """One block of the page, as a person would run it who has activated the environment."""
    words = {"bash": ["bash", "-e", "-c", text], "python": [sys.executable, "-c", text]}[kind]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NSM_BOOK", "PYTEST"))}
    path = os.pathsep.join([str(folder / ".venv/bin"), clean["PATH"]])
    return subprocess.run(words, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400,
                          env={**clean, "PATH": path, "PYTHONPATH": str(folder), "COLUMNS": "200"})


def whole(folder: Path) -> dict[str, bytes]:
    """The runs of the page's sweep that are whole, by their ids."""
    return {place.parent.name: (place.parent / "run.ipynb").read_bytes()
            for place in (folder / "_build/sweeps/mine").glob("*/results.json")}


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The copy, after all that needs no cluster; what each block printed, and the sweep's runs after it."""
    folder = tmp_path_factory.mktemp("project") / "book"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.ipynb.part"))
    (folder / ".venv").symlink_to(sys.prefix)
    shutil.rmtree(folder / "_build/sweeps", ignore_errors=True)
    told, runs = [], []
    for place, (kind, text) in enumerate(BLOCKS):
        assert text.startswith("make book") or HOURS not in text
        done = run(folder, kind, "".join(line for line in text.splitlines(keepends=True) if not line.startswith(HOURS))
                   if place != CLUSTER else "true")
        assert done.returncode == 0, f"{text}\n{done.stdout}"
        told.append(done.stdout)
        runs.append(whole(folder))
    return folder, told, runs


def block(containing: str) -> int:
    """The place of the one block that has these words."""
    (place,) = (place for place, (_, text) in enumerate(BLOCKS) if containing in text)
    return place


def test_a_run_with_another_parameter_is_compared_with_its_neighbour(walked):
    folder, told, _ = walked
    for states in (4, 8):
        place = folder / f"runs/tutorials-states/quick,num_states={states}"
        (record,) = json.loads((place / "results.json").read_text())
        assert record["all_parameters"]["num_states"] == states and (place / "run.ipynb").exists()
    assert "gap_zero" in told[block("nsm-book diff")]


def test_a_table_that_grew_and_a_sweep_that_was_killed_repeat_nothing(walked):
    _, told, runs = walked
    first, grown = runs[block("cat > book/sweeps")], runs[block("timeout --signal KILL")]
    assert len(first) == 4 and len(grown) == 6 and all(grown[id] == notebook for id, notebook in first.items())
    assert "4 of 4 runs to do" in told[block("cat > book/sweeps")]
    assert "2 of 6 runs to do" in told[block("timeout --signal KILL")]


def test_the_tables_can_be_read_as_the_page_reads_them(walked):
    folder, _, _ = walked
    table = pandas.read_parquet(folder / "_build/sweeps/mine.parquet")
    assert list(table.status) == ["done"] * 6 and set(table["parameters.num_states"]) == {4, 8, 16}
    assert json.loads((folder / "out.ipynb").read_text())["metadata"]["papermill"]["parameters"] == {"digits": 100, "steps": 10}


@pytest.mark.slurm
def test_the_same_sweep_goes_on_as_jobs_of_a_cluster(walked, slurm):
    folder, _, runs = walked
    done = run(folder, *BLOCKS[CLUSTER])
    assert done.returncode == 0 and "3 of 9 runs to do" in done.stdout, done.stdout
    found = whole(folder)
    assert len(found) == 9 and all(found[id] == notebook for id, notebook in runs[-1].items())
