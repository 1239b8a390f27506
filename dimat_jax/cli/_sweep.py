"""Runs a sweep: many configs, one after the other, and a report on all of them.

    dimat sweep --sweep=NAME --workdir=DIR [--data_dir=DATA]

NAME is a bundled sweep (`dimat show sweeps`) or the path of a file that defines
`get_runs() -> {name: config}`. Each run has a folder of its own, DIR/name. Runs that
pre-train the same agents share them, in DIR/pretrained. The same command goes on with a
sweep that was killed. A run whose loss is not finite does not keep the others from
running.
"""

from pathlib import Path

from absl import flags

from dimat_jax import train
from dimat_jax.cli import _bundled, _program, _report
from dimat_jax.config import Config, check, set_if_read
from dimat_jax.errors import NonFiniteError
from dimat_jax.experiment import check_network
from dimat_jax.placement import request_cpu_devices

__all__ = ["COMMAND"]


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("sweep", None, "The sweep to run.", required=True)
    flags.DEFINE_string("workdir", None, "The folder for all runs.", required=True)
    flags.DEFINE_string("data_dir", None, "Replaces every config's data.dir.")


def main(arguments: list[str]) -> None:
    """Runs the sweep and reports on it."""
    _program.expect_no(arguments)
    workdir = Path(flags.FLAGS.workdir)
    runs = _bundled.load_runs(flags.FLAGS.sweep)
    for config in runs.values():
        _prepare(config, workdir)
    request_cpu_devices(max(c.placement.cpu_devices for c in runs.values()))
    failures = []
    for number, (name, config) in enumerate(runs.items(), 1):
        print(f"[{number}/{len(runs)}] {name}", flush=True)
        try:
            train.run(config, workdir / name)
        except NonFiniteError as error:
            failures.append(f"{name}: {error}")
            print(failures[-1], flush=True)
    _report.main([str(workdir)])
    if failures:
        raise NonFiniteError("; ".join(failures))


def _prepare(config: Config, workdir: Path) -> None:
    """Checks a config before the first run takes hours, and sets its folders."""
    check(config)
    check_network(config)
    if flags.FLAGS.data_dir:
        set_if_read(config, "data.dir", flags.FLAGS.data_dir)
    if not config.pretrain.cache_dir:
        set_if_read(config, "pretrain.cache_dir", str(workdir / "pretrained"))


COMMAND = _program.Command("sweep", __doc__, main, define_flags, resumes=True)
