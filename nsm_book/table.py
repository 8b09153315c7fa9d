"""The table of a sweep, `book/sweeps/NAME.yml` or `.csv`: every run checked before the first kernel starts."""

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
from typing import Any, NamedTuple

import yaml

from nsm_book import ROOT, BookError
from nsm_book.pages import BOOK, BUILD, PROFILES, Page, brief, check, page, parameters, profile_parameters, unknown

MOST = 100_000  # runs of one sweep
FACTS = ("seconds", "peak_memory_mb", "device", "commit", "date")  # of a run, that its row repeats
KEYS = ("page", "profile", "question", "measure", "rows", "grid", "seeds")


class Run(NamedTuple):
    """One run of a sweep: its name, a line for people, and all parameters that differ from the page's own."""

    id: str
    label: str
    parameters: dict[str, Any]


def folder(name: str) -> Path:
    """Where each run of a sweep has a folder of its own."""
    return BUILD / "sweeps" / name


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A page, the profile that its runs start from, and its runs by their ids, in the order of the table; perhaps what it
    asks, and which of the page's values answers it."""

    name: str
    page: Page
    profile: str
    question: str | None
    measure: str | None
    runs: dict[str, Run] = field(hash=False)

    @property
    def folder(self) -> Path:
        return folder(self.name)

    @property
    def table(self) -> Path:
        """Where all runs are collected."""
        return folder(self.name).with_name(f"{self.name}.parquet")


class _Strict(yaml.SafeLoader):
    """YAML in which no key stands twice, and which no alias can blow up."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "a table has no aliases", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is one name", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {brief(key.value)}: accepts each name once", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def sweeps() -> dict[str, Path]:
    """The files under `book/sweeps` by the name of their sweep.

    Raises:
        BookError: for a name that is no plain word, that a profile has, or that two files have.
    """
    found: dict[str, Path] = {}
    for path in sorted([*(BOOK / "sweeps").glob("*.yml"), *(BOOK / "sweeps").glob("*.csv")]):
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", path.stem, re.ASCII) or path.stem in PROFILES:
            raise BookError(
                f"book/sweeps: {brief(path.name)}: a sweep's name accepts letters, digits, - and _, and is no profile's"
            )
        if path.stem in found:
            raise BookError(f"book/sweeps: {path.name} and {found[path.stem].name} have one name: rename one")
        found[path.stem] = path
    return found


def read_sweep(name: str) -> Sweep:
    """The sweep of that name, with every run held to the page's parameters.

    Raises:
        BookError: naming the file, the place in it, what was given and what is accepted.
    """
    found = sweeps()
    if name not in found:
        raise BookError(unknown("sweep", name, found))
    path = found[name]
    file = str(path.relative_to(ROOT))
    try:
        text = path.read_bytes().decode("utf-8-sig")
        head, rows = (_read_csv if path.suffix == ".csv" else _read_yaml)(text)
        entry = page(str(head["page"]))
        profile = head.get("profile", "full")
        if profile not in PROFILES:
            raise BookError(unknown("profile", profile, PROFILES))
        base, runs, places = profile_parameters(entry, profile), {}, {}
        for place, given in rows(entry):
            merged = base | given
            run = Run(_id(entry, profile, merged), ", ".join(f"{k}={brief(v)}" for k, v in given.items()), merged)
            if run.id in runs:
                raise BookError(f"{place}: the same run as {places[run.id]}: {run.label or 'nothing but defaults'}")
            runs[run.id], places[run.id] = run, place
        if not runs:
            raise BookError("holds no run")
    except UnicodeDecodeError as error:
        raise BookError(f"{file}: byte {error.start}: accepts UTF-8 only") from None
    except BookError as error:
        raise BookError(f"{file}: {error}") from None
    return Sweep(name=name, page=entry, profile=profile, question=head.get("question"), measure=head.get("measure"), runs=runs)


def _id(page: Page, profile: str, given: dict[str, Any]) -> str:
    text = json.dumps([page.name, profile, given], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _checked(entry: Page, place: str, given: dict[str, Any]) -> dict[str, Any]:
    try:
        return check(entry, given)
    except BookError as error:
        raise BookError(f"{place}: {error}") from None


def _few(count: int) -> None:
    if count > MOST:
        raise BookError(f"{count} runs; accepts {MOST} at most")


def _twice(names: list[str], what: str) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            raise BookError(f"{what} {brief(name)} stands there {times} times")


def _one_line(text: Any) -> str:
    """Another's message on one line, of no more than a person reads."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))[:200]


def _read_csv(text: str):
    """A header, then a run on every line: the columns `page`, perhaps `profile`, and the parameters."""
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(reader, [])
        lines = [(f"line {reader.line_num}", cells) for cells in reader if cells]
    except csv.Error as error:
        raise BookError(f"line {reader.line_num}: {error}") from None
    _twice(header, "column")
    if "page" not in header:
        raise BookError(f"needs a column `page`, has {brief(header)}")
    _few(len(lines))
    if not lines:
        raise BookError("holds no run: a header, and no line below it")
    for place, cells in lines:
        if len(cells) != len(header):
            raise BookError(f"{place}: {len(cells)} cells for the {len(header)} columns {brief(header)}")
    table = [(place, dict(zip(header, cells, strict=True))) for place, cells in lines]
    head = {}
    for key in {"page", "profile"} & {*header}:
        head[key] = table[0][1][key]
        for place, row in table:
            if row.pop(key) != head[key]:
                raise BookError(f"{place}: another {key} than on the first line, {brief(head[key])}: a sweep has one {key}")
    return head, lambda entry: ((place, _checked(entry, place, row)) for place, row in table)


def _read_yaml(text: str):
    """`page`, perhaps `profile`, and a table: `rows`, each crossed with each point of `grid` and each of `seeds`."""
    try:
        found = yaml.load(text, _Strict)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise BookError(f"line {mark.line + 1 if mark else '?'}: {_one_line(error.problem)}") from None
    # What PyYAML raises where a value is not of its tag: `!!bool maybe`, `!!int ""`, `!!timestamp x`, 1:1:1…
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise BookError(f"is no YAML: {_one_line(error)}") from None
    if not isinstance(found, dict):
        raise BookError(f"accepts the keys {', '.join(KEYS)}; got {brief(found)}")
    for key in found:
        if key not in KEYS:
            raise BookError(unknown("key", key, KEYS))
    if not isinstance(found.get("page"), str):
        raise BookError(f"needs `page: NAME`, has {brief(found.get('page'))}")
    for key in {"question", "measure"} & {*found}:
        if not isinstance(found[key], str) or not found[key].isprintable():
            raise BookError(f"{key}: accepts one line of text, got {brief(found[key])}")
    return found, lambda entry: _cross(entry, found)


def _listed(what: str, value: Any) -> list:
    if not isinstance(value, list) or not value:
        raise BookError(f"{what}: accepts a list that is not empty, got {brief(value)}")
    return value


def _names(given: Iterable) -> str:
    """The keys of a YAML table in a message: names as they stand, if they are any."""
    return _one_line(", ".join(key if isinstance(key, str) else brief(key) for key in given)) or "nothing"


def _cross(entry: Page, found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every run of a YAML table: rows × grid × seeds."""
    grid = found.get("grid", {})
    if not isinstance(grid, dict):
        raise BookError(f"grid: accepts `parameter: [values]`, got {brief(grid)}")
    axes = {name: _listed(f"grid: {_names([name])}", values) for name, values in grid.items()}
    rows = _listed("rows", found["rows"]) if "rows" in found else [{}]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise BookError(f"row {number}: accepts `{{parameter: value}}`, got {brief(row)}")
        if row.keys() != rows[0].keys():
            raise BookError(f"row {number}: has {_names(row)}, and row 1 has {_names(rows[0])}")
    seeds = _listed("seeds", found["seeds"]) if "seeds" in found else None
    if seeds:
        name = next((name for name in ("seed", "seeds") if name in parameters(entry)), None)
        if name is None:
            raise BookError(f"seeds: {entry.name} has neither a parameter `seed` nor `seeds`")
        _twice([name, *axes], "parameter")
        axes[name] = [[seed] for seed in seeds] if name == "seeds" else seeds
    _twice([*rows[0], *axes], "parameter")
    _few(len(rows) * math.prod(map(len, axes.values())))
    values = [[_checked(entry, "grid", {name: value})[name] for value in axis] for name, axis in axes.items()]
    for number, row in enumerate(rows, start=1):
        first = _checked(entry, f"row {number}", row)
        for point in itertools.product(*values):
            yield f"row {number}" if "rows" in found else "grid", first | dict(zip(axes, point, strict=True))
