"""Writes the tables and the figures of runs, or of sweeps, and prints the tables.

    dimat report DIR [DIR ...]

Every folder in or below a DIR that holds a metrics.jsonl is a run. The command writes
report.md, report.csv and accuracy.png into the first DIR. It also writes bytes.png if
anything was sent, and partition.png if the runs say which agent holds which samples.
"""

from dimat_jax import reports
from dimat_jax.cli import _program
from dimat_jax.errors import UserError

__all__ = ["COMMAND", "main"]


def main(directories: list[str]) -> None:
    """Prints the tables and names the files."""
    if not directories:
        raise UserError("expected the folders of runs: DIR [DIR ...]")
    report, *others = reports.write(directories, directories[0])
    print(report.read_text())
    for path in (report, *others):
        print(f"wrote {path}")


COMMAND = _program.Command("report", __doc__, main)
