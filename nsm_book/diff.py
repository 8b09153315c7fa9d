"""`nsm-book diff`: two result stores side by side: what moved, which verdicts changed, what one alone has."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nsm_book import BookError
from nsm_book.compared import Run

BEYOND = "Moved beyond the interval of A"
VERDICTS = "Verdicts that changed"
OTHER = "Changed within the interval of A, or without one"
HEADS = {  # what matters most first
    BEYOND: ("run", "value", "A", "B", "half-widths beyond"),
    VERDICTS: ("run", "claim", "A", "B", "A because", "B because"),
    "Only in A": ("run or value",),
    "Only in B": ("run or value",),
    OTHER: ("run", "value", "A", "B"),
    "Parameters that differ": ("run", "parameter", "A", "B"),
}


class Shown(NamedTuple):
    """A value, and the interval that was glued with it."""

    value: Any
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        text = f"{self.value:.6g}" if _is_number(self.value) else repr(self.value)
        return text + (" [{:.4g}, {:.4g}]".format(*self.interval) if self.interval else "")

    def beyond(self, value: Any) -> float:
        """How far another value lies outside the interval, in half-widths; 0 within it, or without one."""
        if self.interval is None or not _is_number(value):
            return 0.0
        low, high = self.interval
        outside = max(low - value, value - high, 0.0)
        return outside / ((high - low) / 2) if high > low else math.inf if outside else 0.0


@dataclass
class Comparison:
    """The rows of each table of `HEADS`, and how many values are equal."""

    rows: dict[str, list[tuple]] = field(default_factory=lambda: {title: [] for title in HEADS})
    equal: int = 0

    @property
    def matters(self) -> bool:
        """Whether a verdict changed or a value moved beyond its interval."""
        return bool(self.rows[BEYOND] or self.rows[VERDICTS])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _differing(parameters: list[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for given in parameters for name in given)
    return [name for name in names if len({repr(given.get(name)) for given in parameters}) > 1]


def _by_name(store: list[Run], both: list[Run], single: set[str]) -> dict[str, Run]:
    """The runs of a store by a name under which they meet: a page that no store holds twice under its own, whatever its
    parameters; all others by those that differ."""
    telling = {page: _differing([run.parameters for run in both if run.page == page]) for page in {run.page for run in store}}
    found: dict[str, Run] = {}
    for run in store:
        given = [] if run.page in single else telling[run.page]
        name = " ".join([run.page, *(f"{key}={run.parameters.get(key)!r}" for key in given)])
        if name in found:
            raise BookError(f"diff: one store holds two runs of {name}; compare a folder or a table that holds one of them")
        found[name] = run
    return found


def _entries(values: dict[str, Any]) -> dict[str, Shown]:
    """What a run glued, each estimate with its interval; without reasons, which are shown with their verdict."""
    ends = {key: (values.get(f"{key}_low"), values.get(f"{key}_high")) for key in values}
    spans: dict[str, Any] = {key: pair for key, pair in ends.items() if all(map(_is_number, pair))}
    parts = {f"{key}{end}" for key in spans for end in ("_low", "_high")}
    parts |= {f"{key.removesuffix('_verdict')}_reason" for key in values if key.endswith("_verdict")}
    return {key: Shown(value, spans.get(key)) for key, value in values.items() if key not in parts}


def _only(name: str, here: dict[str, Any], there: dict[str, Any]) -> list[tuple[str]]:
    keys = [key for key in here if key not in there]
    parts = {f"{key}{end}" for key in keys for end in ("_verdict", "_reason", "_low", "_high", "_n")}
    return [(f"{name}: {key}",) for key in keys if key not in parts]


def compare(first: list[Run], second: list[Run]) -> Comparison:
    """What differs between two stores; the first one's intervals count.

    Raises:
        BookError: if one store holds the same run twice.
    """
    counts = [[run.page for run in store] for store in (first, second)]
    single = {page for page in {*counts[0], *counts[1]} if all(pages.count(page) < 2 for pages in counts)}
    a, b = (_by_name(store, first + second, single) for store in (first, second))
    found = Comparison()
    for name in [name for name in a if name in b]:
        given, new = a[name].parameters, b[name].parameters
        differing = _differing([given, new])
        found.rows["Parameters that differ"] += [(name, key, Shown(given.get(key)), Shown(new.get(key))) for key in differing]
        _compare_values(name, a[name].values, b[name].values, found)
    found.rows["Only in A"] += [(name,) for name in a if name not in b]
    found.rows["Only in B"] += [(name,) for name in b if name not in a]
    found.rows[BEYOND].sort(key=lambda row: -row[-1])
    return found


def _compare_values(name: str, first: dict[str, Any], second: dict[str, Any], found: Comparison) -> None:
    a, b = _entries(first), _entries(second)
    found.rows["Only in A"] += _only(name, a, b)
    found.rows["Only in B"] += _only(name, b, a)
    for key in [key for key in a if key in b]:
        base, _, part = key.rpartition("_")
        if part == "verdict":
            if a[key] != b[key]:
                reasons = [str(values.get(f"{base}_reason", "")) for values in (first, second)]
                found.rows[VERDICTS].append((name, base, str(a[key].value), str(b[key].value), *reasons))
        elif a[key] == b[key]:
            found.equal += part != "n" or base not in a
        elif moved := a[key].beyond(b[key].value):
            found.rows[BEYOND].append((name, key, a[key], b[key], moved))
        else:
            found.rows[OTHER].append((name, key, a[key], b[key]))


def _plain(cell: Any) -> Text:
    """What a store holds as the terminal shows it: neither markup nor control characters."""
    text = f"{cell:.2g}" if isinstance(cell, float) else str(cell)
    return Text("".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text))


def show(found: Comparison, first: str, second: str, console: Console) -> None:
    """Print a comparison, what matters most first."""
    stores = {"Only in A": f": {first}", "Only in B": f": {second}"}
    for title, rows in found.rows.items():
        if rows:
            console.print(_plain(f"{title}{stores.get(title, '')} ({len(rows)})"))
            table = Table(box=None)
            for name in HEADS[title]:
                table.add_column(name, overflow="fold")
            for row in rows:
                table.add_row(*map(_plain, row))
            console.print(table, "")
    beyond, verdicts, only_first, only_second, other, _ = map(len, found.rows.values())
    changed = f"{beyond} values beyond their interval, {verdicts} verdicts changed, {other} other values changed"
    console.print(Text(f"{changed}, {found.equal} equal; {only_first} only in A, {only_second} only in B"))
