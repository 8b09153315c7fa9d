"""The runs that `nsm-book diff` compares: of a profile, of a sweep, of a file or of a folder."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from nsm_book import BookError
from nsm_book.fingerprint import digest_of
from nsm_book.schema import BUILD, PROFILES
from nsm_book.strict import one_line, unknown
from nsm_book.sweep_table import sweeps

ACCEPTED = "a profile, a sweep, a results.json, a .parquet file that this book wrote, or a folder of runs"


class Run(NamedTuple):
    """One run of a store: its page, all its parameters, and what it glued."""

    page: str
    parameters: dict[str, Any]
    values: dict[str, Any]


def find(given: str) -> list[Path]:
    """The files of the store that a person named.

    Raises:
        BookError: saying what is accepted, or how to make what is missing.
    """
    path = Path(given)
    if path.suffix in (".json", ".parquet") and path.is_file():
        return [path]
    if given in PROFILES or given in sweeps():
        path = BUILD / (f"results/{given}/results.json" if given in PROFILES else f"sweeps/{given}.parquet")
        if not path.exists():
            command = f"make book PROFILE={given}" if given in PROFILES else f"nsm-book sweep {given}"
            raise BookError(f"diff: {given} has no results yet: {command}")
        return [path]
    if not path.exists():
        raise BookError(f"diff: {unknown('store', given, [*PROFILES, *sweeps()])}, or {ACCEPTED}")
    if not path.is_dir():
        raise BookError(f"diff: {path} is neither .json nor .parquet; accepted: {ACCEPTED}")
    own, below = path / "results.json", sorted(path.rglob("results.json"))
    found = [own] if own.exists() else [file for file in below if "/." not in f"/{file.relative_to(path)}"]
    if not found:
        raise BookError(f"diff: {path} holds no results.json; accepted: {ACCEPTED}")
    return found


def read_json(path: Path) -> list[Run]:
    """The runs of a `results.json`."""
    found = []
    try:
        for run in json.loads(path.read_text()):
            if "checksum" in run and run["checksum"] != digest_of({name: run[name] for name in run if name != "checksum"}):
                raise ValueError(f"the record of {run['page']} is not as it was written")
            values = {key: entry["value"] for key, entry in run["values"].items()}
            found.append(Run(run["page"], dict(run["all_parameters"]), values))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BookError(f"diff: {path} is no results.json of this book, or not whole: {type(error).__name__} {error}") from None
    return found


def read_parquet(path: Path) -> list[Run]:
    """The runs of a `results.parquet`, one row a value, or the finished ones of a sweep's table, one row a run."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path, page_checksum_verification=True).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise BookError(f"diff: {path} is no whole Parquet file: {one_line(error)}") from None
    columns: set[str] = set(rows[0]) if rows else set()
    if {"run", "page", "status"} <= columns:
        return [_sweep_run(row) for row in rows if row["status"] == "done"]
    if not {"page", "profile", "parameters", "key", "value", "text"} <= columns:
        raise BookError(f"diff: {path} is neither a results.parquet nor a sweep's table")
    found: dict[tuple[str, ...], Run] = {}
    for row in rows:
        run = Run(row["page"], json.loads(row["parameters"]), {})
        values = found.setdefault((row["page"], row["profile"], row["parameters"]), run).values
        values[row["key"]] = row["text"] if row["value"] is None else row["value"]
    return list(found.values())


def _sweep_run(row: dict[str, Any]) -> Run:
    cells = [(*name.split(".", 1), value) for name, value in row.items() if "." in name]
    given = {name: value for kind, name, value in cells if kind == "parameters"}
    return Run(row["page"], given, {name: value for kind, name, value in cells if kind == "values" and value is not None})


def read_store(given: str) -> list[Run]:
    """All runs of the store that a person named.

    Raises:
        BookError: if there is no such store, or it is not whole.
    """
    return [run for path in find(given) for run in (read_json if path.suffix == ".json" else read_parquet)(path)]
