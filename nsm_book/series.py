"""What the runs of a sweep say: places in the space of their parameters, and an estimate with its interval at each."""

import itertools
import json
import math
from typing import Any, NamedTuple

from nsm_book.markup import number
from nsm_book.swept import Row

SEEDS = ("seed", "seeds")
COSTS = ("seconds", "peak_memory_mb")


class Choice(NamedTuple):
    """What a drawing shows: a parameter along the axis, one a line, and the values at which all others are held."""

    along: str
    line: str | None
    held: tuple[tuple[str, str], ...]

    def label(self) -> str:
        text = f"{self.along}, a line for each {self.line}" if self.line else self.along
        return text + "".join(f"; {name} = {value}" for name, value in self.held)


class Point(NamedTuple):
    """The mean over the runs of one place, its 95 % interval (None: there is none), and the runs."""

    mean: float
    low: float | None
    high: float | None
    rows: tuple[Row, ...]


def shown(value: Any) -> str:
    """A parameter's value as an axis or a table has it."""
    return value if isinstance(value, str) else json.dumps(value)


def value_of(row: Row, name: str | None) -> str:
    return "all" if name is None else shown(row.parameters[name])


def in_order(rows: list[Row], name: str | None) -> list[str]:
    """The values that a parameter takes: numbers by size, all else as the table has them."""
    found = {value_of(row, name): row.parameters.get(name) for row in rows}
    plain = all(isinstance(value, (int, float)) for value in found.values())
    return sorted(found, key=found.get) if plain else list(found)


def varied(rows: list[Row]) -> list[str]:
    """The parameters that differ between runs, but for the seeds: those only if nothing else does."""
    names = [name for name in rows[0].parameters if len({value_of(row, name) for row in rows}) > 1]
    return [name for name in names if name not in SEEDS] or names or list(rows[0].parameters)[:1]


def told_apart(rows: list[Row]) -> list[str]:
    """The parameters that a table tells its runs apart by: those that differ, and the seeds."""
    names = varied(rows)
    return [*names, *(name for name in SEEDS if name in rows[0].parameters and name not in names)]


def settings(rows: list[Row]) -> int:
    """How many different places in the space of their parameters these runs have."""
    names = varied(rows)
    return len({tuple(value_of(row, name) for name in names) for row in rows})


def choices(rows: list[Row]) -> list[Choice]:
    """Each ordered pair of varied parameters, at each setting of the others; those with the most runs first."""
    names = varied(rows)
    found: dict[Choice, int] = {}
    for along, line in itertools.permutations(names, 2) if len(names) > 1 else [(names[0], None)]:
        for row in rows:
            held = tuple((name, value_of(row, name)) for name in names if name not in (along, line))
            choice = Choice(along, line, held)
            found[choice] = found.get(choice, 0) + 1
    return sorted(found, key=lambda choice: -found[choice])


def measured(row: Row, measure: str) -> float | None:
    """A run's value of a measure; None if it has none that is a number."""
    value = row.facts[measure] if measure in COSTS else row.values.get(measure)
    return None if isinstance(value, (str, bool)) or value is None or not math.isfinite(value) else float(value)


def measures(rows: list[Row]) -> list[str]:
    """What can be drawn: every number that differs between runs, but the parts of an estimate, and the two costs.

    Answers to claims come first, then what has an interval.
    """
    names = list(rows[0].values)
    parts = {f"{name}_{part}" for name in names for part in ("low", "high", "n")}
    first = sorted(
        (name for name in names if name not in parts),
        key=lambda name: (f"{name}_verdict" not in names, f"{name}_low" not in names),
    )
    every = [*first, *COSTS]
    return [name for name in every if name == "seconds" or len({measured(row, name) for row in rows} - {None}) > 1]


def point(rows: list[Row], measure: str) -> Point | None:
    """What the runs of one place say: Student's interval over several, a page's own interval of a single one."""
    from nsm_support.statistics import t_interval

    known = [(row, value) for row in rows if (value := measured(row, measure)) is not None]
    if not known:
        return None
    there = tuple(row for row, _ in known)
    if len(known) > 1:
        return Point(*t_interval([value for _, value in known])[:3], there)
    mean, low, high = known[0][1], measured(there[0], f"{measure}_low"), measured(there[0], f"{measure}_high")
    has_interval = low is not None and high is not None and low <= mean <= high
    return Point(mean, low if has_interval else None, high if has_interval else None, there)


def told(one: Point | None) -> str:
    """A point in words: its mean, and its interval if there is one."""
    if one is None:
        return number(None)
    interval = "" if one.low is None or one.high is None else f", {number(one.low)} to {number(one.high)}"
    return f"{number(one.mean)}{interval}"


def points(rows: list[Row], choice: Choice, measure: str) -> dict[tuple[str, str], Point]:
    """(value of the line's parameter, value along the axis) → point, for every place that has a run."""
    places: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if all(value_of(row, name) == value for name, value in choice.held):
            places.setdefault((value_of(row, choice.line), value_of(row, choice.along)), []).append(row)
    found = {place: point(there, measure) for place, there in places.items()}
    return {place: one for place, one in found.items() if one}
