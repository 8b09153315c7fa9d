"""`nsm-book diff`: two result stores side by side: what moved, which verdicts changed, what one alone has."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nsm_book import BookError
from nsm_book.fingerprint import checksum
from nsm_book.schema import BUILD, PROFILES, unknown
from nsm_book.sweep_table import sweeps

ACCEPTED = "a profile, a sweep, a results.json, a .parquet file that this book wrote, or a folder of runs"
FOLLOWS = ("_verdict", "_reason", "_low", "_high", "_n")  # parts of an answer or of an estimate, told with it


class Run(NamedTuple):
    """One run of a store: its page, all its parameters, and what it glued."""

    page: str
    parameters: dict[str, Any]
    values: dict[str, Any]


class Value(NamedTuple):
    """One number in both stores; the interval is None where a store gives none, `moved` in half-widths of the first's."""

    run: str
    key: str
    first: Any
    second: Any
    first_interval: tuple[float, float] | None
    second_interval: tuple[float, float] | None
    moved: float


class Verdict(NamedTuple):
    run: str
    claim: str
    first: str
    second: str
    first_reason: str
    second_reason: str


class Comparison(NamedTuple):
    """What differs: beyond its interval (most first), verdicts, what one store alone has, all else, parameters of runs that
    meet (run, name, first, second); and how much is equal."""

    beyond: list[Value]
    verdicts: list[Verdict]
    only_first: list[str]
    only_second: list[str]
    other: list[Value]
    parameters: list[tuple[str, str, Any, Any]]
    equal: int

    @property
    def matters(self) -> bool:
        """Whether a verdict changed or a value moved beyond its interval."""
        return bool(self.beyond or self.verdicts)


def find(given: str) -> list[Path]:
    """The files of the store that a person named.

    Raises:
        BookError: saying what is accepted, or how to make what is missing.
    """
    path = Path(given)
    if path.suffix in (".json", ".parquet") and path.is_file():
        return [path]
    if given in PROFILES:
        path = BUILD / "results" / given / "results.json"
        if not path.exists():
            raise BookError(f"diff: the {given} profile has no results yet: make book PROFILE={given}")
        return [path]
    if given in sweeps():
        path = BUILD / "sweeps" / f"{given}.parquet"
        if not path.exists():
            raise BookError(f"diff: the sweep {given} has no table yet: nsm-book sweep {given}")
        return [path]
    if path.is_dir():
        own = path / "results.json"
        found = (
            [own]
            if own.exists()
            else sorted(
                file
                for file in path.rglob("results.json")
                if not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
        )
        if not found:
            raise BookError(f"diff: {path} holds no results.json; accepted: {ACCEPTED}")
        return found
    if not path.exists():
        raise BookError(f"diff: {unknown('store', given, [*PROFILES, *sweeps()])}, or {ACCEPTED}")
    raise BookError(f"diff: {path} is neither .json nor .parquet; accepted: {ACCEPTED}")


def read_json(path: Path) -> list[Run]:
    try:
        runs = json.loads(path.read_text())
        for run in runs:
            if "checksum" in run and run["checksum"] != checksum(run):
                raise ValueError(f"the record of {run['page']} is not as it was written")
        return [
            Run(run["page"], dict(run["all_parameters"]), {key: entry["value"] for key, entry in run["values"].items()})
            for run in runs
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BookError(f"diff: {path} is no results.json of this book, or not whole: {type(error).__name__} {error}") from None


def read_parquet(path: Path) -> list[Run]:
    """The runs of a `results.parquet`, one row a value, or of a sweep's table, one row a run."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path, page_checksum_verification=True).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise BookError(f"diff: {path} is no whole Parquet file: {' '.join(str(error).split())[:200]}") from None
    if rows and {"run", "page", "status"} <= rows[0].keys():

        def part(row, prefix):
            return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}

        return [
            Run(
                row["page"],
                part(row, "parameters."),
                {key: value for key, value in part(row, "values.").items() if value is not None},
            )
            for row in rows
            if row["status"] == "done"
        ]
    if not rows or not {"page", "profile", "parameters", "key", "value", "text"} <= rows[0].keys():
        raise BookError(f"diff: {path} is neither a results.parquet nor a sweep's table")
    found: dict[tuple, Run] = {}
    for row in rows:
        run = found.setdefault(
            (row["page"], row["profile"], row["parameters"]), Run(row["page"], json.loads(row["parameters"]), {})
        )
        run.values[row["key"]] = row["text"] if row["value"] is None else row["value"]
    return list(found.values())


def read_store(given: str) -> list[Run]:
    """All runs of the store that a person named.

    Raises:
        BookError: if there is no such store, or it is not whole.
    """
    return [run for path in find(given) for run in (read_json if path.suffix == ".json" else read_parquet)(path)]


def named(stores: tuple[list[Run], list[Run]]) -> list[dict[str, Run]]:
    """The runs of both stores by a name under which they meet.

    A page that no store holds twice meets under its own name, whatever its parameters; all others by those that differ.

    Raises:
        BookError: if one store holds the same run twice.
    """
    found: list[dict[str, Run]] = []
    pages = {run.page for store in stores for run in store}
    single = {page for page in pages if all(sum(run.page == page for run in store) < 2 for store in stores)}
    differing = {
        page: _differing([run.parameters for store in stores for run in store if run.page == page]) for page in pages - single
    }
    for store in stores:
        names: dict[str, Run] = {}
        for run in store:
            given = [] if run.page in single else differing[run.page]
            name = " ".join([run.page, *(f"{key}={run.parameters.get(key)!r}" for key in given)])
            if name in names:
                raise BookError(f"diff: one store holds two runs of {name}; compare a folder or a table that holds one of them")
            names[name] = run
        found.append(names)
    return found


def _differing(parameters: Sequence[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for given in parameters for name in given)
    return [name for name in names if len({repr(given.get(name)) for given in parameters}) > 1]


def interval(values: dict[str, Any], key: str) -> tuple[float, float] | None:
    """The interval that was glued with an estimate."""
    low, high = values.get(f"{key}_low"), values.get(f"{key}_high")
    return (low, high) if _is_number(low) and _is_number(high) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def moved(second: Any, span: tuple[float, float] | None) -> float:
    """How far a value lies outside an interval, in half-widths; 0 within it, or without one."""
    if span is None or not _is_number(second):
        return 0.0
    low, high = span
    outside = max(low - second, second - high, 0.0)
    return outside / ((high - low) / 2) if high > low else math.inf if outside else 0.0


def compare(first: list[Run], second: list[Run]) -> Comparison:
    """What differs between two stores; the first one's intervals count.

    Raises:
        BookError: as `named`.
    """
    one, other = named((first, second))
    values, verdicts, parameters, equal = [], [], [], 0
    for name in [name for name in one if name in other]:
        a, b = one[name].values, other[name].values
        given = one[name].parameters, other[name].parameters
        parameters += [(name, key, given[0].get(key), given[1].get(key)) for key in _differing(given)]
        for key in [key for key in a if key in b]:
            if key.endswith("_verdict"):
                claim = key.removesuffix("_verdict")
                if a[key] != b[key]:
                    why = [str(values.get(f"{claim}_reason", "")) for values in (a, b)]
                    verdicts.append(Verdict(name, claim, str(a[key]), str(b[key]), *why))
                continue
            if _told_with_another(key, a, b):
                continue
            span, other_span = interval(a, key), interval(b, key)
            if a[key] == b[key] and span == other_span:
                equal += 1
            else:
                values.append(Value(name, key, a[key], b[key], span, other_span, moved(b[key], span)))
    values.sort(key=lambda value: -value.moved)
    return Comparison(
        [value for value in values if value.moved],
        verdicts,
        _only(one, other),
        _only(other, one),
        [value for value in values if not value.moved],
        parameters,
        equal,
    )


def _told_with_another(key: str, a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether a value needs no line of its own: an end of an interval, the reason of a verdict, an n that stayed."""
    base, _, part = key.rpartition("_")
    if part in ("low", "high"):
        return base in a and base in b and interval(a, base) is not None and interval(b, base) is not None
    if part == "reason":
        return f"{base}_verdict" in a and f"{base}_verdict" in b
    return part == "n" and base in a and a[key] == b[key]


def _only(here: dict[str, Run], there: dict[str, Run]) -> list[str]:
    """Runs, and values of runs that both have, that one store alone has."""
    found = []
    for name, run in here.items():
        if name not in there:
            found.append(name)
        else:
            keys = [key for key in run.values if key not in there[name].values]
            follow = {f"{key}{end}" for key in keys for end in FOLLOWS}
            found += [f"{name}: {key}" for key in keys if key not in follow]
    return found


def _shown(value: Any, span: tuple[float, float] | None) -> str:
    text = f"{value:.6g}" if _is_number(value) else repr(value)
    return text + (f" [{span[0]:.4g}, {span[1]:.4g}]" if span else "")


def plain(text: str) -> Text:
    """What a store holds as the terminal shows it: neither markup nor control characters."""
    return Text("".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text))


def show(found: Comparison, first: str, second: str, console: Console) -> None:
    """Print a comparison, what matters most first."""

    def table(title: str, head: list[str], rows: list[list[str]]) -> None:
        if rows:
            drawn = Table(title=plain(f"{title} ({len(rows)})"), title_justify="left", box=None)
            for name in head:
                drawn.add_column(name, overflow="fold")
            for row in rows:
                drawn.add_row(*map(plain, row))
            console.print(drawn, "")

    def values(listed: list[Value]) -> list[list[str]]:
        return [
            [
                value.run,
                value.key,
                _shown(value.first, value.first_interval),
                _shown(value.second, value.second_interval),
                f"{value.moved:.2g}" if value.moved else "",
            ]
            for value in listed
        ]

    table("Moved beyond the interval of A", ["run", "value", "A", "B", "half-widths beyond"], values(found.beyond))
    table("Verdicts that changed", ["run", "claim", "A", "B", "A because", "B because"], list(map(list, found.verdicts)))
    table(f"Only in A: {first}", ["run or value"], [[name] for name in found.only_first])
    table(f"Only in B: {second}", ["run or value"], [[name] for name in found.only_second])
    table("Changed within the interval of A, or without one", ["run", "value", "A", "B", ""], values(found.other))
    table(
        "Parameters that differ",
        ["run", "parameter", "A", "B"],
        [[run, name, repr(a), repr(b)] for run, name, a, b in found.parameters],
    )
    console.print(
        Text(
            f"{len(found.beyond)} values beyond their interval, {len(found.verdicts)} verdicts changed, "
            f"{len(found.other)} other values changed, {found.equal} equal; {len(found.only_first)} only in A, "
            f"{len(found.only_second)} only in B"
        )
    )
