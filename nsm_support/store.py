"""The result store of a book, read for the pages that show it: what ran, what each claim came to, what the sweeps left.

The pipeline hands over a folder, in `NSM_BOOK_RESULTS`, that holds

- `results.json`: a list of records, one a page: its `FACTS`, `profile`, `all_parameters`, `python`, `platform`, `versions` and
  `values`, `{key: {"value": …, "measured": …}}`. `results.parquet` is its tidy table, a row a value.
- `book.json`: the `profile`; the `pages` in the reader's order (`name`, `title`, `budget` in seconds, `memory` in MB, `cores`,
  `parameters` with `name`, `type`, `default`, `meaning` and, where the profile changes it, `quick`); the `claims` of
  `book/claims.yml`; `reruns`, `{page: {"same": …, "cells": …}}`; the `sweeps` that have runs (`name`, `page`, `profile`,
  `question`, `measure`, `runs_missing`, `large`, and `runs` with `id`, `status`, `parameters`, `values`, `facts`, `versions`,
  `today`, `notebook`); and the names of the `sweeps_not_run`.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from nsm_support.results import reason

FACTS = ("seconds", "peak_memory_mb", "device", "commit", "date")
COSTS = ("seconds", "peak_memory_mb")
SEEDS = ("seed", "seeds")
ANSWER = ("estimate", "low", "high", "n", "verdict")  # what a page glues under a claim's id


class Sweep(NamedTuple):
    """One sweep: its entry of `book.json`, and three frames with one row a run, named by its id.

    `runs` has status, facts, `notebook` (None: there is none), whether the page is still the same (`today`) and `versions`;
    `parameters` are texts, ordered as their values are; `values` are numbers, the costs with them, NaN for all else.
    """

    about: dict[str, Any]
    runs: pd.DataFrame
    parameters: pd.DataFrame
    values: pd.DataFrame


class Store(NamedTuple):
    """`pages`: a row a page that ran, in the reader's order: its entry, facts, `versions`, and `rerun`, None without one.
    `parameters`: a row a parameter of a page, its values as Python writes them. `claims`: a row a claim, page by page: its entry,
    its answer and the reason.
    """

    profile: str
    pages: pd.DataFrame
    parameters: pd.DataFrame
    claims: pd.DataFrame
    sweeps: list[Sweep]
    sweeps_not_run: list[str]


def varied(parameters: pd.DataFrame, seeds: bool = False) -> list[str]:
    """The parameters that differ between runs, but for the seeds: those only if nothing else does, or if `seeds` are wanted."""
    names = [name for name in parameters if parameters[name].nunique() > 1]
    found = [name for name in names if name not in SEEDS] or names or list(parameters)[:1]
    return found + [name for name in SEEDS if seeds and name in parameters and name not in found]


def _folder() -> Path:
    if given := os.environ.get("NSM_BOOK_RESULTS"):
        return Path(given)
    here = Path.cwd()
    for above in (here, *here.parents):
        for place in (above / "_build/results/full", above / "_build/results/quick"):
            if (place / "book.json").exists():
                return place
    wanted = f"_build/results/PROFILE/book.json, which `make book` writes, in {here} or above it"
    raise FileNotFoundError(f"no result store: NSM_BOOK_RESULTS is not set, and there is no {wanted}")


def read_store(folder: Path | None = None) -> Store:
    """The result store in a folder; without one, of NSM_BOOK_RESULTS, or of the nearest checkout, its full profile first.

    Raises FileNotFoundError if there is none; ValueError if a claim has no answer.
    """
    folder = folder or _folder()
    book, results = (json.loads((folder / name).read_text()) for name in ("book.json", "results.json"))
    records = {record["page"]: record for record in results}
    pages, parameters, claims = [], [], []
    for page in book["pages"]:
        of = {"page": page["name"], "title": page["title"]}
        if run := records.get(page["name"]):
            versions = {"python": run["python"], "platform": run["platform"], **run["versions"]}
            facts = {fact: run[fact] for fact in FACTS}
            pages.append({**page, **facts, "versions": versions, "rerun": book["reruns"].get(page["name"])})
        for given in page["parameters"]:
            parameters.append(given | of | {key: repr(given[key]) for key in ("default", "quick") if key in given})
        claims += [one | of | _answer(one, run) for one in book["claims"] if one["page"] == page["name"]]
    return Store(
        book["profile"],
        pd.DataFrame(pages, dtype=object),
        pd.DataFrame(parameters, columns=["page", "title", "name", "type", "default", "quick", "meaning"], dtype=object),
        pd.DataFrame(claims, columns=["page", "title", "id", "question", "metric", "rule", *ANSWER, "reason"], dtype=object),
        [_sweep(entry) for entry in book["sweeps"]],
        book["sweeps_not_run"],
    )


def _answer(claim: dict[str, Any], run: dict[str, Any] | None) -> dict[str, Any]:
    """A page's answer to a claim. With n = 0, which measured nothing that was asked, estimate and interval are NaN."""
    values = run["values"] if run else {}
    name, page = claim["id"], claim["page"]
    keys = [name, *(f"{name}_{field}" for field in ANSWER[1:])]
    if missing := [key for key in keys if key not in values]:
        raise ValueError(f"result store: the run of {page} does not answer the claim {name!r}: has no {missing[0]}")
    given = dict(zip(ANSWER, (values[key]["value"] for key in keys), strict=True))
    given["reason"] = reason(claim["rule"], given["verdict"], given["n"])
    return given if given["n"] else {**given, "estimate": math.nan, "low": math.nan, "high": math.nan}


def _sweep(entry: dict[str, Any]) -> Sweep:
    runs, about = entry["runs"], {key: value for key, value in entry.items() if key != "runs"}
    facts = [{**run["facts"], **{key: run[key] for key in ("status", "today", "notebook", "versions")}} for run in runs]
    values = [{**run["values"], **{cost: run["facts"][cost] for cost in COSTS}} for run in runs]
    frames = [pd.DataFrame(rows, dtype=object) for rows in (facts, [run["parameters"] for run in runs], values)]
    frames = [frame.set_axis([run["id"] for run in runs]) for frame in frames]
    return Sweep(about, frames[0], frames[1].apply(_ordered), frames[2].map(_number))


def _ordered(column: pd.Series) -> pd.Series:
    """A parameter's values as texts: numbers in order of size, all else as it comes."""
    texts = {value if isinstance(value, str) else json.dumps(value): value for value in column}
    numbers = all(isinstance(value, (int, float)) for value in texts.values())
    order = sorted(texts, key=texts.__getitem__) if numbers else list(texts)
    return column.map(lambda value: value if isinstance(value, str) else json.dumps(value)).astype(pd.CategoricalDtype(order))


def _number(value: Any) -> float:
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else math.nan
