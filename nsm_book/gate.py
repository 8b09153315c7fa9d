"""What may be published: a run without an error, a warning, a blank figure, a blank number, a script, or a typed verdict."""

import re
from typing import Any

from nbformat import NotebookNode

from nsm_book.html_safety import find_script
from nsm_book.schema import Claim, Page, claims_of
from nsm_book.strict import brief
from nsm_support.results import GLUE_MIME, verdict

GLUE_ROLE = re.compile(r"\{glue:\w*\}`([^`:]+)(?::[^`]*)?`")
PLOTLY = "application/vnd.plotly.v1+json"
KINDS = ("text/plain", "text/html", GLUE_MIME, PLOTLY, "image/png", "image/jpeg", "image/svg+xml")
ANSI = re.compile(r"\x1b\[[0-9;]*m")
Cells = list[tuple[str, NotebookNode]]  # with where each stands
Values = dict[str, dict[str, Any]]
INSERTED = {"injected-parameters", "papermill-error-cell-tag"}  # cells that papermill puts in
FENCE = re.compile(r"^(`{3,})(?!`)([^\n]*\n)(.*?)^\1`*[ \t]*$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"^%.*$", re.MULTILINE)
CODE = re.compile(r"(?<!`)(`{1,2})(?!`).+?(?<!`)\1(?!`)", re.DOTALL)  # and the names of roles
SHOWN_CODE = re.compile(r"(?<!`)``(?!`).+?(?<!`)``(?!`)", re.DOTALL)
VERDICT = re.compile(r"\b(?:supported|refuted|undecided)\b", re.IGNORECASE)
GLUED_VERDICT = re.compile(r"\{glue:\w*\}`[^`]*_verdict[:`]")
WORDS = r"(?:[^*_]{0,80}?[^\w*_])?(?:supported|refuted|undecided)(?:[^\w*_][^*_]{0,80}?)?"
EMPHASISED = re.compile(
    rf"(?<![\w*])\*{{1,3}}(?=[^\s*]){WORDS}(?<=[^\s*])\*{{1,3}}(?![\w*])"
    rf"|(?<!\w)_{{1,2}}(?=[^\s_]){WORDS}(?<=[^\s_])_{{1,2}}(?!\w)"
    rf"|<(?:em|strong|i|b)\b[^>]*>{WORDS.replace('[^*_]', '[^<>]')}</\w+>",
    re.IGNORECASE,
)


def _scraps(cell: NotebookNode) -> list[NotebookNode]:
    """What `glue` left in the outputs of a cell."""
    return [output.metadata.scrapbook for output in cell.get("outputs", ()) if "scrapbook" in output.get("metadata", {})]


def glued(notebook: NotebookNode) -> Values:
    """The values that a run handed over: name → {value, measured}."""
    scraps = [scrap for cell in notebook.cells for scrap in _scraps(cell)]
    return {scrap["name"]: {"value": scrap.get("value"), "measured": scrap.get("measured", False)} for scrap in scraps}


def mark_for_comparison(notebook: NotebookNode) -> None:
    """Tag the cells whose numbers have to come again, so that nbval compares them: all that glue, but the clock's."""
    for cell in notebook.cells:
        if (scraps := _scraps(cell)) and not any(scrap.get("measured") for scrap in scraps):
            cell.metadata.tags = [*cell.metadata.get("tags", []), "nbval-check-output"]


def output_problem(output: NotebookNode) -> str | None:
    """What keeps one output from being published, or None."""
    if output.output_type == "error":
        return f"{output.ename}: {output.evalue}\n" + ANSI.sub("", "\n".join(output.traceback))
    if output.output_type == "stream" and output.name == "stderr":
        return "wrote to stderr:\n" + output.text.rstrip()
    return _data_problem(output.get("data", {}))


def _data_problem(data: dict[str, Any]) -> str | None:
    if "text/html" in data:
        if (found := find_script(data["text/html"])) is not None:
            return f"its HTML holds {brief(found)}: accepts no script but the data of nsm_support.figures.show"
    elif PLOTLY in data:
        return "a plotly figure without HTML: show it with nsm_support.figures.show"
    elif any(kind.startswith("image/") for kind in data):
        return "an image without alt text: show it with nsm_support.figures.show"
    other = next((kind for kind in data if kind not in KINDS), None)
    return other and f"an output of the kind {brief(other)}: accepts text, tables, and what nsm_support.figures.show makes"


def _prose(source: str) -> str:
    """What a reader reads of a cell of Markdown: neither fenced code nor comments, but all that stands in directives."""
    return COMMENT.sub("", FENCE.sub(lambda f: f[2] + _prose(f[3]) if f[2].lstrip().startswith("{") else "", source))


def typed_verdicts(cell: NotebookNode) -> list[str]:
    """Verdicts that a hand wrote: emphasised as only those of a run are, or plain in a paragraph that has one of a run."""
    if cell.cell_type != "markdown":
        return []
    text = SHOWN_CODE.sub("", _prose(cell.source))
    mixed = [CODE.sub("", paragraph) for paragraph in re.split(r"\n\s*\n", text) if GLUED_VERDICT.search(paragraph)]
    plain = [word for paragraph in mixed for word in VERDICT.findall(EMPHASISED.sub("", paragraph))]
    return EMPHASISED.findall(CODE.sub("", text)) + plain


def _bad_outputs(page: Page, cells: Cells, values: Values) -> list[str]:
    outputs = [(where, output_problem(output)) for where, cell in cells for output in cell.get("outputs", ())]
    return [f"{where}: {problem}" for where, problem in outputs if problem] + [
        f"{page.name}: {key!r} is glued with a value that no table holds: {brief(entry['value'])}"
        for key, entry in values.items()
        if not _storable(entry["value"])
    ]


def _storable(value: object) -> bool:
    """Whether the book's tables, of whole numbers of 64 bits and of UTF-8, hold a value."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return not isinstance(value, str) or not any("\ud800" <= letter <= "\udfff" for letter in value)


def _bad_sentences(cells: Cells, values: Values) -> list[str]:
    """Roles without a value, and verdicts typed by hand."""
    texts = [(where, cell.source) for where, cell in cells if cell.cell_type == "markdown"]
    found = [f"{at}: no cell glues {key!r}" for at, text in texts for key in GLUE_ROLE.findall(text) if key not in values]
    accepted = "a verdict accepts *{glue:text}`ID_verdict`*, and a word that is only spoken of neither emphasis nor a verdict"
    typed = [(where, word) for where, cell in cells for word in typed_verdicts(cell)]
    return found + [f"{where}: {word} is typed by hand: {accepted} in its paragraph" for where, word in typed]


def _bad_answer(claim: Claim, values: Values, spoken: set[str]) -> list[str]:
    """What is wrong with a page's answer: missing, not by the claim's rule, or not in its prose."""
    try:
        keys = {"estimate": claim.id} | {part: f"{claim.id}_{part}" for part in ("low", "high", "n", "verdict")}
        answer = {part: values[key]["value"] for part, key in keys.items()}
        word = answer.pop("verdict")
        right = verdict(claim.rule.model_dump(), **answer)
    except KeyError as error:
        return [f"does not answer {claim.id!r} of book/claims.yml: no cell glues {error}"]
    except (ValueError, TypeError) as error:
        return [f"its answer to {claim.id!r} of book/claims.yml: {error}"]
    wrong = [f"{claim.id}_verdict is {word!r}, and the rule in book/claims.yml says {right!r}"] if word != right else []
    silent = f"no sentence says how {claim.id!r} came out: accepts {{glue:text}}`{claim.id}_verdict`"
    return wrong if f"{claim.id}_verdict" in spoken else [*wrong, silent]


def _bad_answers(page: Page, cells: Cells, values: Values) -> list[str]:
    texts = [SHOWN_CODE.sub("", _prose(cell.source)) for _, cell in cells if cell.cell_type == "markdown"]
    spoken = {key for text in texts for key in GLUE_ROLE.findall(text)}
    return [f"{page.name}: {line}" for claim in claims_of(page.name) for line in _bad_answer(claim, values, spoken)]


def problems(notebook: NotebookNode, page: Page, prose: bool = True) -> list[str]:
    """Everything that keeps an executed page from being published, each with its page and cell.

    `prose=False` lets the sentences be, which a rerun with other parameters may leave without some of their numbers.
    """
    own = [cell for cell in notebook.cells if not INSERTED & set(cell.metadata.get("tags", ()))]
    heads = [next(iter(cell.source.strip().splitlines()), "")[:60] for cell in own]
    cells = [(f"{page.name}, cell {place} ({head})", cell) for place, (head, cell) in enumerate(zip(heads, own, strict=True), 1)]
    values = glued(notebook)
    found = _bad_outputs(page, cells, values)
    if prose:
        found = found or _bad_sentences(cells, values) or _bad_answers(page, cells, values)
    if notebook.metadata.get("papermill", {}).get("exception") and not found:
        found.append(f"{page.name}: papermill reports an exception that no cell shows")
    return found
