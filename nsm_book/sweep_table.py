"""The table of a sweep, `book/sweeps/NAME.yml`: every run checked before the first kernel starts."""

import csv
import hashlib
import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field

from nsm_book import BookError, schema
from nsm_book.schema import Page, Profile, check_parameters
from nsm_book.strict import Entry, brief, one_line, unknown, validate

MOST = 100_000  # runs of one sweep
FACTS = ("seconds", "peak_memory_mb", "device", "commit", "date")  # of a run, repeated in its row of the sweep's results
Row = tuple[str, dict[str, Any]]  # where a run stands in its file, and the parameters that stand there


def sweep_folder(name: str) -> Path:
    """Where each run of a sweep has a folder of its own."""
    return schema.BUILD / "sweeps" / name


class SweepRun(NamedTuple):
    """One run of a sweep: its name, a line for people, and all parameters that differ from the page's own."""

    id: str
    label: str
    parameters: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A page, the profile that its runs start from, and its runs by their ids, in the order of the table; perhaps what it
    asks, and which of the page's values answers it."""

    name: str
    page: Page
    profile: str
    question: str | None
    measure: str | None
    runs: dict[str, SweepRun] = field(hash=False)

    @property
    def folder(self) -> Path:
        return sweep_folder(self.name)

    @property
    def table(self) -> Path:
        """Where the results of all runs are collected."""
        return self.folder.with_name(f"{self.name}.parquet")


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"accepts one line of text, got {brief(text)}")
    return text


def _rows(rows: Any) -> Any:
    if isinstance(rows, str) and re.fullmatch(r"\w[\w.-]*\.csv", rows, re.ASCII):
        return rows
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"accepts a list of runs, or NAME.csv for a file beside the sweep; got {brief(rows)}")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number}: accepts `{{parameter: value}}`, got {brief(row)}")
        if row.keys() != rows[0].keys():
            raise ValueError(f"row {number}: has {_names(row)}, and row 1 has {_names(rows[0])}")
    return rows


def _names(row: Iterable) -> str:
    return one_line(", ".join(key if isinstance(key, str) else brief(key) for key in row)) or "nothing"


Line = Annotated[str, AfterValidator(_printable)]
Values = Annotated[list[Any], Field(min_length=1)]


class SweepFile(Entry):
    """What a sweep's file holds: each of its rows is crossed with each point of a grid and with each seed."""

    page: str
    profile: Profile = "full"
    question: Line | None = None
    measure: Line | None = None
    rows: Annotated[Any, AfterValidator(_rows)] = Field(default_factory=lambda: [{}])
    grid: dict[str, Values] = Field(default_factory=dict)
    seeds: Values = Field(default_factory=list)


def sweeps() -> dict[str, Path]:
    """The files under `book/sweeps` by the name of their sweep. Folders, and hidden files, which editors leave, are none. A
    BookError for a name that is no plain word, or that a profile has."""
    found = {path.stem: path for path in sorted((schema.BOOK / "sweeps").glob("[!.]*.yml")) if path.is_file()}
    for name in found:
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name, re.ASCII) or name in schema.PROFILES:
            accepted = "a sweep's name accepts letters, digits, - and _, and is no profile's"
            raise BookError(f"book/sweeps: {brief(f'{name}.yml')}: {accepted}")
    return found


def read_sweep(name: str) -> Sweep:
    """The sweep of that name, with every run held to the page's parameters; a BookError names the file and the place in it."""
    if name not in sweeps():
        raise BookError(unknown("sweep", name, sweeps()))
    file = f"sweeps/{name}.yml"
    table = validate(SweepFile, schema.read_yaml(file), f"book/{file}")
    try:
        page = schema.page(table.page)
        base = schema.profile_parameters(page, table.profile)
        runs: dict[str, SweepRun] = {}
        places: dict[str, str] = {}
        for place, given in _cross(page, _axes(page, table)):
            merged = base | given
            text = json.dumps([page.name, table.profile, merged], sort_keys=True)
            label = ", ".join(f"{key}={brief(value)}" for key, value in given.items())
            run = SweepRun(hashlib.sha256(text.encode()).hexdigest()[:12], label, merged)
            if run.id in runs:
                raise BookError(f"{place}: the same run as {places[run.id]}: {label or 'nothing but defaults'}")
            runs[run.id], places[run.id] = run, place
    except BookError as error:
        raise BookError(f"book/{file}: {error}") from None
    return Sweep(name=name, page=page, profile=table.profile, question=table.question, measure=table.measure, runs=runs)


def _axes(page: Page, table: SweepFile) -> list[list[Row]]:
    """What a table crosses: its rows, the values of each parameter of its grid, its seeds."""
    if isinstance(table.rows, str):
        rows = _csv_rows(table.rows)
    else:
        rows = [(f"row {number}" if row else "grid", row) for number, row in enumerate(table.rows, start=1)]
    axes = [rows, *([("grid", {name: value}) for value in values] for name, values in table.grid.items())]
    if table.seeds:
        name = next((name for name in ("seed", "seeds") if name in schema.parameters(page)), None)
        if name is None:
            raise BookError(f"seeds: {page.name} has neither a parameter `seed` nor `seeds`")
        axes.append([("seeds", {name: seed if name == "seed" else [seed]}) for seed in table.seeds])
    _once("parameter", [name for axis in axes for name in axis[0][1]])
    return axes


def _cross(page: Page, axes: list[list[Row]]) -> Iterator[Row]:
    """Every run of a table, each entry of an axis held to the page's parameters once."""
    count = math.prod(map(len, axes))
    if count > MOST:
        raise BookError(f"{count} runs; accepts {MOST} at most")
    checked = [[(place, _checked(page, place, given)) for place, given in axis] for axis in axes]
    for (place, row), *points in itertools.product(*checked):
        yield place, dict(itertools.chain(row.items(), *(given.items() for _, given in points)))


def _checked(page: Page, place: str, given: dict[str, Any]) -> dict[str, Any]:
    try:
        return check_parameters(page, given)
    except BookError as error:
        raise BookError(f"{place}: {error}") from None


def _csv_rows(name: str) -> list[Row]:
    """A header of parameters, then a run on every line."""
    reader = csv.DictReader(io.StringIO(schema.read_text(f"sweeps/{name}"), newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            rows.append((f"{name}: line {reader.line_num}", row))
    except csv.Error as error:
        raise BookError(f"{name}: line {reader.line_num}: {error}") from None
    _once(f"{name}: column", reader.fieldnames or ())
    for place, row in rows:
        if None in row or None in row.values():
            raise BookError(f"{place}: needs {len(reader.fieldnames or ())} cells, one for each column")
    if not rows:
        raise BookError(f"{name}: holds no run: accepts a header of parameters, and a run on each line below it")
    return rows


def _once(what: str, names: Iterable[str]) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            raise BookError(f"{what} {brief(name)} stands there {times} times")
