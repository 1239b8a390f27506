"""What a benchmark is, and the settings and tables that all benchmarks share."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tabulate import tabulate

from dimat_jax._bench._hardware import Hardware
from dimat_jax.config import Config

__all__ = ["Bench", "Settings", "table"]


class Settings(NamedTuple):
    """How thoroughly a benchmark measures.

    Attributes:
        repeats: the number of timings of each side, after the first call.
        steps: the number of local steps in one timing.
        full: whether the benchmark also measures what takes more than 10 minutes.
        hardware: the machines for which `scale` predicts the speed.
        agents: the path of trained agents; "" for untrained ones.
    """

    repeats: int = 3
    steps: int = 5
    full: bool = False
    hardware: Hardware = Hardware()
    agents: str = ""


class Bench(NamedTuple):
    """A benchmark.

    Attributes:
        name: the word after `dimat bench`.
        run: `run(config, settings) -> result` measures. The result consists of what
            JSON can hold. It raises UserError for a config that it cannot measure.
        show: `show(result) -> text` writes the result as tables for people.
        times_a_config: whether `run` reads the config. If it does not, --config is
            refused.
    """

    name: str
    run: Callable[[Config, Settings], dict[str, Any]]
    show: Callable[[dict[str, Any]], str]
    times_a_config: bool = True


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Writes a Markdown table. Numbers have three digits, and None is an empty cell."""
    shown = [[_cell(value) for value in row] for row in rows]
    return tabulate(
        shown,
        header,
        tablefmt="pipe",
        disable_numparse=True,
        colalign=("left", *("right",) * (len(header) - 1)),
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
