"""What a page hands over: numbers for its prose, claims for the ledger, files for other pages.

Numbers travel inside the executed notebook, as display data under `metadata.scrapbook`, where myst-nb's `{glue:text}`
and `nsm_book.collect` both find them. Nothing is written beside the notebook but the products.
"""

import math
import operator
import os
import re
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from nsm_support.extras import extra

NUMBERS = ("estimate", "low", "high", "n")
GLUE_MIME = "application/papermill.record/text/plain"
RULE = re.compile(r"^(estimate|low|high) (<|<=|>|>=) (-?\d+(?:\.\d+)?)$")
SIGNS = {"<": "below", "<=": "at most", ">": "above", ">=": "at least"}
COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


class Claim(NamedTuple):
    """One line of the ledger: what was asked in `book/claims.yml`, and what a run answered, and why."""

    id: str
    estimate: float
    low: float
    high: float
    n: int
    verdict: str | None
    reason: str | None


class Interval(Protocol):
    """A number, its 95 % interval and the independent units behind it: `nsm_support.statistics.Estimate`, or alike."""

    @property
    def estimate(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def n(self) -> int: ...


def glue(key: str | None = None, value: Any = None, /, *, measured: bool = False, **values: Any) -> None:
    """Hand values to the prose (`{glue:text}`) and the result store: `glue("loss", 0.1)`, or many, `glue(loss=0.1, steps=300)`.

    Args:
        key: name of the value, unique on its page.
        value: a number, a string, or an estimate with `estimate`, `low`, `high` and `n`, which becomes four values: `key`,
            `key_low`, `key_high`, `key_n`.
        measured: True for seconds, bytes and whatever else the clock decides. Everything else has to come out the same when the
            page is run again, and the tests hold it to that.

    Raises TypeError for a value that is none of these; ValueError for a number that is not finite: a blank in a sentence is never
    what was meant.
    """
    if key is not None:
        _glue(key, value, measured)
    for name, one in values.items():
        _glue(name, one, measured)


def _glue(key: str, value: Any, measured: bool) -> None:
    if all(hasattr(value, field) for field in NUMBERS):
        for field in NUMBERS:
            _glue(key if field == "estimate" else f"{key}_{field}", getattr(value, field), measured)
        return
    if hasattr(value, "item"):
        value = value.item()  # a NumPy or torch scalar
    if not isinstance(value, (bool, int, float, str)):
        raise TypeError(f"glue({key!r}): accepts a number, a string or an estimate, got {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"glue({key!r}): the value is {value}, which no sentence can use")
    from IPython.display import display

    scrap = {"name": key, "mime_prefix": "application/papermill.record/", "value": value, "measured": measured}
    display({GLUE_MIME: repr(value)}, raw=True, metadata={"scrapbook": scrap})


def parse(comparison: str) -> tuple[str, str, str]:
    """The parts of a comparison such as `low > 0`: what is compared, the sign, the bound.

    Raises ValueError if it is no comparison of the estimate or an end of its interval with a number.
    """
    match = RULE.match(comparison)
    if match is None:
        raise ValueError(f"rule {comparison!r} is not of the form 'estimate|low|high <|<=|>|>= number'")
    return match[1], match[2], match[3]


def verdict(rule: dict[str, Any], *, estimate: float, low: float, high: float, n: int) -> str:
    """Apply a decision rule that was written down before the run.

    Args:
        rule: `supported` and `refuted`, each a comparison such as `low > 0`, and `min_n`, the least number of independent units
            behind a verdict.
        estimate, low, high, n: the estimate, its 95 % interval and the number of independent units; n = 0 says that this run does
            not answer the question, whatever the three others are.

    Returns `supported`, `refuted` or `undecided`. Undecided is the answer whenever n is below `min_n`. Raises ValueError if the
    interval does not hold the estimate, or if both comparisons hold.
    """
    if not low <= estimate <= high:
        raise ValueError(f"the interval [{low}, {high}] does not hold the estimate {estimate}")
    if n < rule["min_n"]:
        return "undecided"
    values = {"estimate": estimate, "low": low, "high": high}
    holding = []
    for word in ("supported", "refuted"):
        name, sign, bound = parse(rule[word])
        if COMPARE[sign](values[name], float(bound)):
            holding.append(word)
    if len(holding) == 2:
        raise ValueError(f"both 'supported: {rule['supported']}' and 'refuted: {rule['refuted']}' hold for {values}")
    return holding[0] if holding else "undecided"


def in_words(comparison: str) -> str:
    """`low > 0`, say, as a sentence: "the whole interval is above 0"."""
    name, sign, bound = parse(comparison)
    whole = (name, sign[0]) in {("low", ">"), ("high", "<")}
    parts = {"estimate": "the estimate", "low": "its lower end", "high": "its upper end"}
    subject = "the whole interval" if whole else parts[name]
    return f"{subject} is {SIGNS[sign]} {bound}"


def reason(rule: dict[str, Any], word: str, n: int) -> str:
    """Which part of the rule made a verdict, in words for the prose."""
    if n == 0:
        return "this run did not measure at the size asked about"
    if n < rule["min_n"]:
        return f"n = {n}, and the rule asks for {rule['min_n']}"
    if word != "undecided":
        return in_words(rule[word])
    bounds = {parse(rule[word])[2] for word in ("supported", "refuted")}
    if len(bounds) == 1:
        return f"the interval holds {bounds.pop()}"
    return f"neither is it so that {in_words(rule['supported'])}, nor that {in_words(rule['refuted'])}"


def _upward(name: str) -> Path | None:
    """The nearest folder, from the working one upward, that holds this file."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / name).exists()), None)


def _claims_file() -> Path | None:
    """The questions of the book at hand: the file that NSM_BOOK_CLAIMS names, else the nearest `book/claims.yml`, if any."""
    if given := os.environ.get("NSM_BOOK_CLAIMS"):
        return Path(given)
    folder = _upward("book/claims.yml")
    return folder / "book/claims.yml" if folder else None


def claim(id: str, found: Interval | None = None, *, measured: bool = False, **numbers: float) -> Claim:
    """Answer one question of `book/claims.yml` and glue the answer, so that the prose can only repeat it.

    Glues `ID` (the estimate), `ID_low`, `ID_high`, `ID_n`, `ID_verdict` and `ID_reason`. Where no book is at hand (neither
    NSM_BOOK_CLAIMS nor a `book/claims.yml` upward from the working folder) there is no rule: verdict and reason are None.

    Args:
        id: of the claim.
        found: an estimate of `nsm_support.statistics`, or anything with `estimate`, `low`, `high` and `n`; or these four by name.
            A run that measured at another size than the question's gives n = 0: the ledger then shows neither estimate nor
            interval.
        measured: as in `glue`, for claims about seconds.

    Raises KeyError if the claim was not written down beforehand; the message lists those that were. Raises TypeError for
    anything but an estimate or its four numbers, and ValueError as `verdict`.
    """
    given: dict[str, Any] = numbers if found is None else {field: getattr(found, field, None) for field in NUMBERS}
    if set(given) != set(NUMBERS) or None in given.values() or (found is not None and numbers):
        raise TypeError(f"claim({id!r}): accepts an estimate, or {', '.join(NUMBERS)} by name; got {found!r} and {numbers}")
    estimate, low, high, n = float(given["estimate"]), float(given["low"]), float(given["high"]), int(given["n"])
    path, word, why = _claims_file(), None, None
    if path is not None:
        with extra("book"):
            import yaml
        rules = {entry["id"]: entry["rule"] for entry in yaml.safe_load(path.read_text())}
        if id not in rules:
            raise KeyError(f"claim {id!r} does not stand in {path}, which holds: {', '.join(sorted(rules))}")
        word = verdict(rules[id], estimate=estimate, low=low, high=high, n=n)
        why = reason(rules[id], word, n)
    answer = Claim(id, estimate, low, high, n, word, why)
    glue(id, answer, measured=measured)
    if path is not None:
        glue(f"{id}_verdict", word, measured=measured)
        glue(f"{id}_reason", why, measured=measured)
    return answer


def _product(name: str, variable: str) -> Path:
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"product {name!r}: accepts a relative path inside the store, such as 'visualization/digits.pt'")
    if variable in os.environ:
        return Path(os.environ[variable]) / path
    if (checkout := _upward("book/pages.yml")) is None:
        where = f"a folder in {variable}, or a checkout (that holds book/pages.yml) at {Path.cwd()} or above it"
        raise FileNotFoundError(f"product {name!r}: there is no store; accepts {where}")
    return checkout / "_build/products/interactive" / path


def write_product(name: str) -> Path:
    """Where this page puts a file that other pages need; `pages.yml` names it under `makes`."""
    path = _product(name, "NSM_BOOK_MAKES")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def read_product(name: str) -> Path:
    """Where a file lies that another page made; `pages.yml` names it under `needs`.

    In a notebook that the pipeline does not run, it is the first there is of: the one that the other page made in the same way,
    the published one, the quick profile's. Raises FileNotFoundError if that page has not run yet, or there is no store; the
    message says what to do.
    """
    if "NSM_BOOK_MAKES" in os.environ and (own := _product(name, "NSM_BOOK_MAKES")).exists():  # made in this run
        return own
    path = _product(name, "NSM_BOOK_NEEDS")
    if "NSM_BOOK_NEEDS" not in os.environ:
        stores = path.parents[len(Path(name).parts)]
        path = next((at for profile in ("interactive", "full", "quick") if (at := stores / profile / name).exists()), path)
    if not path.exists():
        advice = "run the page that makes it first (book/pages.yml says which; `make book` runs them in order)"
        raise FileNotFoundError(f"product {name!r} is not at {path}: {advice}")
    return path
