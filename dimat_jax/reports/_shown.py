"""Figures that a notebook shows."""

import io

from matplotlib.figure import Figure

__all__ = ["ShownFigure"]


class ShownFigure(Figure):
    """A figure that notebooks show as the result of a cell.

    They show those of pyplot, which would choose a backend for the whole process.
    """

    def _repr_png_(self) -> bytes:
        """The figure as a picture, for IPython."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()
