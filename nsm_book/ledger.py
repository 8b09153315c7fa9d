"""`results/claims`: every question that was written down before the runs, and what came of it."""

import html
import re
from typing import Any

import nbformat

from nsm_book import BookError
from nsm_book.gate import answer_keys
from nsm_book.markup import Cell, linked, number, raw
from nsm_book.schema import claims, page, pages, title
from nsm_support.results import RULE, Claim, in_words, reason, verdict

NAME = "results/claims"
WORDS = ("supported", "refuted", "undecided")
COUNTED = {
    "supported": "the rule for yes holds",
    "refuted": "the rule for no holds",
    "undecided": "neither holds, too few independent runs, or not measured in this run",
}
# Told apart by shape: a disc, a square, a ring. The colours, from the style sheet, only repeat it.
MARKS = {
    "supported": '<circle cx="{x}" cy="10" r="5.5"/>',
    "refuted": '<rect x="{left}" y="5" width="10" height="10"/>',
    "undecided": '<circle class="hollow" cx="{x}" cy="10" r="4.5"/>',
}


def anchor(id: str) -> str:
    """What the section that answers a claim can be linked to as."""
    return f"claim-{id.replace('_', '-')}"


def anchored(notebook: nbformat.NotebookNode, ids: list[str]) -> None:
    """Name, for each claim, the nearest heading above the cell that answers it, so that the ledger can lead there."""
    for id in ids:
        glues = [
            any(output.get("metadata", {}).get("scrapbook", {}).get("name") == id for output in cell.get("outputs", ()))
            for cell in notebook.cells
        ]
        for cell in reversed(notebook.cells[: glues.index(True)]):
            lines = cell.source.split("\n")
            place = last_heading(lines) if cell.cell_type == "markdown" else None
            if place is not None:
                cell.source = "\n".join([*lines[:place], f"({anchor(id)})=", *lines[place:]])
                break


def last_heading(lines: list[str]) -> int | None:
    """The index of the last line that is a heading, and no comment within a fence; None without one."""
    found, fence = None, ""
    for index, line in enumerate(lines):
        mark = re.match(r"(`{3,}|:{3,}|~{3,})", line)
        if mark and (not fence or line.strip() == fence):
            fence = "" if fence else mark[1]
        elif not fence and re.match(r"#{1,6} ", line):
            found = index
    return found


def answers(records: dict[str, dict[str, Any]]) -> list[tuple[dict[str, Any], Claim]]:
    """Each claim and what its page answered, in the order of `book/claims.yml`.

    Raises:
        BookError: with every claim that its page did not answer, or did not answer by its rule.
    """
    found, wrong = [], []
    for asked in claims():
        entry = asked.model_dump()
        id, rule = entry["id"], entry["rule"]
        values = records.get(entry["page"], {}).get("values", {})
        given = {field: values.get(key, {}).get("value") for field, key in answer_keys(id).items()}
        word = given.pop("verdict")
        if None in given.values() or word is None:
            wrong.append(f"{NAME}: {id}: {entry['page']} did not answer it")
        elif word != (right := verdict(rule, **given)):
            wrong.append(f"{NAME}: {id}: {entry['page']} says {word!r}, and the rule says {right!r}")
        else:
            found.append((entry, Claim(id, *given.values(), word, reason(rule, word, given["n"]))))
    if wrong:
        raise BookError("\n".join(wrong))
    return found


def scale(rule: dict[str, Any], answer: Claim) -> tuple[dict[str, float], list[float]]:
    """Where estimate, low and high lie between −1 and 1, with the bound of `supported` at 0 and its side to the right;
    and where the two bounds lie, which are mostly one."""
    bounds = [float(RULE.match(rule[word])[3]) for word in ("supported", "refuted")]
    right = 1 if RULE.match(rule["supported"])[2].startswith(">") else -1
    points = {"estimate": answer.estimate, "low": answer.low, "high": answer.high}
    half = max(abs(value - bounds[0]) for value in [*points.values(), *bounds]) or 1.0
    return (
        {name: right * (value - bounds[0]) / half for name, value in points.items()},
        sorted({right * (bound - bounds[0]) / half for bound in bounds}),
    )


def shown(answer: Claim) -> list[str]:
    """Estimate, low and high as text; dashes where a run does not answer the question."""
    return [number(value if answer.n else None) for value in (answer.estimate, answer.low, answer.high)]


def strip(rule: dict[str, Any], answer: Claim) -> str:
    """A dot and its interval beside the bound, as SVG."""
    estimate, low, high = shown(answer)
    points, bounds = scale(rule, answer)
    x = {name: 100 + 90 * value for name, value in points.items()}
    numbers = f"estimate {estimate}, interval {low} to {high}, " if answer.n else ""
    words = html.escape(f"{numbers}{answer.verdict}: {answer.reason}")
    lines = "".join(f'<path class="bound" d="M{100 + 90 * bound:.1f} 0V20"/>' for bound in bounds)
    mark = (
        ""
        if answer.n == 0
        else (
            f'<path class="interval" d="M{x["low"]:.1f} 10H{x["high"]:.1f}"/>'
            + MARKS[answer.verdict].format(x=f"{x['estimate']:.1f}", left=f"{x['estimate'] - 5:.1f}")
        )
    )
    return (
        f'<svg class="{answer.verdict}" viewBox="0 0 200 20" role="img" aria-label="{words}">'
        f'<path class="base" d="M0 10H200"/>{lines}{mark}</svg>'
    )


def rule_words(rule: dict[str, Any]) -> str:
    return f"supported if {in_words(rule['supported'])}, refuted if {in_words(rule['refuted'])}; n at least {rule['min_n']}"


def told_answer(entry: dict[str, Any], answer: Claim) -> str:
    """A question, which leads to the section that answers it, its verdict, the numbers behind it and the rule."""
    there = Cell(entry["question"], f"../{entry['page']}.html#{anchor(answer.id)}")
    estimate, low, high = shown(answer)
    interval = f"{low} to {high}" if answer.n else low
    numbers = f"because {answer.reason}. Estimate {estimate}, 95 % interval {interval}, n = {answer.n}."
    return (
        f'<dt id="{answer.id}">{linked(there)}</dt><dd><strong>{answer.verdict}</strong>, {html.escape(numbers)}</dd>'
        f"<dd>Rule: {html.escape(rule_words(entry['rule']))}.</dd><dd>Measured: {html.escape(entry['metric'])}.</dd>"
    )


def picture(parts: dict[str, list[tuple[dict[str, Any], Claim]]]) -> str:
    """All claims at one glance: verdict, dot and interval, question."""
    rows = []
    for name, part in parts.items():
        rows.append(f'<p class="nsm-part">{html.escape(re.sub(r"[`*$]", "", title(page(name))))}</p>')
        rows += [
            f'<p class="nsm-claim"><span>{answer.verdict}</span>{strip(entry["rule"], answer)}'
            f'<a href="#{answer.id}">{html.escape(entry["question"])}</a></p>'
            for entry, answer in part
        ]
    caption = (
        "For each question the estimate and its 95 % interval, on a scale of its own. The vertical line is what the rule "
        "compares with: to its right lies what the rule calls supported. Two lines: one bound for supported, another "
        "for refuted. Disc: supported; square: refuted; ring: undecided; no mark: not measured in this run."
    )
    return f'<figure class="nsm-ledger" id="fig-ledger"><figcaption>{caption}</figcaption>{"".join(rows)}</figure>'


def ledger_page(records: dict[str, dict[str, Any]], order: list[str]) -> str:
    """The text of the page.

    Args:
        records: what `nsm_book.collect` read of each page, by its name.
        order: all pages as the reader finds them.

    Raises:
        BookError: as `answers`.
    """
    found = answers(records)
    parts = {name: [both for both in found if both[0]["page"] == name] for name in order if name in pages()}
    parts = {name: part for name, part in parts.items() if part}
    count = {word: sum(answer.verdict == word for _, answer in found) for word in WORDS}
    told = ", ".join(f"**{count[word]} {word}**" for word in WORDS)
    lines = [
        "# What was asked, and what came of it",
        "",
        "Every question below stands in `book/claims.yml` with the rule that decides it, written down before the run that "
        f"decided; where one was added or changed later, its page says so. Questions: {len(found)}; {told}.",
        "",
        *(f"- *{word}*: {meaning}" for word, meaning in COUNTED.items()),
        "",
        "The verdicts in the book's sentences are these; a page that says otherwise is not published.",
        "",
        raw(picture(parts)),
        "",
    ]
    for name, part in parts.items():
        told = "".join(told_answer(entry, answer) for entry, answer in part)
        lines += [
            f"## {title(page(name))}",
            "",
            f"From [](../{name}.md); each question leads to the section that answers it.",
            "",
            raw(f'<dl class="nsm-answers">{told}</dl>'),
            "",
        ]
    return "\n".join(lines)
