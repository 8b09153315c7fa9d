"""A text whose tokens stand on coloured grounds."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.patches import Rectangle

LINE = 54  #: characters of a line: so many can be read on a phone


def write_text(
    axis: Axes, words: Sequence[str], values: Sequence[float], *, norm: Normalize, colors: Colormap, label: str
) -> None:
    """Write tokens one after the other, each on a ground that has the colour of its value, and the scale below.

    A line end is shown as ¶. Letters are black, so take light colours. Raises ValueError if there are not as many values as
    tokens.
    """
    if len(words) != len(values):
        raise ValueError(f"write_text: {len(words)} tokens and {len(values)} values; as many of each are accepted")
    x = y = 0
    for word, value in zip(words, values, strict=True):
        shown = word.replace("\n", "¶")
        if x and x + len(shown) > LINE:
            x, y = 0, y + 1
        axis.add_patch(Rectangle((x, y), len(shown), 0.92, facecolor=colors(norm(float(value))), edgecolor="white", lw=0.5))
        axis.text(x, y + 0.48, shown.replace("$", r"\$"), va="center", color="black", family="monospace", fontsize=11.5)
        x += len(shown)
    axis.set(xlim=(0, LINE), ylim=(y + 1.2, -0.2))
    axis.axis("off")
    axis.figure.colorbar(ScalarMappable(norm, colors), ax=axis, label=label, location="bottom", aspect=50, shrink=0.8)
