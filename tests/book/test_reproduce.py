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

from nsm_book.schema import BOOK
from tests.conftest import ROOT

pytestmark = pytest.mark.kernel
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", (BOOK / "reference/reproduce.md").read_text(), re.DOTALL | re.MULTILINE)
HOURS = "make book PROFILE=full"
CLUSTER = next(place for place, (_, text) in enumerate(BLOCKS) if "profiles/slurm" in text)

if not (ROOT / "_build/results/quick/results.parquet").exists():
    if os.environ.get("NSM_BOOK_NEED_BROWSER"):
        raise RuntimeError("everything is to be tested, and there is no built book: make book")
    pytest.skip("there is no built book: make book", allow_module_level=True)


def run(folder: Path, kind: str, text: str) -> subprocess.CompletedProcess:
    """One block of the page, as a person would run it who has activated the environment."""
    words = {"bash": ["bash", "-e", "-c", text], "python": [sys.executable, "-c", text]}[kind]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NSM_BOOK", "PYTEST"))}
    path = os.pathsep.join([str(folder / ".venv/bin"), clean["PATH"]])
    return subprocess.run(
        words,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=400,
        env={**clean, "PATH": path, "PYTHONPATH": str(folder), "COLUMNS": "200"},
    )


def whole(folder: Path) -> dict[str, bytes]:
    """The runs of the page's sweep that are whole, by their ids."""
    return {
        place.parent.name: (place.parent / "run.ipynb").read_bytes()
        for place in (folder / "_build/sweeps/mine").glob("*/results.json")
    }


def block(containing: str) -> int:
    """The place of the one block that has these words."""
    (place,) = (place for place, (_, text) in enumerate(BLOCKS) if containing in text)
    return place


@pytest.mark.slurm
def test_every_command_of_the_page_does_what_the_page_says(tmp_path, request):
    folder = tmp_path / "book"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__"))
    (folder / ".venv").symlink_to(sys.prefix)
    shutil.rmtree(folder / "_build/sweeps", ignore_errors=True)
    told, runs = {}, {}
    for place, (kind, text) in enumerate(BLOCKS):
        if place != CLUSTER:  # that is for the end
            done = run(folder, kind, "".join(line for line in text.splitlines(keepends=True) if not line.startswith(HOURS)))
            assert done.returncode == 0, f"{text}\n{done.stdout}"
            told[place], runs[place] = done.stdout, whole(folder)
    for states in (4, 8):
        place = folder / f"runs/tutorials-states/quick,num_states={states}"
        (record,) = json.loads((place / "results.json").read_text())
        assert record["all_parameters"]["num_states"] == states and (place / "run.ipynb").exists()
    assert "gap_zero" in told[block("nsm-book diff")]
    first, grown = block("cat > book/sweeps"), block("timeout --signal KILL")
    assert "4 of 4 runs to do" in told[first] and "2 of 6 runs to do" in told[grown]
    assert told[grown].count("sweep mine: 6 runs, all done") == 1  # the first of two commands was cut short
    assert len(runs[first]) == 4 and len(runs[grown]) == 6 and runs[first].items() <= runs[grown].items()
    table = pandas.read_parquet(folder / "_build/sweeps/mine.parquet")
    assert list(table.status) == ["done"] * 6 and set(table["parameters.num_states"]) == {4, 8, 16}
    assert json.loads((folder / "out.ipynb").read_text())["metadata"]["papermill"]["parameters"] == {"digits": 100, "steps": 10}

    request.getfixturevalue("slurm")  # where there is none, all above was tried all the same
    done = run(folder, *BLOCKS[CLUSTER])
    assert done.returncode == 0 and "3 of 9 runs to do" in done.stdout, done.stdout
    assert len(whole(folder)) == 9 and runs[grown].items() <= whole(folder).items()
