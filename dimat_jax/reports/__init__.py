"""Reports on runs: reading them, tables, and figures.

    runs = reports.load("runs/quickstart")
    reports.tables(runs)["Mean test accuracy of the agents (%)"]  # a pandas.DataFrame
    reports.accuracy_figure(runs)  # a matplotlib Figure
    reports.write(["runs/quickstart"], "runs/quickstart")  # all of it, as files

pandas and matplotlib are imported when a function that needs them is first used. The
figures do not touch pyplot: they need no display, and they leave the backend that a
notebook has chosen as it is.
"""

from typing import TYPE_CHECKING

from dimat_jax._lazy import importer, public_names

if TYPE_CHECKING:
    from dimat_jax.reports._figures import accuracy_figure as accuracy_figure
    from dimat_jax.reports._figures import bytes_figure as bytes_figure
    from dimat_jax.reports._figures import curves_figure as curves_figure
    from dimat_jax.reports._maps import agents_figure as agents_figure
    from dimat_jax.reports._maps import classes_figure as classes_figure
    from dimat_jax.reports._maps import partition_figure as partition_figure
    from dimat_jax.reports._runs import Partition as Partition
    from dimat_jax.reports._runs import Runs as Runs
    from dimat_jax.reports._runs import describe as describe
    from dimat_jax.reports._runs import load as load
    from dimat_jax.reports._tables import tables as tables
    from dimat_jax.reports._write import write as write
else:
    _HOMES = {
        "_figures": ["accuracy_figure", "bytes_figure", "curves_figure"],
        "_maps": ["agents_figure", "classes_figure", "partition_figure"],
        "_runs": ["Partition", "Runs", "describe", "load"],
        "_tables": ["tables"],
        "_write": ["write"],
    }
    __all__ = [name for names in _HOMES.values() for name in names]
    __getattr__ = importer(__name__, _HOMES)


def __dir__() -> list[str]:
    return public_names(__name__)
