"""Run what is missing of a sweep, a few runs in a step of Snakemake's, and collect all of it into one table."""

import contextlib
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

from nsm_book import BookError, build, collect
from nsm_book.execute import run_into
from nsm_book.fingerprint import checksum, digest, files, fingerprint, stale_makers
from nsm_book.schema import BUILD, check_parameters, page, pages, parameters, unknown
from nsm_book.series import COSTS
from nsm_book.sweep_table import FACTS, Sweep, SweepRun, read_sweep, sweep_folder

STEP_SECONDS = 8.0, 60.0  # what a step takes at least, for it needs more than one to start; and at most, if no run takes longer
SHORT = 3.0  # seconds: a run that takes less waits for much of them, for its kernel to start and to end
TOLD = 10  # failed runs that are told with their reasons; all the others are counted
SEEN_LATE = 60.0  # seconds that a file which a node of a cluster wrote may take to be seen here
ROUNDS = 8  # steps for each job, unless they would be too short: so that all jobs end at about the same time


def finished(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """The records of the runs that are whole and today's, by id."""
    today, found = fingerprint(sweep.page, sweep.profile, {}), {}
    for run in sweep.runs.values():
        place = sweep.folder / run.id
        try:
            (record,) = json.loads((place / "results.json").read_text())
            whole = {"run.ipynb": record["digest"], **record["made"]}
            given = {"parameters": json.loads(json.dumps(run.parameters)), "files": files(run.parameters)}
            if (
                record["fingerprint"] == {**today, **given}
                and record["checksum"] == checksum(record)
                and all(digest(place / name) == printed for name, printed in whole.items())
            ):
                found[run.id] = record
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not whole
    return found


def write_plan(sweep: Sweep, todo: list[SweepRun], seconds: float, jobs: int) -> dict[str, Any]:
    """Write down what Snakemake has to do: steps of a few runs each, of that many seconds a run; and return it."""
    least, most = (int(limit / max(seconds, 1e-3)) for limit in STEP_SECONDS)
    size = max(1, min(most, -(-len(todo) // jobs), max(least, len(todo) // (ROUNDS * jobs))))
    slices = [todo[start : start + size] for start in range(0, len(todo), size)]
    plan = {
        "page": sweep.page.name,
        "profile": sweep.profile,
        "at_once": 2 if seconds < SHORT and size > 1 and jobs > 1 else 1,
        "steps": {f"{part[0].id}-{len(part)}": [run._asdict() for run in part] for part in slices},
    }
    shutil.rmtree(sweep.folder / "steps", ignore_errors=True)
    with collect.whole(sweep.folder / "plan.json") as path:
        path.write_text(json.dumps(plan))
    return plan


def read_plan(name: str) -> dict[str, Any]:
    """What `write_plan` wrote down."""
    return json.loads((sweep_folder(name) / "plan.json").read_text())


def run_step(name: str, step: str) -> None:
    """Do the runs of one step, each in a process of its own that has papermill loaded already: one after the other, or, if
    they are short, two at once, so that one works while the other waits.

    Raises:
        BookError: if one of them failed, after all others have run.
    """
    import grimp  # noqa: F401  loaded here, once for all runs
    import jupytext  # noqa: F401
    import papermill  # noqa: F401

    plan, failed, running = read_plan(name), [], []

    def end_first() -> None:
        what, process = running.pop(0)
        process.join()
        if process.exitcode:
            failed.append(what)
        if process.exitcode < 0:
            with contextlib.suppress(OSError):  # a full disk must not keep the others from running
                build.note_state(plan["profile"], what, "failed", f"its process was killed by signal {-process.exitcode}")

    for entry in plan["steps"].get(step, ()):
        if len(running) == plan["at_once"]:
            end_first()
        what = _what(plan["page"], entry["id"])
        process = multiprocessing.get_context("fork").Process(target=_one_run, args=(name, plan, entry, what))
        process.start()
        running.append((what, process))
    while running:
        end_first()
    if failed:
        raise BookError(f"failed: {', '.join(failed)}")


def _one_run(name: str, plan: dict[str, Any], entry: dict[str, Any], what: str) -> None:
    def work() -> str:
        about = page(plan["page"])
        run_into(sweep_folder(name) / entry["id"], about, plan["profile"], check_parameters(about, entry["parameters"]))
        return f"{entry['label'] or 'defaults'}: done"

    try:
        build.told(plan["profile"], what, work)
    except BookError as error:
        print(error, file=sys.stderr)
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
        rows.append(
            {
                "run": run.id,
                "page": sweep.page.name,
                "profile": sweep.profile,
                "status": "done" if record else "failed",
                **{fact: record.get(fact) for fact in FACTS},
                **{f"parameters.{name}": value for name, value in (defaults | run.parameters).items()},
                **{f"values.{key}": values.get(key, {}).get("value") for key in keys},
            }
        )
    columns = {name: _column([row[name] for row in rows]) for name in rows[0]}
    with collect.whole(sweep.table) as path:
        pyarrow.parquet.write_table(pyarrow.table(columns), path, write_page_checksum=True)


def _column(values: list) -> list:
    """Values that one column can hold: text if one of them is text, else numbers of one kind."""
    kinds = {type(value) for value in values} - {type(None)}
    if len(kinds) < 2:
        return values
    one = str if str in kinds else float
    return [None if value is None else one(value) for value in values]


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
    with build.only_build(console) as lock:
        before, first = finished(sweep), [maker.name for maker in stale_makers(sweep.page, sweep.profile)]
        # What a page that has to run again makes may be another file: then every run looks for itself.
        todo = [run for run in sweep.runs.values() if first or run.id not in before]
        code, states = 0, {}
        # Those that began and did not end come last: one that hangs, and ends its whole job, keeps no other from running.
        todo.sort(key=lambda run: (sweep.folder / run.id).exists())
        if todo:
            for left in [path for run in todo for path in (sweep.folder / run.id).glob(".*")]:  # of a run that was killed
                left.unlink() if left.is_file() else shutil.rmtree(left, ignore_errors=True)
            took, known = [record["seconds"] for record in before.values()], build.known_seconds(sweep.profile)
            seconds = statistics.median(took) if took else known.get(sweep.page.name, sweep.page.budget[sweep.profile])
            plan = write_plan(sweep, todo, seconds, jobs)
            expected = {maker: known.get(maker, pages()[maker].budget[sweep.profile]) for maker in first}
            expected |= {_what(sweep.page.name, run.id): seconds for run in todo}
            console.print(
                f"{len(todo)} of {len(sweep.runs)} runs to do, {'at most' if profile_dir else 'on'} {jobs} "
                f"{'jobs' if profile_dir else 'cores'} at a time",
                highlight=False,
            )
            where = (
                ["--profile", str(profile_dir.resolve()), "--jobs", str(jobs)]
                if profile_dir
                else ["--cores", str(jobs), *build.room()]
            )
            words = ["sweep", *where, "--config", f"profile={sweep.profile}", f"plan=_build/sweeps/{name}/plan.json"]
            wide = (jobs if profile_dir else max(1, jobs // sweep.page.cores)) * plan["at_once"]
            code = build.snakemake(words, sweep.profile, expected, jobs, console, lock=lock, log=log, runs_at_once=wide)
            states = build.read_states(sweep.profile)
        why = build.failures(code, states)
        told = [message for what, message in why.items() if " " not in what]
        if code:
            told += build.last_words(code, log, list(why.values()))
        behind = [maker.name for maker in stale_makers(sweep.page, sweep.profile)] if first else []
        unbegun = code < 0 or (code > 0 and not any(_what(sweep.page.name, run.id) in states for run in todo))
        if behind or unbegun:
            needs = f"needs {', '.join(behind)}; " if behind else ""
            told.append(f"sweep {name}: {needs}its table was left as it was. Snakemake's own log: {log}")
            raise BookError("\n\n".join(told))
        records, until = finished(sweep), time.monotonic() + SEEN_LATE
        while (
            profile_dir
            and time.monotonic() < until
            and any(
                run not in records and (not code or states.get(_what(sweep.page.name, run), {}).get("state") == "done")
                for run in sweep.runs
            )
        ):
            time.sleep(1)  # these runs ended well, so their files will be seen
            records, states = finished(sweep), build.read_states(sweep.profile)
            why = build.failures(code, states)
        collect_table(sweep, records)
    failed = [run for run in sweep.runs.values() if run.id not in records]
    for run in failed[:TOLD]:
        reason = why.get(_what(sweep.page.name, run.id), "it did not end, or its page changed meanwhile")
        told.append(f"{run.label or 'defaults'} ({run.id}): {reason}")
    if len(failed) > TOLD:
        told.append(f"and {len(failed) - TOLD} more")
    if failed:
        raise BookError(
            "\n\n".join(
                [
                    *told,
                    f"sweep {name}: {len(failed)} of {len(sweep.runs)} runs failed; "
                    f"{sweep.table} holds the others. Snakemake's own log: {log}",
                ]
            )
        )
    keys = [*dict.fromkeys(key for record in records.values() for key in record["values"]), *COSTS]
    if sweep.measure is not None and sweep.measure not in keys:
        raise BookError(f"sweep {name}: all runs are done, but {unknown('measure', sweep.measure, keys)}")
    return f"sweep {name}: {len(sweep.runs)} runs, all done: {sweep.table}"


def _what(page: str, id: str) -> str:
    """What the build that watches calls a run."""
    return f"{page} {id}"
