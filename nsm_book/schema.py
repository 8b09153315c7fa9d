"""What people write for the book, held to one schema: `book/pages.yml`, a page's parameters cell, `book/params/quick.yml`,
`book/claims.yml`, and, in `sweep_table`, `book/sweeps/NAME.yml`. Whatever is wrong is a `BookError` of one line."""

import ast
import copy
import io
import re
import tokenize
import warnings
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from nsm_book import ROOT, BookError
from nsm_book.strict import Entry, brief, one_line, parse_yaml, unknown, validate

BOOK, BUILD = ROOT / "book", ROOT / "_build"
PROFILES = ("quick", "full")
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "Literal": Literal}
PARAMETERS = re.compile(  # as jupytext writes a code cell tagged `parameters`
    r"^(?P<fence>`{3,})\{code-cell\}.*\n(?::.*\n)*?:tags: \[(?:.*\W)?parameters(?:\W.*)?\]\n(?::.*\n)*\n*"
    r"(?P<source>(?:(?!(?P=fence)).*\n)*?)(?P=fence)`*[ \t]*$",
    re.MULTILINE,
)


def read_text(name: str) -> str:
    """A file under `book/`; a BookError if there is none, or it is not UTF-8."""
    try:
        return (BOOK / name).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BookError(f"book/{name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BookError(f"book/{name}: byte {error.start}: accepts UTF-8 only") from None


def read_yaml(name: str) -> Any:
    """What a YAML file under `book/` holds, to be read only; a BookError names the line that is no YAML, or repeats a key."""
    text = read_text(name)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise BookError(f"book/{name}: {error}") from None


def _mapping(name: str) -> dict[Any, Any]:
    found = read_yaml(name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise BookError(f"book/{name}: accepts `PAGE: {{key: value}}`, got {brief(found)}")
    return found


def _all_profiles(budget: dict) -> dict:
    for profile in budget:
        if profile not in PROFILES:
            raise ValueError(unknown("profile", profile, PROFILES))
    if lacking := [profile for profile in PROFILES if profile not in budget]:
        raise ValueError(f"needs seconds for each profile, has none for {', '.join(lacking)}")
    return budget


Profile = Literal["quick", "full"]
Product = Annotated[str, Field(pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)*$")]
Products = Annotated[tuple[Product, ...], Field(strict=False)]  # YAML has lists only
Count = Annotated[int, Field(gt=0)]


class Page(Entry):
    """One executable page, as `book/pages.yml` describes it.

    `budget` is in seconds, `memory` in MB, `cores` how many of them its processes keep busy; `needs` and `makes` name files
    in the store of products; a page that `reads_results` comes after all others, whose results it reads.
    """

    name: Annotated[str, Field(pattern=r"^[\w-]+(/[\w-]+)*$")]
    budget: Annotated[dict[str, Annotated[float, Field(gt=0)]], AfterValidator(_all_profiles)]
    memory: Count
    cores: Count = 1
    needs: Products = ()
    makes: Products = ()
    reads_results: bool = False

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def source(self) -> Path:
        return BOOK / f"{self.name}.md"

    def run_file(self, profile: str) -> Path:
        """Where the executed notebook lies."""
        return BUILD / "runs" / profile / f"{self.name}.ipynb"


@cache
def pages() -> dict[str, Page]:
    """All executable pages by name, in the order of `book/pages.yml`; a BookError if a page has no source, two pages make one
    product, or none makes what another needs."""
    found: dict[str, Page] = {}
    makers: dict[str, str] = {}
    for name, entry in _mapping("pages.yml").items():
        where = f"book/pages.yml: {one_line(name)}"
        page = validate(Page, {"name": name, **entry} if isinstance(entry, dict) else entry, where)
        if page.name != name or not page.source.is_file():
            raise BookError(f"{where}: there is no book/{page.name}.md")
        found[page.name] = page
        for product in page.makes:
            if product in makers:
                raise BookError(f"{where}: makes {product}, which {makers[product]} makes already")
            makers[product] = page.name
    for page in found.values():
        if lacking := [product for product in page.needs if product not in makers]:
            raise BookError(f"book/pages.yml: {page.name}: needs {lacking[0]}, which no page makes")
    return found


def page(name: str) -> Page:
    """The page of that name, or of the file `book/NAME.md`; a BookError names the nearest one and all of them."""
    name = name.removeprefix("book/").removesuffix(".md")
    if name not in pages():
        raise BookError(unknown("page", name, pages()))
    return pages()[name]


def read_notebook(page: Page):
    """The page's notebook, as jupytext reads it: a copy of the caller's own; a BookError if it has another parameters cell."""
    text = read_text(f"{page.name}.md")
    notebook = copy.deepcopy(_notebook(text))
    tagged = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    if tagged != [match["source"].rstrip() for match in PARAMETERS.finditer(text)]:
        raise BookError(f"book/{page.name}.md: needs its parameters in a code cell of their own, with `:tags: [parameters]`")
    return notebook


@lru_cache(maxsize=64)
def _notebook(text: str):
    import jupytext

    return jupytext.reads(text, fmt="md")


def title(page: Page) -> str:
    """The title of a page, as its source has it."""
    head = re.search(r"^# +(.+)$", re.sub(r"\A---\n.*?\n---\n", "", read_text(f"{page.name}.md"), flags=re.DOTALL), re.MULTILINE)
    if not head:
        raise BookError(f"book/{page.name}.md: has no title: needs a line `# Title`")
    return head[1].strip()


@dataclass(frozen=True, slots=True)
class Parameter:
    """One line of a page's `parameters` cell: `name: type = default  # meaning`."""

    name: str
    type: str
    default: Any
    meaning: str

    def accept(self, value: Any, page_name: str) -> Any:
        """The value as the parameter's type, or a BookError. Text (from a command line or a table) is read as that type first;
        what was accepted is accepted again as it is."""
        as_text = self.type == "str" or self.type.startswith("Literal[")
        read = value if as_text or not isinstance(value, str) else _literal(value)
        errors = []
        for candidate in (read, value):  # `5` is no `str | None`, and yet a text
            try:
                return _adapter(self.type).validate_python(candidate)
            except ValidationError as error:
                errors.append(error.errors(include_url=False)[0]["msg"])
        about = f"parameter {self.name} is {self.type} (default {self.default!r})"
        raise BookError(f"{page_name}: {about}, got {brief(read)}: {errors[0]}")


@lru_cache(maxsize=10_000)
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
    accepted = eval(kind, {"__builtins__": {}}, names)  # a page's own annotation
    return TypeAdapter(accepted, config=ConfigDict(strict=True, allow_inf_nan=False))


@cache
def parameters(page: Page) -> dict[str, Parameter]:
    """The parameters of a page, in order; a BookError unless it has one cell tagged `parameters`, in which every line is
    `name: type = default  # meaning`."""
    file, text = f"book/{page.name}.md", read_text(f"{page.name}.md")
    cells = list(PARAMETERS.finditer(text))
    if len(cells) != 1:
        raise BookError(f"{file}: needs exactly one code cell with `:tags: [parameters]`, has {len(cells)}")
    source, above = cells[0]["source"], text.count("\n", 0, cells[0].start("source"))
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise BookError(f"{file}: line {above + (error.lineno or 1)}: parameters cell: {error.msg}") from None
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    found: dict[str, Parameter] = {}
    for node in body:
        try:
            parameter = _read_line(node, comments.get(node.end_lineno or 0))
            if parameter.name in found:
                raise ValueError(f"{parameter.name} stands there twice")
        except ValueError as error:
            raise BookError(f"{file}: line {above + node.lineno}: parameters cell: {error}") from None
        parameter.accept(parameter.default, page.name)
        found[parameter.name] = parameter
    return found


def _read_line(node: ast.stmt, meaning: str | None) -> Parameter:
    if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value and meaning):
        raise ValueError("accepts `name: type = default  # meaning` only")
    kind, name = ast.unparse(node.annotation), node.target.id
    try:
        _adapter(kind)
    except Exception:  # whatever Python or pydantic has against it
        raise ValueError(f"type {kind}: accepts {', '.join(TYPES)} and lists of them") from None
    try:
        return Parameter(name, kind, ast.literal_eval(node.value), meaning)
    except (ValueError, TypeError):
        raise ValueError(f"the default of {name} has to be a literal, got {ast.unparse(node.value)}") from None


def check_parameters(page: Page, given: dict[str, Any]) -> dict[str, Any]:
    """The given parameters with the page's own types; a BookError for an unknown name or a value of another type."""
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
    file = f"params/{profile}.yml"
    table = _mapping(file)
    for name, given in table.items():
        if name not in pages():
            raise BookError(f"book/{file}: {unknown('page', name, pages())}")
        if not isinstance(given, dict):
            raise BookError(f"book/{file}: {name}: accepts `{{parameter: value}}`, got {brief(given)}")
    try:
        return check_parameters(page, table.get(page.name, {}))
    except BookError as error:
        raise BookError(f"book/{file}: {error}") from None


Comparison = Annotated[str, Field(pattern=r"^(estimate|low|high) (<|<=|>|>=) -?[0-9]+(\.[0-9]+)?$")]


class Rule(Entry):
    """What decides a claim: comparisons such as `low > 0`, and the least number of independent units behind a verdict."""

    supported: Comparison
    refuted: Comparison
    min_n: Annotated[int, Field(ge=2)]


class Claim(Entry):
    """A question that was written down before the run, the page that answers it, and the rule that decides."""

    id: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    question: Annotated[str, Field(pattern=r"\?$")]
    page: str
    metric: Annotated[str, Field(min_length=10)]
    rule: Rule


def claims() -> list[Claim]:
    """All claims, in the order of `book/claims.yml`; a BookError names the entry and what is wrong with it."""
    found: dict[str, Claim] = {}
    entries = read_yaml("claims.yml")
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries], start=1):
        where = f"book/claims.yml: {one_line(entry['id']) if isinstance(entry, dict) and 'id' in entry else f'entry {number}'}"
        claim = validate(Claim, entry, where)
        if claim.id in found:
            raise BookError(f"{where}: stands there twice")
        if claim.page not in pages():
            raise BookError(f"{where}: {unknown('page', claim.page, pages())}")
        found[claim.id] = claim
    return list(found.values())


def claims_of(page_name: str) -> list[Claim]:
    """The claims that a page has to answer."""
    return [claim for claim in claims() if claim.page == page_name]
