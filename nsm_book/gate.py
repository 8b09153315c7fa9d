"""What may be published: a run without an error, a warning, a blank figure or a blank number."""

import html
import re
from typing import Any

import nbformat

from nsm_book.schema import Page, brief, claims_of
from nsm_support.results import GLUE_MIME, verdict

GLUE_ROLE = re.compile(r"\{glue:\w*\}`([^`:]+)(?::[^`]*)?`")
PLOTLY = "application/vnd.plotly.v1+json"
FENCE = re.compile(r"^(`{3,})(?!`)([^\n]*\n)(.*?)^\1`*[ \t]*$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"^%.*$", re.MULTILINE)
CODE = re.compile(r"(?<!`)(`{1,2})(?!`).+?(?<!`)\1(?!`)", re.DOTALL)  # and the names of roles
SHOWN_CODE = re.compile(r"(?<!`)``(?!`).+?(?<!`)``(?!`)", re.DOTALL)
WORDS = r"(?:[^*_]{0,80}?[^\w*_])?(?:supported|refuted|undecided)(?:[^\w*_][^*_]{0,80}?)?"
TYPED = re.compile(
    rf"(?<![\w*])\*{{1,3}}(?=[^\s*]){WORDS}(?<=[^\s*])\*{{1,3}}(?![\w*])"
    rf"|(?<!\w)_{{1,2}}(?=[^\s_]){WORDS}(?<=[^\s_])_{{1,2}}(?!\w)"
    rf"|<(?:em|strong|i|b)\b[^>]*>{WORDS.replace('[^*_]', '[^<>]')}</\w+>",
    re.IGNORECASE,
)
PLAIN = re.compile(r"\b(?:supported|refuted|undecided)\b", re.IGNORECASE)
SAYS_VERDICT = re.compile(r"\{glue:\w*\}`[^`]*_verdict[:`]")
ANSI = re.compile(r"\x1b\[[0-9;]*m")
KINDS = ("text/plain", "text/html", GLUE_MIME, PLOTLY, "image/png", "image/jpeg", "image/svg+xml")
# HTML in which every < begins a tag or a comment that is read here as a browser reads it: it can hide none.
VALUE = r"""(?:\s*=\s*(?:"[^"<]*"|'[^'<]*'))?"""
TOKEN = re.compile(rf"[^<]+|<!--[^<>]*-->|<(/?[a-z][\w:-]*)((?:\s+[\w:.-]+{VALUE})*)\s*/?>", re.IGNORECASE | re.ASCII)
ATTRIBUTE = re.compile(rf"\s+([\w:.-]+)({VALUE})", re.ASCII)
ACTIVE = {
    "script",
    "iframe",
    "frame",
    "object",
    "embed",
    "applet",
    "base",
    "meta",
    "link",
    "form",
    "portal",
    "set",
    "animate",
    "animatemotion",
    "animatetransform",
}  # what runs code, loads it, or puts it in later
SCRIPT_URL = re.compile(r"(?:javascript|vbscript|data(?!:image/(?:png|jpeg|gif)[;,])):", re.IGNORECASE)


def glued(notebook: nbformat.NotebookNode) -> dict[str, dict]:
    """The values that a run handed over: name → {value, measured}."""
    scraps = [
        output.metadata.scrapbook
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "scrapbook" in output.get("metadata", {})
    ]
    return {scrap["name"]: {"value": scrap.get("value"), "measured": scrap.get("measured", False)} for scrap in scraps}


def mark_for_comparison(notebook: nbformat.NotebookNode) -> None:
    """Tag the cells whose numbers have to come again, so that nbval compares them: all that glue, but the clock's."""
    for cell in notebook.cells:
        scraps = [output.metadata.scrapbook for output in cell.get("outputs", ()) if "scrapbook" in output.get("metadata", {})]
        if scraps and not any(scrap.get("measured") for scrap in scraps):
            cell.metadata.tags = [*cell.metadata.get("tags", []), "nbval-check-output"]


def output_problem(output: nbformat.NotebookNode) -> str | None:
    """What keeps one output from being published, or None."""
    if output.output_type == "error":
        return f"{output.ename}: {output.evalue}\n" + ANSI.sub("", "\n".join(output.traceback))
    if output.output_type == "stream" and output.name == "stderr":
        return "wrote to stderr:\n" + output.text.rstrip()
    data = output.get("data", {})
    if PLOTLY in data and "text/html" not in data:
        return "a plotly figure without HTML: show it with nsm_support.figures.show"
    if any(kind.startswith("image/") for kind in data) and "text/html" not in data:
        return "an image without alt text: show it with nsm_support.figures.show"
    for kind in data:
        if kind not in KINDS:
            return f"an output of the kind {brief(kind)}: accepts text, tables, and what nsm_support.figures.show makes"
    found = active(data["text/html"]) if "text/html" in data else None
    return found and f"its HTML holds {brief(found)}: accepts no script but the data of nsm_support.figures.show"


def active(text: str) -> str | None:
    """The first piece of some HTML that may run code in a reader's browser, or is not plainly written; None without one.

    Data are no code: a `script` of the type application/json, as the book's figures have it, is none that runs.
    """
    place = 0
    while place < len(text):
        token = TOKEN.match(text, place)
        if token is None:
            return text[place : place + 60]
        place, tag, given = token.end(), (token[1] or "").lower(), {}
        for name, value in ATTRIBUTE.findall(token[2] or ""):
            given.setdefault(name.lower(), html.unescape(value.lstrip("= \t\r\n\f\v")[1:-1]))  # of two, a browser takes the first
        runs = tag in ACTIVE and (tag != "script" or given.get("type") != "application/json")
        if (
            runs
            or any(name.startswith("on") or name == "srcdoc" for name in given)
            or any(
                SCRIPT_URL.match(re.sub(r"[\x00-\x20]", "", value))
                for name, value in given.items()
                if not name.startswith(("aria-", "data-")) and name not in ("alt", "title")
            )
        ):  # these are only words
            return token[0]
    return None


def prose_of(source: str) -> str:
    """What a reader is told by a cell of Markdown: neither fenced code nor comments, but all that stands in directives."""

    def kept(fence: re.Match) -> str:
        return fence[2] + prose_of(fence[3]) if fence[2].lstrip().startswith("{") else ""

    return COMMENT.sub("", FENCE.sub(kept, source))


def typed_verdicts(cell: nbformat.NotebookNode) -> list[str]:
    """Verdicts that a hand wrote: emphasised as only those of a run are, or plain in a paragraph that has one of a run."""
    if cell.cell_type != "markdown":
        return []
    text = SHOWN_CODE.sub("", prose_of(cell.source))
    told = [paragraph for paragraph in re.split(r"\n\s*\n", text) if SAYS_VERDICT.search(paragraph)]
    return [
        *TYPED.findall(CODE.sub("", text)),
        *(word for paragraph in told for word in PLAIN.findall(TYPED.sub("", CODE.sub("", paragraph)))),
    ]


def storable(value: object) -> bool:
    """Whether the book's tables, of whole numbers of 64 bits and of UTF-8, hold a value."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return not isinstance(value, str) or not any("\ud800" <= letter <= "\udfff" for letter in value)


def problems(notebook: nbformat.NotebookNode, page: Page, prose: bool = True) -> list[str]:
    """Everything that keeps an executed page from being published, each with its page and cell.

    `prose=False` lets the sentences be, which a rerun with other parameters may leave without some of their numbers.
    """
    inserted = {"injected-parameters", "papermill-error-cell-tag"}
    cells = [cell for cell in notebook.cells if not inserted & set(cell.metadata.get("tags", ()))]
    keys = glued(notebook)
    where = {
        id(cell): f"{page.name}, cell {number} ({next(iter(cell.source.strip().splitlines()), '')[:60]})"
        for number, cell in enumerate(cells, start=1)
    }
    found = [
        f"{where[id(cell)]}: {problem}"
        for cell in cells
        for output in cell.get("outputs", ())
        if (problem := output_problem(output))
    ]
    found += [
        f"{page.name}: {key!r} is glued with a value that no table holds: {brief(entry['value'])}"
        for key, entry in keys.items()
        if not storable(entry["value"])
    ]
    if prose and not found:
        found = [
            f"{where[id(cell)]}: no cell glues {key!r}"
            for cell in cells
            if cell.cell_type == "markdown"
            for key in GLUE_ROLE.findall(cell.source)
            if key not in keys
        ]
        found += [
            f"{where[id(cell)]}: {word} is typed by hand: a verdict accepts *{{glue:text}}`ID_verdict`*, and a word that "
            "is only spoken of neither emphasis nor a verdict in its paragraph"
            for cell in cells
            for word in typed_verdicts(cell)
        ]
    if prose and not found:
        texts = [SHOWN_CODE.sub("", prose_of(cell.source)) for cell in cells if cell.cell_type == "markdown"]
        said = {key for text in texts for key in GLUE_ROLE.findall(text)}
        found = unanswered(page.name, keys, said)
    if notebook.metadata.get("papermill", {}).get("exception") and not found:
        found.append(f"{page.name}: papermill reports an exception that no cell shows")
    return found


def answer_keys(id: str) -> dict[str, str]:
    """Under which names a run glues its answer to a claim."""
    return {"estimate": id, **{field: f"{id}_{field}" for field in ("low", "high", "n", "verdict")}}


def unanswered(page: str, values: dict[str, dict[str, Any]], said: set[str]) -> list[str]:
    """What keeps a page's run from the ledger: a claim that it does not answer, not by its rule, or not in its prose.

    Args:
        values: what the run glued, `{name: {"value": …}}`.
        said: the names that its prose speaks.
    """
    found = []
    for claim in claims_of(page):
        name = claim.id
        try:
            answer = {field: values[key]["value"] for field, key in answer_keys(name).items()}
        except KeyError as error:
            found.append(f"{page}: does not answer {name!r} of book/claims.yml: no cell glues {error}")
            continue
        word = answer.pop("verdict")
        try:
            right = verdict(claim.rule.model_dump(), **answer)
        except (ValueError, TypeError) as error:
            found.append(f"{page}: its answer to {name!r} of book/claims.yml: {error}")
            continue
        if word != right:
            found.append(f"{page}: {name}_verdict is {word!r}, and the rule in book/claims.yml says {right!r}")
        if f"{name}_verdict" not in said:
            found.append(f"{page}: no sentence says how {name!r} came out: accepts {{glue:text}}`{name}_verdict`")
    return found
