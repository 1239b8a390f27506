"""Writes the tables and the figures of runs, or of sweeps, and prints the tables.

    dimat report DIR [DIR ...]
    dimat report DIR [DIR ...] --out=FOLDER

Every folder in or below a DIR that holds a metrics.jsonl is a run. Means are taken over
the runs that have finished; those that have diverged, have stopped early or are still
running are listed. A run that is found twice, or whose folder was copied, counts once.
Two different runs of the same config and seed are refused.

The command writes into FOLDER, which must be new or empty. By default it is a new
folder of the current directory: report, report-2, and so on.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dimat_jax import reports
from dimat_jax._folders import check_output
from dimat_jax.cli import _program
from dimat_jax.errors import UserError

__all__ = ["COMMAND", "report_on"]


def define_flags() -> None:
    """Defines the flag of the command."""
    flags.DEFINE_string(
        "out",
        None,
        "The folder for the report, which must be new or empty. By default it is a new "
        "folder of the current directory.",
    )


def main(directories: list[str]) -> None:
    """Makes the folder, and reports on the runs."""
    if not directories:
        raise UserError("expected the folders of runs: DIR [DIR ...]")
    folder = _make_folder(flags.FLAGS.out)
    try:
        report_on(directories, folder)
    except BaseException:
        # A folder that is not empty stays.
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise


def report_on(directories: Sequence[str | Path], folder: Path) -> None:
    """Writes a report into a folder, prints its tables, and names its files."""
    report, *others = reports.write(directories, folder)
    print(report.read_text())
    for path in (report, *others):
        print(f"wrote {path}")


def _make_folder(out: str | None) -> Path:
    """Makes the folder of a report.

    Raises:
        UserError: the folder that was asked for is not empty.
    """
    if out is not None:
        check_output(out, "--out")
        folder = Path(out)
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"--out={out} must be a new or an empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    folder, number = Path("report"), 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = Path(f"report-{number}")


COMMAND = _program.Command("report", __doc__, main, define_flags)
