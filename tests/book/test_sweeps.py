"""Sweeps on a small book of its own: tables checked before a kernel starts, real runs, real kills, one table in the end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pandas
import pytest
from rich.console import Console

from nsm_book import BookError, fingerprint, gate, run, schema, sweep, sweep_table, workflow
from nsm_book.schema import Page
from tests.conftest import Checkout

kernel = pytest.mark.kernel


FIRST = "page: group/first\n"


@pytest.fixture
def here(small, monkeypatch, tmp_path):
    """The small book in this process, building in a folder of its own."""
    for module in (schema, sweep, workflow, fingerprint, run):
        monkeypatch.setattr(module, "BUILD", tmp_path / "_build")
    return small


def ends(found, code=0, fine=(), failed=()):
    """In place of Snakemake: some runs end well, and so do their steps, some fail with a reason."""

    def snakemake(words, stale, progression, console, lock, log, runs):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("there is no such executor")
        for id in (*fine, *failed):
            (found.folder / id).mkdir(parents=True)
        for id in failed:
            (found.folder / id / "run.failed.txt").write_text("unlucky")
        (found.folder / "steps").mkdir(exist_ok=True)
        for step, planned in sweep.read_plan("x")["steps"].items():
            if {id for id, *_ in planned} <= set(fine):
                (found.folder / "steps" / step).touch()
        return code

    return snakemake


def test_a_plan_has_every_run_once_in_steps_of_a_minute_at_most(here):
    found = here("x.yml", FIRST + f"seeds: {list(range(200))}\n")

    def sizes(seconds: float, jobs: int) -> list[int]:
        sweep.write_plan(found, list(found.runs.values()), seconds, jobs)
        steps = sweep.read_plan("x")["steps"].values()
        several = max(map(len, steps)) > 1
        assert sweep.read_plan("x")["at_once"] == (2 if seconds < 3 and several else 1)  # short runs wait for their kernels
        assert [id for step in steps for id, *_ in step] == list(found.runs)
        return [len(step) for step in steps]

    assert sizes(1.0, 2) == [12] * 16 + [8]
    assert sizes(20.0, 2) == [3] * 66 + [2]
    assert sizes(300.0, 2) == [1] * 200 and sizes(1.0, 50) == [4] * 50
    assert sizes(0.5, 8) == [16] * 12 + [8] and sizes(5.0, 8) == [3] * 66 + [2]


def test_a_measure_that_no_run_has_is_refused_at_the_end(here, monkeypatch):
    monkeypatch.setattr(sweep, "finished", lambda found: {id: {"values": {"mean": {"value": 2.0}}} for id in found.runs})
    here("x.yml", FIRST + "measure: mean\ngrid: {count: [3, 4]}\n")
    assert "2 runs, all done" in sweep.run("x", 2, None, Console())
    here("x.yml", FIRST + "measure: maen\ngrid: {count: [3, 4]}\n")
    with pytest.raises(BookError, match="all runs are done, but unknown measure 'maen'; nearest: mean; accepted: mean, seconds"):
        sweep.run("x", 2, None, Console())


def test_many_failures_are_counted_and_what_began_comes_last(here, monkeypatch):
    found = here("x.yml", FIRST + f"seeds: {list(range(40))}\n")
    monkeypatch.setattr(sweep, "finished", lambda found: {})
    monkeypatch.setattr(workflow, "snakemake", ends(found))
    runs = list(found.runs)
    for begun in (runs[0], runs[7]):
        (found.folder / begun).mkdir(parents=True)
    with pytest.raises(BookError, match="40 of 40 runs failed") as error:
        sweep.run("x", 2, None, Console())
    assert str(error.value).count("without a word") == 10 and "and 30 more" in str(error.value)
    planned = [id for step in sweep.read_plan("x")["steps"].values() for id, *_ in step]
    assert planned == [run for run in runs if run not in (runs[0], runs[7])] + [runs[0], runs[7]]


@pytest.mark.parametrize("code", [1, -9])
def test_a_sweep_of_which_no_run_began_or_that_was_killed_leaves_its_table(here, monkeypatch, code):
    found = here("x.yml", FIRST + "grid: {count: [3, 4]}\n")
    found.folder.mkdir(parents=True)
    found.table.write_text("of all runs")
    monkeypatch.setattr(sweep, "finished", lambda found: {})
    monkeypatch.setattr(workflow, "snakemake", ends(found, code, fine=[*found.runs][:1] if code < 0 else ()))
    with pytest.raises(BookError, match="sweep x: its table was left as it was") as error:
        sweep.run("x", 2, None, Console())
    assert ("there is no such executor" if code > 0 else "Snakemake was killed by signal 9") in str(error.value)
    assert found.table.read_text() == "of all runs"


def test_what_a_node_wrote_is_waited_for_though_another_run_failed(here, monkeypatch, tmp_path):
    found = here("x.yml", FIRST + "grid: {count: [3, 4]}\n")
    fine, bad = found.runs
    looks = [{}, {}, {}, {fine: {"seconds": 1.0, "values": {}}}]
    monkeypatch.setattr(sweep, "finished", lambda found: looks.pop(0))
    monkeypatch.setattr(workflow, "snakemake", ends(found, 1, [fine], [bad]))
    with pytest.raises(BookError, match=r"count=4 \(\w+\): unlucky\n\nsweep x: 1 of 2 runs failed"):
        sweep.run("x", 2, tmp_path, Console())
    assert not looks


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_step_goes_on_past_runs_that_fail_and_are_killed(here, monkeypatch, at_once, capfd):
    def run_into(place, page, profile, given):  # in place of a kernel
        if given["count"] == 13:
            raise BookError("unlucky")
        if given["count"] == 14:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(sweep, "run_into", run_into)
    found = here("x.yml", FIRST + "grid: {count: [13, 14, 3]}\n")
    steps = {"a": [[run.id, run.label, run.parameters] for run in found.runs.values()]}
    found.folder.mkdir(parents=True)
    plan = {"page": "group/first", "profile": "full", "at_once": at_once, "steps": steps}
    (found.folder / "plan.json").write_text(json.dumps(plan))
    unlucky, killed, _ = found.runs
    with pytest.raises(BookError, match=f"^failed: {unlucky}, {killed}$"):
        sweep.run_step("x", "a")
    output = capfd.readouterr().out
    assert "✓ count=13: FAILED" in output and "✓ count=3: 0." in output
    assert workflow.failure(found.folder / unlucky / "run.ipynb", "it") == "unlucky"
    assert workflow.failure(found.folder / killed / "run.ipynb", "it").startswith("it: its process or job ended without a word")
    sweep.run_step("x", "a step of an older plan")  # has nothing to do


PLAN = """Job stats:
job            count
-----------  -------
page_a             1
page_b             1
site               1
book               1
total              4

[Mon Nov 30 20:15:49 2026]
localrule page_a:
    output: a.txt (update)
"""


def test_the_time_left_follows_snakemakes_own_report(monkeypatch):
    entries = {name: Page(name=name, budget={"quick": 1, "full": 1}, memory=1) for name in "abc"}
    monkeypatch.setattr(workflow, "pages", lambda: entries)
    seconds = {"page_a": 100.0, "page_b": 50.0, "page_c": 999.0, "site": 10.0}
    progression = workflow.Progression("quick", seconds, {"page_a": 0.5, "page_b": 0.5})
    for line in PLAN.splitlines():
        progression.read(line)
    assert progression.planned == {"page_a": 1, "page_b": 1, "site": 1} and [*progression.running] == ["page_a"]
    assert progression.seconds_left() == pytest.approx(100 / 2 + 50 / 2 + 10, abs=0.5)
    progression.read("Finished jobid: 2 (Rule: page_a)")
    assert progression.seconds_left() == pytest.approx(50 / 2 + 10) and progression.ended == ["page_a"]
    for line in ("rule page_b:", 'WorkflowError in rule page_b in file "Snakefile", line 34:'):
        progression.read(line)
    assert progression.seconds_left() == 10 and progression.failed == ["page_b"]
    count = workflow.RunCount(4)
    count.done, count.began = 1, time.monotonic() - 4
    assert count.seconds_left() == pytest.approx(12, abs=0.1)


def test_pages_that_a_page_needs_are_found_through_others(monkeypatch):
    def made(name, needs=(), makes=()):
        return Page(name=name, budget={"quick": 1, "full": 1}, memory=1, needs=needs, makes=makes)

    chain = [made("a", makes=("x",)), made("b", ("x",), ("y",)), made("c", ("y", "x")), made("d", makes=("z",))]
    monkeypatch.setattr(fingerprint, "pages", lambda: {page.name: page for page in chain})
    assert [page.name for page in fingerprint.makers(chain[2])] == ["a", "b"] and fingerprint.makers(chain[0]) == []


def test_a_column_holds_one_kind_of_value():
    assert sweep._column([1, 2.5, None]) == [1.0, 2.5, None] and sweep._column([1, "a", None]) == ["1", "a", None]
    assert sweep._column([1, None]) == [1, None] and sweep._column([[1], [2]]) == [[1], [2]]


@pytest.mark.built
def test_the_books_own_sweeps_and_the_manuals_are_accepted(monkeypatch, tmp_path):
    for name in sweep_table.sweeps():
        found = sweep_table.read_sweep(name)
        assert 1 < len(found.runs) < 50 and found.question
        assert isinstance(gate.glued(nbformat.read(found.page.run_file("quick"), 4))[found.measure]["value"], float)
    shutil.copytree(schema.BOOK, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("_static"))
    (example,) = re.findall(r"```yaml\n(.*?)```", (schema.BOOK / "reference/reproduce.md").read_text(), re.DOTALL)
    (tmp_path / "sweeps/x.yml").write_text(example)
    monkeypatch.setattr(schema, "BOOK", tmp_path)
    runs = list(sweep_table.read_sweep("x").runs.values())
    assert len(runs) == 8 and runs[-1].label == "half_mass=4.0, steps=60, train_length=16, longest=64, seeds=[14, 15, 16]"


@pytest.fixture
def book(tmp_path, request):
    """A small book with room for sweeps; nothing of it has run yet."""
    checkout = Checkout(tmp_path / "book of {runs}")  # a space, as in many a person's folder, and what Snakemake would fill
    if "slurm" not in request.fixturenames:
        (checkout.folder / ".venv").symlink_to(sys.prefix)
    (checkout.folder / "book/sweeps").mkdir()
    return checkout


def write(checkout, name: str, text: str) -> None:
    (checkout.folder / "book/sweeps" / name).write_text(text)


def notebooks(checkout, name: str) -> dict[str, bytes]:
    """Every run of a sweep that is there, whole or not."""
    return {path.parent.name: path.read_bytes() for path in (checkout.folder / "_build/sweeps" / name).glob("*/run.ipynb")}


def read_table(checkout, name: str) -> pandas.DataFrame:
    return pandas.read_parquet(checkout.folder / f"_build/sweeps/{name}.parquet")


@kernel
def test_nothing_starts_for_a_table_that_is_refused(book):
    write(book, "x.yml", FIRST + "rows: t.csv\n")
    write(book, "t.csv", "count\n3\n3.5\n")
    code, output = book.book("sweep", "x")
    assert code == 1 and output.startswith("nsm-book: book/sweeps/x.yml: t.csv: line 3: ") and output.count("\n") == 1
    assert not (book.folder / "_build").exists()
    write(book, "t.csv", "count\n3\n")
    code, output = book.book("sweep", "x", "--profile-dir", "profiles/slurm")
    assert code == 1 and "no job on a cluster can begin" in output and not (book.folder / "_build").exists(), output


@kernel
def test_a_sweep_equals_single_runs_and_later_rows_run_alone(book, tmp_path):
    write(book, "x.yml", "page: group/first\nprofile: quick\ngrid: {count: [3, 4], scale: [1, -2.5]}\n")
    code, output = book.book("sweep", "x", "--jobs", "2")
    assert code == 0 and "4 of 4 runs to do, on 2 cores at a time" in output and "[4/4] count=" in output, output
    assert "sweep x: 4 runs, all done" in output
    first, found = notebooks(book, "x"), read_table(book, "x")
    assert len(first) == 4 and list(found.status) == ["done"] * 4
    assert list(found["values.mean"]) == [2.0, -5.0, 2.5, -6.25] and list(found["parameters.count"]) == [3, 3, 4, 4]
    assert list(found["values.positive_verdict"]) == ["supported", "refuted"] * 2
    assert found.seconds.gt(0).all() and found.peak_memory_mb.between(30, 1000).all()

    assert (
        book.book("run", "group/first", "--profile", "quick", "-p", "count", "3", "-p", "scale", "-2.5", "-o", str(tmp_path))[0]
        == 0
    )
    (single,) = json.loads((tmp_path / "group-first/quick,count=3,scale=-2.5/results.json").read_text())
    row = found.iloc[1]
    assert {key: entry["value"] for key, entry in single["values"].items()} == {
        name.removeprefix("values."): row[name] for name in found if name.startswith("values.")
    }
    assert single["reproduce"] == "nsm-book run group/first --profile quick -p count 3 -p scale -2.5 -o runs"
    (record,) = json.loads((book.folder / f"_build/sweeps/x/{row.run}/results.json").read_text())
    clock = ("seconds", "peak_memory_mb", "date", "digest", "checksum")
    assert {k: v for k, v in record.items() if k not in clock} == {k: v for k, v in single.items() if k not in clock}

    before = (book.folder / "_build/sweeps/x.parquet").read_bytes()
    code, output = book.book("sweep", "x")
    assert code == 0 and "to do" not in output and (book.folder / "_build/sweeps/x.parquet").read_bytes() == before
    write(book, "x.yml", "page: group/first\nprofile: quick\ngrid: {count: [3, 4, 5], scale: [1, -2.5]}\n")
    code, output = book.book("sweep", "x")
    assert code == 0 and "2 of 6 runs to do" in output, output
    assert first.items() <= notebooks(book, "x").items() and len(read_table(book, "x")) == 6


@kernel
def test_a_failed_run_is_named_and_stops_no_other(book):
    harm = (
        "\nif count == 13:\n    raise OSError('unlucky')\nif count == 14:\n    import os, signal\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\nmean = "
    )
    book.edit("book/group/first.md", "\nmean = ", harm)
    write(book, "x.yml", FIRST + "profile: quick\nrows: t.csv\n")
    write(book, "t.csv", "count\n13\n3\n14\n4\n")
    code, output = book.book("sweep", "x", "--jobs", "2")
    assert code == 1 and "2 of 4 runs failed" in output and "OSError: unlucky" in output
    assert "count=13 (" in output and "count=14 (" in output and "kernel died" in output and "count=3 (" not in output
    found = read_table(book, "x")
    assert list(found.status) == ["failed", "done", "failed", "done"] and list(found["parameters.count"]) == [13, 3, 14, 4]
    assert found["values.mean"].isna().tolist() == [True, False, True, False]
    whole = notebooks(book, "x")
    assert len(whole) == 2
    code, output = book.book("sweep", "x")  # what failed is tried again, and nothing else
    assert code == 1 and "2 of 4 runs to do" in output and notebooks(book, "x") == whole
    book.edit("book/group/first.md", harm, "\nmean = ")
    code, output = book.book("sweep", "x")
    assert code == 0 and "4 of 4 runs to do" in output  # the page is another one now
    assert list(read_table(book, "x").status) == ["done"] * 4


def kill_everything(process) -> None:
    """kill -9 of the sweep, of Snakemake, of the steps and of the kernels."""
    import psutil

    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        member.send_signal(signal.SIGKILL)
    process.wait()


@kernel
def test_a_killed_sweep_goes_on_and_repeats_no_whole_run(book):
    ran = book.folder / "ran"
    book.edit(
        "book/group/first.md",
        "\nmean = ",
        f"\nfrom pathlib import Path\nwith Path({str(ran)!r}).open('a') as file:\n    print(seed, file=file)\nmean = ",
    )
    write(book, "x.yml", f"page: group/first\nprofile: quick\nseeds: {list(range(16))}\n")
    process = book.start("sweep", "x", "--jobs", "1")  # 8 steps of 2 runs
    deadline = time.time() + 120
    while len(list((book.folder / "_build/sweeps/x").glob("*/results.json"))) < 7:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    kill_everything(process)
    whole = {name: text for name, text in notebooks(book, "x").items()}
    assert 7 <= len(whole) < 16 and not (book.folder / "_build/sweeps/x.parquet").exists()
    code, output = book.book("sweep", "x", "--jobs", "2")
    assert code == 0 and " of 16 runs to do" in output, output
    assert whole.items() <= notebooks(book, "x").items()
    begun = ran.read_text().split()
    assert len(begun) <= 17 and set(begun) == {str(seed) for seed in range(16)}  # one, at most, was cut short
    assert len(read_table(book, "x")) == 16
    assert not [path for path in (book.folder / "_build/sweeps").rglob(".*") if path.is_dir()]


@kernel
def test_a_damaged_run_is_made_again_and_no_other(book):
    write(book, "007.yml", "page: group/first\nprofile: quick\ngrid: {count: [3, 4, 5]}\n")
    assert book.book("sweep", "007")[0] == 0
    whole, names = notebooks(book, "007"), list(read_table(book, "007").run)
    folder = book.folder / "_build/sweeps/007"
    path = folder / names[0] / "run.ipynb"
    path.write_bytes(path.read_bytes()[:1000])
    (folder / names[1] / "numbers.txt").write_text("1")
    (folder / names[2] / "results.json").write_text("[{}]")
    (book.folder / "_build/sweeps/007.parquet").write_bytes(b"PAR1")
    code, output = book.book("sweep", "007")
    assert code == 0 and "3 of 3 runs to do" in output, output
    after = notebooks(book, "007")
    assert after[names[0]] != whole[names[0]] and after[names[1]] != whole[names[1]] and after[names[2]] == whole[names[2]]
    assert list(read_table(book, "007")["values.mean"]) == [2.0, 2.5, 3.0]
    assert (folder / names[1] / "numbers.txt").read_text().startswith("1.000000,2.000000")


@kernel
def test_the_pages_that_a_sweep_needs_run_first_and_again(book):
    write(book, "x.yml", "page: group/second\nprofile: quick\ngrid: {power: [1, 2]}\n")
    code, output = book.book("sweep", "x")
    assert code == 0 and "[1/3] group/first: " in output, output
    assert list(read_table(book, "x")["values.total"]) == [6, 14]
    before = notebooks(book, "x")
    book.edit("book/group/first.md", "It draws numbers.", "It draws some numbers.")
    code, output = book.book("sweep", "x")  # the page makes the same file again: no run of the sweep is repeated
    assert code == 0 and "group/first: " in output and notebooks(book, "x") == before, output
    book.edit("book/params/quick.yml", "count: 5", "count: 5, scale: 2.0")
    code, output = book.book("sweep", "x")
    assert code == 0 and list(read_table(book, "x")["values.total"]) == [12, 56], output
    book.edit("book/group/first.md", "\nmean = ", "\nraise OSError('broken')\nmean = ")
    code, output = book.book("sweep", "x")
    assert code == 1 and "OSError: broken" in output and "needs group/first; its table was left as it was" in output, output
    assert list(read_table(book, "x")["values.total"]) == [12, 56]


@kernel
def test_a_sweep_waits_for_another_and_a_build_for_both(book):
    book.edit("book/group/first.md", "\nmean = ", "\nimport time\ntime.sleep(2)\nmean = ")
    write(book, "x.yml", "page: group/first\nprofile: quick\nseeds: [1, 2]\n")
    one = book.start("sweep", "x", "--jobs", "1")
    lock = book.folder / "_build/build.lock"
    while not lock.exists() or f"process {one.pid} " not in lock.read_text():
        assert one.poll() is None
        time.sleep(0.05)
    others = [book.start("sweep", "x"), book.start("build")]
    said = [process.communicate(timeout=200)[0] for process in (one, *others)]
    assert [process.returncode for process in (one, *others)] == [0, 0, 0], said
    assert "2 of 2 runs to do" in said[0] and "to do" not in said[1]
    assert all(f"process {one.pid} " in text and "waiting for it to end" in text for text in said[1:])


@kernel
@pytest.mark.slurm
@pytest.mark.xdist_group("slurm")
def test_a_sweep_runs_as_jobs_of_a_real_slurm(book, slurm):
    write(book, "x.yml", "page: group/second\nprofile: quick\ngrid: {power: [1, 2]}\n")
    code, output = book.book("sweep", "x", "--jobs", "4", "--profile-dir", str(book.folder / "profiles/slurm"))
    assert code == 0 and "sweep x: 2 runs, all done" in output, output
    assert list(read_table(book, "x")["values.total"]) == [6, 14]
    jobs = subprocess.run(["scontrol", "show", "job", "--oneliner"], capture_output=True, text=True, check=True).stdout
    assert jobs.count("JobState=COMPLETED") == 3  # the page that is needed, and two runs
    assert jobs.count("TimeLimit=00:02:00") == 3  # a budget of ten seconds, three times, and a minute to begin
    assert jobs.count("MinMemoryNode=500M") == jobs.count("NumCPUs=1 ") == 3
    code, output = book.book("sweep", "x", "--jobs", "4", "--profile-dir", str(book.folder / "profiles/slurm"))
    assert code == 0 and "to do" not in output


@kernel
@pytest.mark.slurm
@pytest.mark.xdist_group("slurm")
def test_a_job_of_slurm_that_is_killed_is_named_and_costs_no_other_run(book, slurm):
    """kill -9 of one of two jobs, by Slurm's own hand."""
    ran = book.folder / "ran"
    book.edit(
        "book/group/first.md",
        "\nmean = ",
        f"\nimport os\nimport time\nwith open({str(ran)!r}, 'a') as file:\n"
        "    print(count, os.environ['SLURM_JOB_ID'], file=file)\n"
        f"time.sleep(60 if count == 4 and open({str(ran)!r}).read().count('4 ') == 1 else 0)\nmean = ",
    )
    write(book, "x.yml", "page: group/first\nprofile: quick\ngrid: {count: [3, 4]}\n")
    words = ("sweep", "x", "--jobs", "2", "--profile-dir", str(book.folder / "profiles/slurm"))
    process, deadline = book.start(*words), time.time() + 60
    while not ran.exists() or "4 " not in ran.read_text() or len(notebooks(book, "x")) < 1:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.1)
    (job,) = [line.split()[1] for line in ran.read_text().splitlines() if line.startswith("4 ")]
    subprocess.run(["scancel", "--signal=KILL", "--full", job], check=True)
    output, _ = process.communicate(timeout=120)
    whole = notebooks(book, "x")
    assert process.returncode == 1 and "count=4 (" in output and "1 of 2 runs failed" in output and len(whole) == 1, output
    assert "its process or job ended without a word" in output and "Snakefile:" not in output, output
    code, output = book.book(*words)
    assert code == 0 and "1 of 2 runs to do" in output, output
    assert whole.items() <= notebooks(book, "x").items() and ran.read_text().count("3 ") == 1
