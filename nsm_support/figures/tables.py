"""A pandas DataFrame as a table that everybody can read: escaped, with row headers, and scrolling by itself."""

import html
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame


def cell_text(value: Any) -> str:
    """A value as a table shows it: three digits that count, thousands in full, "−" for a minus; a dash for none."""
    import pandas as pd

    if pd.api.types.is_scalar(value) and pd.isna(value):
        return "–"
    if pd.api.types.is_bool(value) or not pd.api.types.is_number(value):
        return str(value)
    whole = abs(value) >= 1000 or float(value).is_integer()
    return (f"{value or 0:,.0f}" if whole else f"{value:.3g}").replace("-", "−")


def table(
    frame: "DataFrame",
    *,
    label: str,
    links: Mapping[tuple[int, Hashable], str] | None = None,
    ids: Sequence[str] | None = None,
    folded: str | None = None,
) -> None:
    """Show a DataFrame, without its index, as a table that scrolls by itself and that the keyboard reaches.

    Args:
        frame: its first column names the rows; numbers are shown with three digits that count, text as it is.
        label: what the table holds, in words, for whoever does not see it.
        links: (row position, column) → address that this cell leads to.
        ids: an anchor for each row.
        folded: a line that stands in the table's place until a reader opens it.

    Raises ValueError without a label or a column, or for links or ids that do not fit the frame.
    """
    from IPython.display import display

    links, columns = links or {}, list(frame.columns)
    if not label.strip() or not columns:
        raise ValueError(f"table: label={label!r} and {len(columns)} columns; accepts a sentence, and a column at least")
    for row, column in links:
        if row not in range(len(frame)) or column not in columns:
            cells = f"(row 0 to {len(frame) - 1}, column name)"
            raise ValueError(f"table({label!r}): no cell {(row, column)!r} to link; accepts {cells}")
    if ids is not None and len(ids) != len(frame):
        raise ValueError(f"table({label!r}): {len(ids)} ids for {len(frame)} rows; one a row is accepted")
    rows = []
    for place, values in enumerate(frame.itertuples(index=False, name=None)):
        first, *rest = (_linked(value, links.get((place, column))) for column, value in zip(columns, values, strict=True))
        anchor = f' id="{html.escape(ids[place])}"' if ids else ""
        rows.append(f'<tr{anchor}><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>')
    head = "".join(f'<th scope="col">{html.escape(str(column))}</th>' for column in columns)
    text = (
        f'<div class="nsm-table" role="region" tabindex="0" aria-label="{html.escape(label)}"><table class="table">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    if folded is not None:
        text = f'<details class="nsm-fold"><summary>{html.escape(folded)}</summary>{text}</details>'
    display({"text/html": text, "text/plain": f"Table: {label}\n{frame.to_string(index=False)}"}, raw=True)


def _linked(value: Any, link: str | None) -> str:
    text = html.escape(cell_text(value))
    return f'<a href="{html.escape(link)}">{text}</a>' if link else text
