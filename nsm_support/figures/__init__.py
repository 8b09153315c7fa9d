"""The book's figures and tables: one palette, one look, both themes, and words for whoever cannot see them.

`show` shows a figure of Matplotlib or plotly, `table` a pandas DataFrame.
"""

from nsm_support.figures.show import COLORS, GRID, INK, PALETTE, STATIC, interactive, setup_style, show, svg
from nsm_support.figures.tables import table

__all__ = ["COLORS", "GRID", "INK", "PALETTE", "STATIC", "interactive", "setup_style", "show", "svg", "table"]
