"""What a sweep has left in `_build/sweeps`, read back for the results pages."""

import json
import shutil
import types

import pyarrow
import pyarrow.parquet
import pytest

from nsm_book import BookError, swept
from nsm_book.schema import Page

FACTS = {"seconds": 2.0, "peak_memory_mb": 9.0, "device": "cpu", "commit": "abc", "date": "d"}


def write_sweep(build, monkeypatch, runs="ab", **changes):
    """The sweep `grow`, of which `runs` stand in its file today, with a table of run a, done, and b, failed; `changes` go into
    a's record. A sweep `later` has not run.
    """
    page = Page(name="group/first", budget={"quick": 10, "full": 20}, memory=500)
    monkeypatch.setattr(swept, "sweeps", lambda: ["grow", "later"])
    monkeypatch.setattr(swept, "sweep_folder", lambda name: build / name)
    monkeypatch.setattr(swept, "fingerprint", lambda page, profile, given: {"source": "abc", "parameters": given})
    about = {"page": page, "profile": "quick", "measure": "mean", "runs": dict.fromkeys(runs)}
    monkeypatch.setattr(
        swept,
        "read_sweep",
        lambda name: types.SimpleNamespace(name=name, question=f"Does {name}?", table=build / f"{name}.parquet", **about),
    )
    place = build / "grow/a"
    place.mkdir(parents=True)
    (place / "run.ipynb").write_text("the notebook")
    record = {**FACTS, "digest": swept.digest(place / "run.ipynb"), "python": "3.11", "versions": {"torch": "2"}}
    record |= {"fingerprint": {"source": "abc", "parameters": {"count": 3}, "files": {}}, **changes}
    (place / "results.json").write_text(json.dumps([record]))
    common = {"page": page.name, "profile": "quick"}
    rows = [
        {"run": "a", **common, "status": "done", **FACTS, "parameters.count": 3, "values.mean": 2.0},
        {"run": "b", **common, "status": "failed", **dict.fromkeys(FACTS), "parameters.count": 5, "values.mean": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), build / "grow.parquet")
    return place


def runs_of_grow():
    ((grow,), waiting) = swept.catalogue()
    assert waiting == ["later"]
    return grow["runs"]


def test_a_sweep_is_read_back_with_its_notebooks(tmp_path, monkeypatch):
    place = write_sweep(tmp_path, monkeypatch)
    ((grow,), waiting) = swept.catalogue()
    done, failed = grow.pop("runs")
    assert waiting == ["later"] and grow == {
        **{"name": "grow", "page": "group/first", "profile": "quick", "question": "Does grow?", "measure": "mean"},
        **{"runs_missing": 0, "large": False},
    }
    assert done == {
        **{"id": "a", "status": "done", "parameters": {"count": 3}, "values": {"mean": 2.0}, "facts": FACTS, "today": True},
        **{"versions": {"python": "3.11", "torch": "2"}, "notebook": "../sweeps/grow/a.ipynb"},
    }
    shutil.copytree(place, place.with_name("b"))  # a failed run leads nowhere, though an earlier one lies there
    failed = runs_of_grow()[1]
    assert (failed["notebook"], failed["today"], failed["facts"]) == (None, False, dict.fromkeys(FACTS))


def test_an_earlier_page_is_seen_and_a_damaged_notebook_not_linked(tmp_path, monkeypatch):
    place = write_sweep(tmp_path, monkeypatch, fingerprint={"source": "old", "parameters": {}, "files": {}})
    assert not runs_of_grow()[0]["today"] and runs_of_grow()[0]["notebook"]
    (place / "run.ipynb").write_text("half")
    assert runs_of_grow()[0]["notebook"] is None
    (place / "results.json").unlink()
    assert runs_of_grow()[0]["notebook"] is None and runs_of_grow()[0]["versions"] == {}


def test_a_sweep_that_was_begun_again_leads_to_no_notebook_of_another_run(tmp_path, monkeypatch):
    write_sweep(tmp_path, monkeypatch, seconds=3.0)
    done = runs_of_grow()[0]
    assert (done["today"], done["notebook"], done["values"]) == (False, None, {"mean": 2.0})


def test_a_large_sweep_is_read_from_its_table_alone(tmp_path, monkeypatch):
    write_sweep(tmp_path, monkeypatch)
    monkeypatch.setattr(swept, "MOST_RUNS", 1)
    ((grow,), _) = swept.catalogue()
    assert grow["large"] and grow["runs"][0]["notebook"] is None and grow["runs"][0]["values"] == {"mean": 2.0}


def test_only_runs_that_stand_in_the_sweep_today_are_shown(tmp_path, monkeypatch):
    write_sweep(tmp_path, monkeypatch, runs="acd")
    ((grow,), _) = swept.catalogue()
    assert [run["id"] for run in grow["runs"]] == ["a"] and grow["runs_missing"] == 2
    write_sweep(tmp_path / "other", monkeypatch, runs="cd")
    assert swept.catalogue() == ([], ["grow", "later"])


def test_a_table_that_is_not_whole_is_refused_by_name(tmp_path, monkeypatch):
    write_sweep(tmp_path, monkeypatch)
    path = tmp_path / "grow.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BookError, match=r"grow\.parquet: is no whole Parquet file"):
        swept.catalogue()
    pyarrow.parquet.write_table(pyarrow.table({"run": ["a"], "loss": [1.0]}), path)
    with pytest.raises(BookError, match="is no table of a sweep: has no page, profile, status, seconds"):
        swept.catalogue()
