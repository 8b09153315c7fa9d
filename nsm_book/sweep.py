"""Run what is missing of a sweep, a few runs in a step of Snakemake's, and collect all of it into one table."""

import json
import multiprocessing
import shlex
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from nsm_book import BookError, workflow
from nsm_book.fingerprint import differences, digest, digest_of, files, fingerprint, stale_makers
from nsm_book.run import DONE, only_run, reasons_kept, run_into, whole
from nsm_book.schema import BUILD, Page, check_parameters, page, parameters, unknown
from nsm_book.sweep_table import FACTS, Sweep, SweepRun, read_sweep, sweep_folder

STEP_SECONDS = 8.0, 60.0  # what a step takes at least, for it needs more than one to start; and at most, if no run takes longer
SHORT = 3.0  # seconds: a run that takes less waits for much of them, for its kernel to start and to end
SHOWN = 10  # failed runs whose reasons are shown; all the others are counted
SEEN_LATE = 60.0  # seconds that a file which a node of a cluster wrote may take to be seen here
ROUNDS = 8  # steps for each job, unless they would be too short: so that all jobs end at about the same time


def finished(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """The records of the runs that are whole and today's, by id."""
    today, found = fingerprint(sweep.page, sweep.profile, {}), {}
    for run in sweep.runs.values():
        place = sweep.folder / run.id
        try:
            (record,) = json.loads((place / "results.json").read_text())
            checksum = record.pop("checksum")
            written = {"run.ipynb": record["digest"], **record["made"]}
            given = {"parameters": json.loads(json.dumps(run.parameters)), "files": files(run.parameters)}
            if (
                record["fingerprint"] == {**today, **given}
                and checksum == digest_of(record)
                and all(digest(place / name) == value for name, value in written.items())
            ):
                found[run.id] = record
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not whole
    return found


def write_plan(sweep: Sweep, todo: list[SweepRun], seconds: float, jobs: int) -> dict[str, Any]:
    """Write down what Snakemake has to do: steps of a few runs each, of that many seconds a run; and return it."""
    least, most = (int(limit / max(seconds, 1e-3)) for limit in STEP_SECONDS)
    size = max(1, min(most, -(-len(todo) // jobs), max(least, len(todo) // (ROUNDS * jobs))))
    parts = [todo[start : start + size] for start in range(0, len(todo), size)]
    at_once = 2 if seconds < SHORT and size > 1 and jobs > 1 else 1
    steps = {f"{part[0].id}-{len(part)}": [[run.id, run.label, run.parameters] for run in part] for part in parts}
    plan = {"page": sweep.page.name, "profile": sweep.profile, "at_once": at_once, "steps": steps}
    shutil.rmtree(sweep.folder / "steps", ignore_errors=True)
    with whole(sweep.folder / "plan.json") as path:
        path.write_text(json.dumps(plan))
    return plan


def read_plan(name: str) -> dict[str, Any]:
    """What `write_plan` wrote down."""
    return json.loads((sweep_folder(name) / "plan.json").read_text())


def run_step(name: str, step: str) -> None:
    """Make the runs of one step, each in a process of its own that has papermill loaded already: one after the other, or, if
    they are short, two at once, so that one works while the other waits.

    Raises:
        BookError: if one of them failed, after all others have run.
    """
    import grimp  # noqa: F401  loaded here, once for all runs
    import jupytext  # noqa: F401
    import papermill  # noqa: F401

    plan, failed = read_plan(name), []
    running: list[tuple[str, Any]] = []

    def end_first() -> None:
        id, process = running.pop(0)
        process.join()
        if process.exitcode:
            failed.append(id)

    for id, label, given in plan["steps"].get(step, ()):
        if len(running) == plan["at_once"]:
            end_first()
        process = multiprocessing.get_context("fork").Process(target=_make_run, args=(name, plan, id, label, given))
        process.start()
        running.append((id, process))
    while running:
        end_first()
    if failed:
        raise BookError(f"failed: {', '.join(failed)}")


def _make_run(name: str, plan: dict[str, Any], id: str, label: str, given: dict[str, Any]) -> None:
    about, place, began = page(plan["page"]), sweep_folder(name) / id, time.perf_counter()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with only_run(place), reasons_kept(place / "run.ipynb"):
            run_into(place, about, plan["profile"], check_parameters(about, given))
        print(f"{DONE}{label or 'defaults'}: {time.perf_counter() - began:.1f} s", flush=True)
    except BookError as error:
        print(f"{DONE}{label or 'defaults'}: FAILED\n{error}", flush=True)
        sys.exit(1)


def collect_table(sweep: Sweep, records: dict[str, dict[str, Any]]) -> None:
    """Write one row for each run of the sweep, in the order of its table.

    Columns: `run`, `page`, `profile`, `status` (`done` or `failed`), `seconds`, `peak_memory_mb`, `device`, `commit`, `date`;
    `parameters.NAME` for every parameter of the page; `values.KEY` for everything that a run glued, null where it did not.
    """
    import pyarrow
    import pyarrow.parquet

    defaults = {name: p.default for name, p in parameters(sweep.page).items()}
    keys = dict.fromkeys(key for record in records.values() for key in record["values"])
    rows = []
    for run in sweep.runs.values():
        record = records.get(run.id, {})
        values = record.get("values", {})
        about: dict[str, Any] = {
            "run": run.id,
            "page": sweep.page.name,
            "profile": sweep.profile,
            "status": "done" if record else "failed",
        }
        about |= {fact: record.get(fact) for fact in FACTS}
        about |= {f"parameters.{name}": value for name, value in (defaults | run.parameters).items()}
        rows.append(about | {f"values.{key}": values.get(key, {}).get("value") for key in keys})
    columns = {name: _column([row[name] for row in rows]) for name in rows[0]}
    with whole(sweep.table) as path:
        pyarrow.parquet.write_table(pyarrow.table(columns), path, write_page_checksum=True)


def _column(values: list) -> list:
    """Values that one column can hold: text if one of them is text, else numbers of one kind."""
    kinds = {type(value) for value in values} - {type(None)}
    if len(kinds) < 2:
        return values
    kind = str if str in kinds else float
    return [None if value is None else kind(value) for value in values]


def run(name: str, jobs: int, profile_dir: Path | None, console: Console) -> str:
    """Run what is missing of a sweep and collect it; return a line that says what there is now.

    Args:
        jobs: cores of this machine for the runs, or jobs at once of the profile.
        profile_dir: a Snakemake profile that says where they run; None for this machine.

    Raises:
        BookError: for a path that no cluster takes, or naming the runs that failed. All others are finished, and the table
            says which are. If a page failed that the sweep takes files from, if no run began, or if Snakemake was killed, the
            table is as it was.
    """
    sweep = read_sweep(name)
    if profile_dir and shlex.quote(sys.executable) != sys.executable:
        raise BookError(
            f"{sys.executable}: with such a path no job on a cluster can begin: Snakemake writes it on a command "
            "line without quotes. Accepts letters, digits and @%+=:,./-_"
        )
    log = BUILD / "log" / f"sweep-{name}.txt"
    reasons: list[str] = []
    with workflow.only_build(console) as lock:
        records = finished(sweep)
        waiting_for = stale_makers(sweep.page, sweep.profile)
        # What a page that has to run again makes may be another file: then every run looks for itself.
        todo = [run for run in sweep.runs.values() if waiting_for or run.id not in records]
        if todo:
            progression = workflow.expectation(sweep.profile, jobs)
            expected = progression.expected[workflow.rule_name(sweep.page)]
            seconds = statistics.median([record["seconds"] for record in records.values()] or [expected])
            where, cores = ("at most", "jobs") if profile_dir else ("on", "cores")
            console.print(f"{len(todo)} of {len(sweep.runs)} runs to do, {where} {jobs} {cores} at a time", highlight=False)
            words = _prepare(sweep, todo, seconds, jobs, profile_dir)
            code = workflow.snakemake(words, waiting_for, progression, console, lock, log, workflow.RunCount(len(todo)))
            reasons = _what_went_wrong(sweep, todo, waiting_for, progression.failed, code, log)
            records = _records_after(sweep, wait=bool(profile_dir))
        collect_table(sweep, records)
    return _summary(sweep, records, reasons, log)


def _prepare(sweep: Sweep, todo: list[SweepRun], seconds: float, jobs: int, profile_dir: Path | None) -> list[str]:
    """Write the plan for the runs that are missing, and return the words that Snakemake is given."""
    # Those that began and did not end come last: one that hangs, and ends its whole job, keeps no other from running.
    todo.sort(key=lambda run: (sweep.folder / run.id).exists())
    for run in todo:
        (sweep.folder / run.id / "run.failed.txt").unlink(missing_ok=True)
    write_plan(sweep, todo, seconds, jobs)
    local = ["--cores", str(jobs), *workflow.memory_of_machine()]
    place = ["--profile", str(profile_dir.resolve()), "--jobs", str(jobs)] if profile_dir else local
    return ["sweep", *place, "--config", f"profile={sweep.profile}", f"plan=_build/sweeps/{sweep.name}/plan.json"]


def _what_went_wrong(
    sweep: Sweep, todo: list[SweepRun], waiting_for: list[Page], rules_failed: list[str], code: int, log: Path
) -> list[str]:
    """What there is to say once Snakemake has ended, besides the runs that failed.

    Raises:
        BookError: if the table has to stay as it was.
    """
    pages_failed = [page for page in waiting_for if workflow.rule_name(page) in rules_failed]
    reasons = [workflow.failure(page.run_file(sweep.profile), page.name) for page in pages_failed]
    began = any((sweep.folder / run.id).exists() for run in todo)
    if code:
        reasons += workflow.why_it_ended(code, log, reasons or (["runs failed"] if began else []))
    behind = [page.name for page in waiting_for if differences(page, sweep.profile)]
    if behind or code < 0 or (code and not began):
        needs = f"needs {', '.join(behind)}; " if behind else ""
        ending = f"sweep {sweep.name}: {needs}its table was left as it was. Snakemake's own log: {log}"
        raise BookError("\n\n".join([*reasons, ending]))
    return reasons


def _summary(sweep: Sweep, records: dict[str, dict[str, Any]], reasons: list[str], log: Path) -> str:
    """The line that says what there is now, or a BookError that names the runs that failed."""
    failed = [run for run in sweep.runs.values() if run.id not in records]
    for run in failed[:SHOWN]:
        reason = workflow.failure(sweep.folder / run.id / "run.ipynb", "it did not end, or its page changed meanwhile")
        reasons.append(f"{run.label or 'defaults'} ({run.id}): {reason}")
    if len(failed) > SHOWN:
        reasons.append(f"and {len(failed) - SHOWN} more")
    if failed:
        ending = f"{sweep.table} holds the others. Snakemake's own log: {log}"
        reasons.append(f"sweep {sweep.name}: {len(failed)} of {len(sweep.runs)} runs failed; {ending}")
        raise BookError("\n\n".join(reasons))
    keys = [*dict.fromkeys(key for record in records.values() for key in record["values"]), "seconds", "peak_memory_mb"]
    if sweep.measure is not None and sweep.measure not in keys:
        raise BookError(f"sweep {sweep.name}: all runs are done, but {unknown('measure', sweep.measure, keys)}")
    return f"sweep {sweep.name}: {len(sweep.runs)} runs, all done: {sweep.table}"


def _records_after(sweep: Sweep, wait: bool) -> dict[str, dict[str, Any]]:
    """The records of the finished runs. What a node of a cluster wrote may be seen late: a run of a step that ended well is
    waited for, and for a while one that gave no reason why it should have failed."""
    records, began = finished(sweep), time.monotonic()
    steps = read_plan(sweep.name)["steps"] if wait else {}

    def late() -> bool:
        waited = time.monotonic() - began
        for step, runs in steps.items():
            ended_well = (sweep.folder / "steps" / step).exists()
            for id, *_ in runs:
                silent = (sweep.folder / id).exists() and not (sweep.folder / id / "run.failed.txt").exists()
                if id not in records and waited < (SEEN_LATE if ended_well else SEEN_LATE / 6 if silent else 0):
                    return True
        return False

    while late():
        time.sleep(1)
        records = finished(sweep)
    return records
