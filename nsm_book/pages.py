"""What the book holds: its pages, their parameters, what they need and make, and what they may cost."""

import ast
import copy
import difflib
import io
import tokenize
import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from nsm_book import ROOT, BookError

BOOK = ROOT / "book"
BUILD = ROOT / "_build"
PROFILES = ("quick", "full")
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "Literal": Literal}


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """One executable page, as `book/pages.yml` describes it.

    `budget` is in seconds, `memory` in MB, `cores` how many of them its processes keep busy; `needs` and `makes` name files
    in the store of products.
    """

    name: str
    budget: dict[str, float] = field(hash=False)
    memory: int
    cores: int = 1
    needs: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()

    @property
    def source(self) -> Path:
        return BOOK / f"{self.name}.md"

    def run(self, profile: str) -> Path:
        """Where the executed notebook lies."""
        return BUILD / "runs" / profile / f"{self.name}.ipynb"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One line of a page's `parameters` cell: `name: type = default  # meaning`."""

    name: str
    type: str
    default: Any
    meaning: str

    def accept(self, value: Any, page: str) -> Any:
        """The value as the page's own type. Text (from a command line or a table) is read as that type first; what was accepted
        is accepted again as it is.

        Raises:
            BookError: naming the page, the parameter, its type and the value.
        """
        as_text = self.type == "str" or self.type.startswith("Literal[")
        read = value if as_text or not isinstance(value, str) else _literal(value)
        errors = []
        for one in (read, value):  # `5` is no `str | None`, and yet a text
            try:
                return _adapter(self.type).validate_python(one)
            except ValidationError as error:
                errors.append(error.errors(include_url=False)[0]["msg"])
        raise BookError(
            f"{page}: parameter {self.name} is {self.type} (default {self.default!r}), got {brief(read)}: {errors[0]}"
        )


def _literal(text: str) -> Any:
    """What a text says as a Python literal; the text itself if it is none, or quotes another text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python may refuse one day
            found = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
    return text if isinstance(found, str) else found


@cache
def _adapter(kind: str) -> TypeAdapter:
    """What holds a value to a parameter's type: strictly, and without what a result store or a command line cannot hold: NaN,
    infinity, whole numbers of more than 64 bits, null characters."""
    names = {**TYPES, "int": Annotated[int, Field(ge=-(2**63), lt=2**63)], "str": Annotated[str, Field(pattern=r"^[^\x00]*$")]}
    accepted = eval(kind, {"__builtins__": {}}, names)  # only the names in TYPES, checked when the page was read
    return TypeAdapter(accepted, config=ConfigDict(strict=True, allow_inf_nan=False))


def brief(value: Any) -> str:
    """A value as a message shows it: on one line, and not longer than a person reads."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes out no number of more than 4,300 digits, and no deep nest
        text = f"{type(value).__name__} too large to show"
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"


def read_yaml(name: str) -> Any:
    """What a YAML file under `book/` holds.

    Raises:
        BookError: naming the file and the line that is no YAML.
    """
    try:
        return yaml.safe_load((BOOK / name).read_text())
    except yaml.YAMLError as error:
        raise BookError(f"book/{name}: {error}") from None


@cache
def pages() -> dict[str, Page]:
    """All executable pages by name, in the order of `book/pages.yml`.

    Raises:
        BookError: if a page has no source, two pages make one product, or a product that is needed is made by none.
    """
    found = {}
    for name, entry in read_yaml("pages.yml").items():
        try:
            found[name] = Page(
                name=name,
                budget=entry["budget"],
                memory=entry["memory"],
                cores=entry.get("cores", 1),
                needs=tuple(entry.get("needs", ())),
                makes=tuple(entry.get("makes", ())),
            )
        except (KeyError, TypeError) as error:
            raise BookError(
                f"book/pages.yml: {name}: needs `budget: {{quick: seconds, full: seconds}}` and `memory: MB`; {error!r}"
            ) from None
        if not found[name].source.exists():
            raise BookError(f"book/pages.yml: {name}: there is no book/{name}.md")
    makers: dict[str, str] = {}
    for page in found.values():
        for product in page.makes:
            if product in makers:
                raise BookError(f"book/pages.yml: {product} is made by {makers[product]} and by {page.name}")
            makers[product] = page.name
    for page in found.values():
        for product in page.needs:
            if product not in makers:
                raise BookError(f"book/pages.yml: {page.name} needs {product}, which no page makes")
    return found


def page(name: str) -> Page:
    """The page of that name.

    Raises:
        BookError: naming the nearest page and all of them.
    """
    name = name.removeprefix("book/").removesuffix(".md")
    if name not in pages():
        raise BookError(unknown("page", name, pages()))
    return pages()[name]


def unknown(what: str, given: Any, accepted) -> str:
    """The sentence for a name that is not known: what was given, the nearest accepted name, and all of them."""
    near = difflib.get_close_matches(given[:100] if isinstance(given, str) else "", list(accepted), n=1)
    hint = f"; nearest: {near[0]}" if near else ""
    return f"unknown {what} {brief(given)}{hint}; accepted: {', '.join(accepted) or 'none'}"


def read(page: Page):
    """The page's notebook, as jupytext reads it from the Markdown source: a copy of the caller's own."""
    return copy.deepcopy(_read(page))


@cache
def _read(page: Page):
    import jupytext

    return jupytext.read(page.source)


@cache
def parameters(page: Page) -> dict[str, Parameter]:
    """The parameters of a page, read from its one cell tagged `parameters`, in order.

    Raises:
        BookError: if there is not exactly one such cell, or a line in it is not `name: type = default  # meaning`.
    """
    cells = [c for c in read(page).cells if c.cell_type == "code" and "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise BookError(f"book/{page.name}.md: needs exactly one cell tagged `parameters`, has {len(cells)}")
    source = cells[0].source
    found = {}
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise BookError(f"book/{page.name}.md: parameters cell, line {error.lineno}: {error.msg}") from None
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for node in body:
        where = f"book/{page.name}.md: parameters cell, line {node.lineno}"
        meaning = comments.get(node.end_lineno, "")
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value and meaning):
            raise BookError(f"{where}: accepts `name: type = default  # meaning` only")
        kind = ast.unparse(node.annotation)
        names = {n.id for n in ast.walk(node.annotation) if isinstance(n, ast.Name)}
        if not names <= TYPES.keys():
            raise BookError(f"{where}: type {kind}: accepts {', '.join(TYPES)} and lists of them")
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            raise BookError(
                f"{where}: the default of {node.target.id} has to be a literal, got {ast.unparse(node.value)}"
            ) from None
        parameter = Parameter(node.target.id, kind, default, meaning)
        parameter.accept(parameter.default, page.name)
        found[parameter.name] = parameter
    return found


def check(page: Page, given: dict[str, Any]) -> dict[str, Any]:
    """The given parameters with the page's own types: strict, and before any kernel starts.

    Raises:
        BookError: for an unknown name, a wrong type or an unparsable value.
    """
    accepted = parameters(page)
    for name in given:
        if name not in accepted:
            raise BookError(f"{page.name}: {unknown('parameter', name, accepted)}")
    return {name: accepted[name].accept(value, page.name) for name, value in given.items()}


def profile_parameters(page: Page, profile: str) -> dict[str, Any]:
    """What a profile changes on a page: nothing for `full`, the lines of `book/params/quick.yml` for `quick`."""
    if profile not in PROFILES:
        raise BookError(unknown("profile", profile, PROFILES))
    if profile == "full":
        return {}
    table = read_yaml(f"params/{profile}.yml") or {}
    for name in table:
        if name not in pages():
            raise BookError(f"book/params/{profile}.yml: {unknown('page', name, pages())}")
    try:
        return check(page, table.get(page.name) or {})
    except BookError as error:
        raise BookError(f"book/params/{profile}.yml: {error}") from None
