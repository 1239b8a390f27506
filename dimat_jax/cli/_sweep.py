"""Runs a sweep: many configs, one after the other, and a report on them all.

    python -m experiments.sweep --sweep=configs/sweeps/quickstart.py --workdir=DIR

A sweep file has a function `get_runs() -> {name: config}`. Each run goes to its own
folder DIR/name; runs that pre-train the same agents share them, in DIR/pretrained. The
same command goes on with a sweep that was killed. A run whose loss is not finite does
not keep the others from running.
"""

import importlib.util
from pathlib import Path

from absl import flags

from dimat_jax import train
from dimat_jax.config import Config, check
from dimat_jax.errors import NonFiniteError, UserError
from dimat_jax.experiment import check_network
from dimat_jax.placement import request_cpu_devices
from experiments import program, report

_SWEEP = flags.DEFINE_string("sweep", None, "The sweep file.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where all runs go.", required=True)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Replaces every run's data.dir.")


def load_runs(path: str) -> dict[str, Config]:
    """The configs of a sweep file, by name.

    Raises:
        UserError: no such file, or one without `get_runs`.
    """
    if not Path(path).is_file():
        raise UserError(f"no sweep file {path}")
    spec = importlib.util.spec_from_file_location("sweep", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_runs"):
        raise UserError(f"{path} defines no get_runs() -> {{name: config}}")
    return module.get_runs()


def main(arguments: list[str]) -> None:
    """Runs the sweep."""
    program.expect_no(arguments)
    workdir = Path(_WORKDIR.value)
    runs = load_runs(_SWEEP.value)
    for config in runs.values():
        # Before the first of them runs for hours.
        check(config)
        check_network(config)
        if _DATA_DIR.value:
            config.data.dir = _DATA_DIR.value
        if not config.pretrain.cache_dir:
            config.pretrain.cache_dir = str(workdir / "pretrained")
    request_cpu_devices(max(c.placement.cpu_devices for c in runs.values()))
    failures = []
    for number, (name, config) in enumerate(runs.items(), 1):
        print(f"[{number}/{len(runs)}] {name}", flush=True)
        try:
            train.run(config, workdir / name)
        except NonFiniteError as error:
            failures.append(f"{name}: {error}")
            print(failures[-1], flush=True)
    report.main([str(workdir)])
    if failures:
        raise NonFiniteError("; ".join(failures))


if __name__ == "__main__":
    program.run(main)
