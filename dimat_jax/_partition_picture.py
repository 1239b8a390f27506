"""A picture of a partition, drawn without the time that Matplotlib takes to start."""

import io

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw

__all__ = ["partition_picture"]

# The colours of no sample and of the largest count, as red, green and blue.
_NONE, _MOST = np.array([247, 251, 255]), np.array([8, 48, 107])
# The pixels that all cells together take at most along an axis, and one cell at most.
_PIXELS, _CELL = 960, 40
# The pixels of the margins for the numbers of agents and classes, which are drawn
# where a cell is large enough.
_MARGIN, _READABLE = 44, 20


def partition_picture(counts: Int[np.ndarray, "agents classes"]) -> bytes:
    """Draws how many samples of each class every agent has.

    Args:
        counts: the numbers of samples.

    Returns:
        A PNG file: a row for each agent and a column for each class. The darker a cell
        is, the more samples it stands for. Rows and columns are numbered from 0.
    """
    height, width = (_cell(n) for n in counts.shape)
    cells = _colours(counts).repeat(height, axis=0).repeat(width, axis=1)
    size = cells.shape[1] + _MARGIN, cells.shape[0] + _MARGIN
    picture = Image.new("RGB", size, "white")
    picture.paste(Image.fromarray(cells), (_MARGIN, _MARGIN))
    draw = ImageDraw.Draw(picture)
    draw.text((4, 4), "class", "black")
    draw.text((4, _MARGIN // 2), "agent", "black")
    for agent in range(len(counts)) if height >= _READABLE else ():
        middle = _MARGIN + agent * height + height // 2
        draw.text((_MARGIN - 6, middle), str(agent), "black", anchor="rm")
    for label in range(counts.shape[1]) if width >= _READABLE else ():
        middle = _MARGIN + label * width + width // 2
        draw.text((middle, _MARGIN - 6), str(label), "black", anchor="mb")
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _cell(n: int) -> int:
    """The pixels of each of n cells along an axis."""
    return max(1, min(_CELL, _PIXELS // n))


def _colours(table: Int[np.ndarray, "agents classes"]) -> UInt8[np.ndarray, "..."]:
    share = (table / max(table.max(), 1))[..., None]
    return np.round(_NONE + share * (_MOST - _NONE)).astype(np.uint8)
