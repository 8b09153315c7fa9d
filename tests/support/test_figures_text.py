"""Tokens on coloured grounds: each colour is its value's, every token is there, and no line is too long."""

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import Normalize

from nsm_support.figures.text import LINE, write_text


def drawn(words, values):
    figure, axis = plt.subplots()
    colors = plt.get_cmap("viridis")
    write_text(axis, words, values, norm=Normalize(0, 2), colors=colors, label="α")
    plt.close(figure)
    return axis, colors


def test_every_token_stands_on_the_colour_of_its_value_where_the_one_before_it_ends():
    words = ["In", " the", " beginning\n", "$x$"]
    axis, colors = drawn(words, [0.0, 1.0, 2.0, 0.5])
    assert [text.get_text() for text in axis.texts] == ["In", " the", " beginning¶", r"\$x\$"]
    assert [patch.get_facecolor() for patch in axis.patches] == [colors(v) for v in (0.0, 0.5, 1.0, 0.25)]
    assert [patch.get_x() for patch in axis.patches] == [0, 2, 6, 17] and {patch.get_y() for patch in axis.patches} == {0}
    assert [patch.get_width() for patch in axis.patches] == [2, 4, 11, 3]


def test_a_line_is_broken_before_it_is_too_long_and_a_long_token_stands_alone():
    axis, _ = drawn(["a" * 30] * 3 + ["b" * (LINE + 9), "c"], [0.0] * 5)
    assert [(patch.get_x(), patch.get_y()) for patch in axis.patches] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4)]


def test_a_value_is_asked_of_every_token():
    with pytest.raises(ValueError, match="2 tokens and 1 values"):
        drawn(["a", "b"], [1.0])
