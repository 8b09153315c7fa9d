"""Read executed notebooks back into one table: page × parameters × values × seconds × memory × provenance."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat

from nsm_support.book.fingerprint import digest
from nsm_support.book.gate import glued

PROVENANCE = ("page", "profile", "seconds", "peak_memory_mb", "seed", "device", "commit", "date", "python", "platform")


def read_run(path: Path) -> dict[str, Any]:
    """One run's record: its provenance, its parameters, its versions, the values it glued and its notebook's digest."""
    notebook = nbformat.read(path, as_version=4)
    run = dict(notebook.metadata["nsm_book"])
    run["values"] = glued(notebook)
    run["notebook"], run["digest"] = path.name, digest(path)
    return run


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
            rows.append({**common, "key": key, "measured": entry["measured"],
                         "value": float(entry["value"]) if number else None, "text": str(entry["value"])})
    with whole(target) as path:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
