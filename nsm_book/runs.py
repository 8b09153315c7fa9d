"""`results/runs`: every page and every run of a sweep: how long, how much memory, on what, and whether it came out again."""

import json
from pathlib import Path
from typing import Any

from nsm_book.fingerprint import digest
from nsm_book.markup import Cell, folded, number, raw, table
from nsm_book.schema import BUILD, page
from nsm_book.series import told_apart, value_of
from nsm_book.swept import MOST_RUNS, Swept, read_all, software

HEAD = ("profile", "seconds", "of its budget", "peak memory, MB", "device", "commit", "date")


def rerun_record(profile: str) -> Path:
    """Where `make test` leaves what running the pages again has found."""
    return BUILD / "nbval" / f"{profile}.json"


def read_reruns(profile: str) -> dict[str, dict[str, Any]]:
    """What is left there: page → digest of the run, whether all numbers came again, in how many cells; empty without it."""
    try:
        return dict(json.loads(rerun_record(profile).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def came_again(profile: str) -> dict[str, str]:
    """For each page that was run again since its last run, whether it found the same numbers, in words."""
    told = {}
    for name, entry in read_reruns(profile).items():
        if digest(BUILD / "runs" / profile / f"{name}.ipynb") == entry["digest"]:
            told[name] = f"same, {entry['cells']} cells" if entry["same"] else "OTHER NUMBERS"
    return told


def facts(name: str, profile: str, run: dict[str, Any]) -> list[str]:
    """What is told of every run, in the order of `HEAD`; dashes for one that failed."""
    seconds, memory = run["seconds"], run["peak_memory_mb"]
    share = "–" if seconds is None else f"{seconds / page(name).budget[profile]:.0%}"
    return [
        profile,
        "–" if seconds is None else f"{seconds:.1f}",
        share,
        "–" if memory is None else f"{memory:,.0f}",
        *(str(run[fact] or "–") for fact in ("device", "commit", "date")),
    ]


def differing(runs: list[dict[str, str]]) -> list[str]:
    """The names whose versions are not the same in all runs, sorted. A run without versions, which failed, does not count."""
    known = [run for run in runs if run]
    return [name for name in sorted({name for run in known for name in run}) if len({run.get(name) for run in known}) > 1]


def versions_told(run: dict[str, str], names: list[str]) -> str:
    return ", ".join(f"{name} {run[name]}" for name in names if name in run) or "–"


def sweep_part(swept: Swept, names: list[str]) -> list[str]:
    """The runs of one sweep, folded, unless there are too many to show each."""
    rows, names_given = [], told_apart(swept.rows)
    for row in swept.rows if not swept.large else ():
        given = ", ".join(f"{name} = {value_of(row, name)}" for name in names_given)
        state = row.status if row.today or row.status != "done" else "done, by an earlier version of the page"
        rows.append(
            [
                Cell(row.id, swept.notebook(row)),
                state,
                given,
                *facts(row.page, row.profile, row.facts),
                *([versions_told(row.versions, names)] if names else []),
            ]
        )
    head = ["run", "status", "parameters", *HEAD, *(["versions that differ"] if names else [])]
    took = sum(row.facts["seconds"] or 0 for row in swept.rows)
    done = sum(row.status == "done" for row in swept.rows)
    body = table(head, rows, f"Runs of the sweep {swept.name}")
    every = (
        raw(folded(f"All {len(rows)} runs", body))
        if rows
        else f"These are more than {MOST_RUNS} runs; all lie in `_build/sweeps/{swept.name}.parquet`."
    )
    return [
        f"## The sweep `{swept.name}`",
        "",
        f"{done} of {len(swept.rows)} runs of [](../{swept.page.name}.md) are done, in {number(round(took))} s of all "
        "kernels together. [](compare.md) draws them.",
        "",
        every,
        "",
    ]


def runs_page(profile: str, records: dict[str, dict[str, Any]], order: list[str]) -> str:
    """The text of the page.

    Args:
        records: what `nsm_book.collect` read of each page, by its name.
        order: all pages as the reader finds them.
    """
    sweeps, again = read_all(), came_again(profile)
    mine = {name: software(records[name]) for name in order if name in records}
    everything = [*mine.values(), *(row.versions for swept in sweeps for row in swept.rows)]
    names = differing(everything)
    alike = {name: version for run in everything for name, version in run.items() if name not in names}
    rows = []
    for name in mine:
        versions = [versions_told(mine[name], names)] if names else []
        rows.append(
            [Cell(name, f"../{name}.html"), again.get(name, "not re-run"), *facts(name, profile, records[name]), *versions]
        )
    head = ["page", "run again", *HEAD, *(["versions that differ"] if names else [])]
    took = sum(records[name]["seconds"] for name in mine)
    lines = [
        "# What ran, and what it took",
        "",
        f"The {len(mine)} pages of this book took {number(round(took))} s in sum; a build runs them side by side. A "
        "commit with a + behind it had uncommitted changes. Memory is that of a run's largest process.",
        "",
        "*Run again* tells what `make test` found when it ran a page a second time: whether every number that does not "
        "depend on timing was the same. A page that has run since, or was never run again, says so.",
        "",
        raw(table(head, rows, "Runs of the pages")),
        "",
        "All runs had " + ", ".join(f"{name} {version}" for name, version in sorted(alike.items())) + ".",
        "",
    ]
    for swept in sweeps:
        lines += sweep_part(swept, names)
    if not sweeps:
        lines += ["No sweep has run here yet: [](compare.md) says how to run one.", ""]
    return "\n".join(lines)
