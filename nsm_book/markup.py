"""The few pieces of HTML that the pages under `results/` are put together from. Everything that varies is escaped here."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Cell(NamedTuple):
    """A cell of a table: what it says, and perhaps where it leads or what it is called."""

    text: str
    link: str | None = None
    id: str | None = None


def number(value: float | int | None) -> str:
    """A number as a table shows it: three digits that count, thousands in full; a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    whole = abs(value) >= 1000 or float(value).is_integer()
    return (f"{value or 0:,.0f}" if whole else f"{value:.3g}").replace("-", "−")


def linked(cell: Cell) -> str:
    """A cell's text, escaped, in its link."""
    text = html.escape(cell.text)
    return f'<a href="{html.escape(cell.link)}">{text}</a>' if cell.link else text


def table(head: Sequence[str], rows: Iterable[Sequence[str | Cell]], label: str) -> str:
    """A table that scrolls by itself where it is wider than the page, and that the keyboard reaches.

    The first cell of each row names it.
    """
    lines = []
    for row in rows:
        cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]
        names = [f' id="{html.escape(cell.id)}"' if cell.id else "" for cell in cells]
        lines.append(
            f'<tr><th scope="row"{names[0]}>{linked(cells[0])}</th>'
            + "".join(f"<td{name}>{linked(cell)}</td>" for name, cell in zip(names[1:], cells[1:], strict=True))
            + "</tr>"
        )
    columns = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    return (
        f'<div class="nsm-table" role="region" tabindex="0" aria-label="{html.escape(label)}"><table class="table">'
        f"<thead><tr>{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def folded(summary: str, body: str) -> str:
    """HTML that is there when it is asked for."""
    return f'<details class="nsm-fold"><summary>{html.escape(summary)}</summary>{body}</details>'


def plain(text: Any) -> str:
    """Text that a Markdown page or a block of HTML in it shows as it stands: whatever may mean something to HTML, Markdown,
    MyST or a formula, or may end the block, stands as a character reference."""
    return re.sub(r"[^\w .,=/-]|(?<![^\W_])_|_(?![^\W_])", lambda match: f"&#{ord(match[0])};", str(text))


def raw(text: str) -> str:
    """HTML as a block of a MyST page that nothing reads as Markdown."""
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return f"{fence}{{raw}} html\n{text}\n{fence}"
