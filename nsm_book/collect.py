"""Read executed notebooks back into one table: page × parameters × values × seconds × memory × provenance; and tell a table
that says anything else from a good one."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat

from nsm_book.fingerprint import checksum, digest, record
from nsm_book.gate import glued
from nsm_book.schema import BUILD, pages

PROVENANCE = ("page", "profile", "seconds", "peak_memory_mb", "seed", "device", "commit", "date", "python", "platform")


def read_run(path: Path) -> dict[str, Any]:
    """One run's record: its provenance, parameters, versions, glued values, its notebook's digest and a checksum of all that."""
    notebook = nbformat.read(path, as_version=4)
    run = dict(notebook.metadata["nsm_book"])
    run["values"] = glued(notebook)
    run["notebook"], run["digest"] = path.name, digest(path)
    return run | {"checksum": checksum(run)}


def whole(path: Path):
    """A file to write to that takes the place of `path` only when it is complete."""
    from contextlib import contextmanager

    @contextmanager
    def writing():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        try:
            yield Path(name)
            os.chmod(name, 0o644)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)

    return writing()


def write(runs: list[Path], target: Path) -> list[dict[str, Any]]:
    """Write the records of these runs to `target` (JSON, one object a run), and return them."""
    records = [read_run(path) for path in runs]
    with whole(target) as path:
        path.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    return records


def write_table(records: list[dict[str, Any]], target: Path) -> None:
    """Write the records as a tidy Parquet table, one row for each run and value.

    Columns: the provenance, `parameters` and `versions` as JSON, `key`, `measured`, `value` (a double, null for
    text) and `text`.
    """
    import pyarrow
    import pyarrow.parquet

    rows = []
    for run in records:
        common = {name: str(run[name]) if name in ("seed", "device") else run[name] for name in PROVENANCE}
        common["parameters"] = json.dumps(run["all_parameters"], sort_keys=True)
        common["versions"] = json.dumps(run["versions"], sort_keys=True)
        for key, entry in run["values"].items():
            number = not isinstance(entry["value"], str)
            rows.append(
                {
                    **common,
                    "key": key,
                    "measured": entry["measured"],
                    "value": float(entry["value"]) if number else None,
                    "text": str(entry["value"]),
                }
            )
    with whole(target) as path:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, write_page_checksum=True)


def drop_damaged(profile: str) -> None:
    """Take a profile's tables and its site away if they do not say what the runs say, so that they are made again."""
    runs = [page.run_file(profile) for page in pages().values()]
    tables = [BUILD / "results" / profile / f"results.{kind}" for kind in ("json", "parquet")]
    card = BUILD / "sites" / f"{profile}.json"
    if not all(map(record, runs)):
        return  # a page runs again, and then so does all this
    with tempfile.TemporaryDirectory() as folder:
        again = [Path(folder, table.name) for table in tables]
        write_table(write(runs, again[0]), again[1])
        try:  # only reading what is judged may find damage
            sites = [card.parent / json.loads(card.read_text())["site"] / "results.json"] if card.exists() else []
            good = all(digest(path) == digest(new) for path, new in zip(tables, again, strict=True)) and all(
                digest(site) == digest(again[0]) for site in sites
            )
        except (OSError, ValueError, KeyError, TypeError):
            good = False
    if not good:
        for path in (*tables, card):
            path.unlink(missing_ok=True)
