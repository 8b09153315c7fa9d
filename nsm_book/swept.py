"""What the book's sweeps have left, read back for the pages that show it."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsm_book import BookError
from nsm_book.fingerprint import digest, files, fingerprint
from nsm_book.schema import Page
from nsm_book.sweep_table import FACTS, read_sweep, sweep_folder, sweeps

NOTEBOOKS = "../sweeps"
MOST_RUNS = 500  # of one sweep, that the site shows one by one, with their notebooks


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One run of a sweep: its facts, and `None` for those that a failed run has not.

    `whole` tells whether its executed notebook lies there as it was written; `today` whether its page would run the same way
    now.
    """

    id: str
    page: str
    profile: str
    status: str
    facts: dict[str, Any]
    parameters: dict[str, Any]
    values: dict[str, Any]
    versions: dict[str, str]
    whole: bool
    today: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Swept:
    """A sweep that has a table: its page, its runs in the table's order, what it asks and what answers that."""

    name: str
    page: Page
    rows: list[Row] = field(hash=False)
    question: str | None = None
    measure: str | None = None
    missing: int = 0  # runs of the sweep as it stands today that its table has not

    @property
    def large(self) -> bool:
        """Whether there are too many runs to show each: then no run's own files were looked at."""
        return len(self.rows) > MOST_RUNS

    def notebook(self, row: Row) -> str | None:
        """Where the executed notebook of a run lies, seen from the pages under `results`; None if there is none."""
        return f"{NOTEBOOKS}/{self.name}/{row.id}.ipynb" if row.whole else None

    def place(self, row: Row) -> str:
        """What the table's line of a run is called on its page."""
        return f"{self.name}-{row.id}"


def software(run: dict[str, Any]) -> dict[str, str]:
    """The versions that a run had, Python's and the machine's with them."""
    return {**{name: run[name] for name in ("python", "platform") if name in run}, **run.get("versions", {})}


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


def _part(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def read_swept(name: str) -> Swept | None:
    """What the sweep of that name has left of the runs that stand in it today; None if there is none.

    Raises:
        BookError: as `read_table` and `sweep_table.read_sweep`.
    """
    path = sweep_folder(name).with_name(f"{name}.parquet")
    if not path.exists():
        return None
    asked = read_sweep(name)
    entries = [entry for entry in read_table(path) if entry["run"] in asked.runs]
    if not entries:
        return None
    rows, today = [], {**fingerprint(asked.page, asked.profile, {}), "parameters": None, "files": None}
    for entry in entries:
        place = sweep_folder(name) / entry["run"]
        try:
            (record,) = json.loads((place / "results.json").read_text()) if len(entries) <= MOST_RUNS else ({},)
            # A sweep that was begun again and has not ended has newer runs than its table. No file is looked at without a record.
            own = all(record[fact] == entry[fact] for fact in ("date", "seconds"))
            whole = own and record["digest"] == digest(place / "run.ipynb")
            was = record["fingerprint"]
            same = own and {**was, "parameters": None, "files": None} == today and was["files"] == files(was["parameters"])
        except (OSError, ValueError, KeyError, TypeError):
            own, whole, same = False, False, False
        rows.append(
            Row(
                id=entry["run"],
                page=entry["page"],
                profile=entry["profile"],
                status=entry["status"],
                facts={fact: entry[fact] for fact in FACTS},
                parameters=_part(entry, "parameters."),
                values=_part(entry, "values."),
                versions=software(record) if own else {},
                whole=whole and entry["status"] == "done",
                today=same and entry["status"] == "done",
            )
        )
    return Swept(
        name=name, page=asked.page, rows=rows, question=asked.question, measure=asked.measure, missing=len(asked.runs) - len(rows)
    )


def read_all() -> list[Swept]:
    """All sweeps of `book/sweeps` that have a table, by name."""
    return [found for name in sweeps() if (found := read_swept(name))]


def copy_notebooks(site: Path) -> None:
    """Put the executed notebooks that the pages under `results` link to into a rendered site."""
    for swept in read_all():
        for row in swept.rows:
            if link := swept.notebook(row):
                target = (site / "results" / link).resolve()
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(sweep_folder(swept.name) / row.id / "run.ipynb", target)
