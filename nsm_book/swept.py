"""What the book's sweeps have left in `_build/sweeps`, for the pages that show it: the part of `book.json` about sweeps."""

import json
from pathlib import Path
from typing import Any

from nsm_book import BookError
from nsm_book.fingerprint import digest, files, fingerprint
from nsm_book.sweep_table import FACTS, Sweep, read_sweep, sweep_folder, sweeps

MOST_RUNS = 500  # of one sweep, that the site shows one by one, with their notebooks


def catalogue() -> tuple[list[dict[str, Any]], list[str]]:
    """The entries of all sweeps that have runs, as `nsm_support.store` describes them, and the names of all others.

    Raises:
        BookError: naming the file, if a sweep cannot be read, or its table is none or not whole.
    """
    names = list(sweeps())
    found = {name: entry for name in names if (entry := _entry(read_sweep(name)))}
    return list(found.values()), [name for name in names if name not in found]


def _entry(sweep: Sweep) -> dict[str, Any] | None:
    """One sweep, with the runs of its table that stand in it today; None if there is none."""
    rows = [row for row in read_table(sweep.table) if row["run"] in sweep.runs] if sweep.table.exists() else []
    if not rows:
        return None
    today = {**fingerprint(sweep.page, sweep.profile, {}), "parameters": None, "files": None}
    large = len(rows) > MOST_RUNS  # then no run's own files are looked at
    return {
        **{key: getattr(sweep, key) for key in ("name", "profile", "question", "measure")},
        "page": sweep.page.name,
        "runs_missing": len(sweep.runs) - len(rows),
        "large": large,
        "runs": [_run(sweep, row, today, large) for row in rows],
    }


def _run(sweep: Sweep, row: dict[str, Any], today: dict[str, Any], large: bool) -> dict[str, Any]:
    """One row of a sweep's table, with what its own folder says of it.

    A sweep that was begun again and has not ended has newer runs than its table: no file is looked at without the row's record.
    """
    place, done = sweep_folder(sweep.name) / row["run"], row["status"] == "done"
    same, whole, versions = False, False, {}
    try:
        (record,) = json.loads((place / "results.json").read_text()) if not large else ({},)
        if all(record[fact] == row[fact] for fact in ("date", "seconds")):
            versions = {**{name: record[name] for name in ("python", "platform") if name in record}, **record.get("versions", {})}
            whole = record["digest"] == digest(place / "run.ipynb")
            was = record["fingerprint"]
            same = {**was, "parameters": None, "files": None} == today and was["files"] == files(was["parameters"])
    except (OSError, ValueError, KeyError, TypeError):
        same = whole = False
    return {
        "id": row["run"],
        "status": row["status"],
        "parameters": _part(row, "parameters."),
        "values": _part(row, "values."),
        "facts": {fact: row[fact] for fact in FACTS},
        "versions": versions,
        "today": same and done,
        "notebook": f"../sweeps/{sweep.name}/{row['run']}.ipynb" if whole and done else None,
    }


def _part(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a sweep's table.

    Raises:
        BookError: naming the file, if it is no such table or not whole.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path, page_checksum_verification=True).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise BookError(
            f"{path}: is no whole Parquet file: {' '.join(str(error).split())[:200]}. "
            f"`nsm-book sweep {path.stem}` makes it anew from the runs"
        ) from None
    missing = [name for name in ("run", "page", "profile", "status", *FACTS) if rows and name not in rows[0]]
    if missing or not rows:
        raise BookError(f"{path}: is no table of a sweep: has no {', '.join(missing) or 'row'}")
    return rows
