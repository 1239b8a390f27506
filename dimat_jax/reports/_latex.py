"""The tables of a report as LaTeX."""

from collections.abc import Iterable, Mapping

from dimat_jax.reports._runs import DataFrame
from dimat_jax.reports._tables import CONVENTION

__all__ = ["latex"]

# Characters that have a meaning in LaTeX, or that not all of its fonts have.
_WRITTEN = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}


def latex(tables: Mapping[str, DataFrame]) -> str:
    """Writes tables for the package booktabs, each as a `table` of its own.

    Args:
        tables: the tables by title, which becomes the caption.
    """
    parts = [
        f"% \\usepackage{{booktabs}}\n% {CONVENTION}",
        *(_table(title, table.reset_index()) for title, table in tables.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _table(title: str, table: DataFrame) -> str:
    rows = [_row(row) for row in table.itertuples(index=False)]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escaped(title)}}}",
        rf"\begin{{tabular}}{{{'l' * len(table.columns)}}}",
        r"\toprule",
        _row(table.columns),
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def _row(values: Iterable[object]) -> str:
    return " & ".join(map(_escaped, values)) + r" \\"


def _escaped(value: object) -> str:
    """A value as text; missing numbers are blank."""
    if isinstance(value, float):
        return "" if value != value else f"{value:.10g}"
    return "".join(_WRITTEN.get(character, character) for character in str(value))
