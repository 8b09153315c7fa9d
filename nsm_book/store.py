"""The result store: what all executed notebooks hold, read back into one folder for the results pages, `diff` and readers.

`_build/results/PROFILE` holds `results.json` (a record a run), `results.parquet` (a row a value) and `book.json` (what the book
asks: pages, parameters, claims, sweeps); `nsm_support.store` reads them.
"""

import json
from pathlib import Path
from typing import Any

import nbformat
import yaml

from nsm_book import swept
from nsm_book.fingerprint import digest, digest_of, store_files
from nsm_book.gate import glued
from nsm_book.run import whole
from nsm_book.schema import BUILD, ROOT, claims, pages, parameters, profile_parameters, title

PROVENANCE = ("page", "profile", "seconds", "peak_memory_mb", "seed", "device", "commit", "date", "python", "platform")


def toc_pages() -> list[str]:
    """All pages of `_toc.yml`, in the reader's order."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]


def read_run(path: Path) -> dict[str, Any]:
    """One run's record: its provenance, parameters, versions, glued values, its notebook's digest and a checksum of all that."""
    notebook = nbformat.read(path, as_version=4)
    run = {**notebook.metadata["nsm_book"], "values": glued(notebook), "notebook": path.name, "digest": digest(path)}
    return run | {"checksum": digest_of(run)}


def write_records(runs: list[Path], target: Path) -> list[dict[str, Any]]:
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
            number = None if isinstance(entry["value"], str) else float(entry["value"])
            rows.append({**common, "key": key, "measured": entry["measured"], "value": number, "text": str(entry["value"])})
    with whole(target) as path:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, write_page_checksum=True)


def rerun_record(profile: str) -> Path:
    """Where `make rerun` leaves what running the pages again has found: page → digest of the run, same or not, cells."""
    return BUILD / "nbval" / f"{profile}.json"


def read_reruns(profile: str) -> dict[str, dict[str, Any]]:
    try:
        return dict(json.loads(rerun_record(profile).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def catalogue(profile: str) -> dict[str, Any]:
    """What the book asks, for the results pages: `book.json`, in the form that `nsm_support.store` describes."""
    about = []
    for name in [name for name in toc_pages() if name in pages()]:
        page = pages()[name]
        changed = profile_parameters(page, "quick")
        lines = [
            {"name": p.name, "type": p.type, "default": p.default, "meaning": p.meaning}
            | ({"quick": changed[p.name]} if p.name in changed else {})
            for p in parameters(page).values()
        ]
        facts = {"name": name, "title": title(page), "budget": page.budget[profile], "memory": page.memory}
        about.append({**facts, "cores": page.cores, "parameters": lines})
    sweeps, not_run = swept.catalogue()
    questions = [claim.model_dump() for claim in claims()]
    return {"profile": profile, "pages": about, "claims": questions, "sweeps": sweeps, "sweeps_not_run": not_run}


def write(profile: str) -> str:
    """Write a profile's store from its runs; return one line that says what it holds."""
    folder = store_files(profile)[0].parent
    runs = [page.run_file(profile) for page in pages().values() if not page.reads_results]
    reruns = {
        name: {"same": entry["same"], "cells": entry["cells"]}
        for name, entry in read_reruns(profile).items()
        if name in pages() and digest(pages()[name].run_file(profile)) == entry["digest"]
    }
    records = write_records(runs, folder / "results.json")
    write_table(records, folder / "results.parquet")
    tables = {path.name: digest(path) for path in store_files(profile)[:2]}
    book = {**catalogue(profile), "reruns": reruns, "tables": tables}
    with whole(folder / "book.json") as path:
        path.write_text(json.dumps({**book, "checksum": digest_of(book)}, indent=1, ensure_ascii=False) + "\n")
    return f"results: {sum(len(run['values']) for run in records)} values of {len(records)} pages"


def discard_damaged(profile: str) -> None:
    """Remove a store that is not as it was written, or that tells of other runs than there are."""
    results, table, book = store_files(profile)
    try:
        written = json.loads(book.read_text())
        checksum, tables = written.pop("checksum"), {path.name: digest(path) for path in (results, table)}
        described = {run["page"]: run["digest"] for run in json.loads(results.read_text())}
        runs = {page.name: digest(page.run_file(profile)) for page in pages().values() if not page.reads_results}
        good = checksum == digest_of(written) and tables == written["tables"] and described == runs
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        good = False
    for path in (results, table, book) if not good else ():
        path.unlink(missing_ok=True)
