"""The book's figures and tables: one palette, one look, both themes, and words for whoever cannot see them.

`show` shows a figure of Matplotlib or plotly, `table` a pandas DataFrame. `intervals` draws estimates; `explore` makes a figure
that a reader moves, and its still twin, from one description.
"""

from nsm_support.figures.estimates import intervals
from nsm_support.figures.explorer import Bars, Explorer, Heat, Line, Panel, explore
from nsm_support.figures.show import COLORS, GRID, INK, PALETTE, STATIC, interactive, setup_style, show, svg
from nsm_support.figures.tables import table

__all__ = [
    "COLORS", "GRID", "INK", "PALETTE", "STATIC", "Bars", "Explorer", "Heat", "Line", "Panel", "explore", "interactive",
    "intervals", "setup_style", "show", "svg", "table",
]  # fmt: skip
