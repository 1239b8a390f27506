"""How lines look: each has a colour, a dash and a mark, in pictures and on the page."""

from typing import Any, NamedTuple

__all__ = ["CELLS", "Look", "look"]

# The colours of Okabe and Ito (2008), which people with any common form of colour
# blindness can tell apart, without yellow, which is too faint on white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# The dash changes after seven lines, when the colours are used up. Plain dashes are not
# among them: they are for lines that send nothing. The second form is Bokeh's.
_DASHES = (
    ("-", "solid"),
    ("-.", "dashdot"),
    (":", "dotted"),
    ((0, (5, 1, 1, 1, 1, 1)), "10 2 2 2 2 2"),
)
# There are as many marks as make the first 252 lines look different.
_MARKS = (
    ("o", "circle"),
    ("s", "square"),
    ("^", "triangle"),
    ("D", "diamond"),
    ("v", "inverted_triangle"),
    ("*", "star"),
    ("h", "hex"),
    ("P", "plus"),
    ("X", "x"),
)

CELLS = "cividis"
"""The colour map of heat maps of accuracies, which also survives a print in grey."""


class Look(NamedTuple):
    """The look of a line.

    Attributes:
        color: its colour, as "#RRGGBB".
        dash: Matplotlib's line style.
        mark: Matplotlib's marker.
        page_dash: Bokeh's line dash.
        page_mark: Bokeh's marker.
    """

    color: str
    dash: Any
    mark: str
    page_dash: str
    page_mark: str


def look(number: int) -> Look:
    """The look of the line with a number, from 0 on."""
    dash, page_dash = _DASHES[number // len(_COLORS) % len(_DASHES)]
    mark, page_mark = _MARKS[number % len(_MARKS)]
    return Look(_COLORS[number % len(_COLORS)], dash, mark, page_dash, page_mark)
