"""Text of runs in pages, and the anchors that claims are linked to."""

import re
from typing import Any

import nbformat


def plain(text: Any) -> str:
    """Text that a Markdown page or a block of HTML in it shows as it stands: whatever may mean something to HTML, Markdown,
    MyST or a formula, or may end the block, stands as a character reference."""
    return re.sub(r"[^\w .,=/-]|(?<![^\W_])_|_(?![^\W_])", lambda match: f"&#{ord(match[0])};", str(text))


def anchored(notebook: nbformat.NotebookNode, ids: list[str]) -> None:
    """Give, for each claim, the nearest heading above the cell that answers it a label, so that the ledger can lead there."""
    for id in ids:
        answers = [
            any(output.get("metadata", {}).get("scrapbook", {}).get("name") == id for output in cell.get("outputs", ()))
            for cell in notebook.cells
        ]
        for cell in reversed(notebook.cells[: answers.index(True)]):
            lines = cell.source.split("\n")
            place = last_heading(lines) if cell.cell_type == "markdown" else None
            if place is not None:
                cell.source = "\n".join([*lines[:place], f"(claim-{id.replace('_', '-')})=", *lines[place:]])
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
