"""Measures how long merging and training take, in relation to each other.

    dimat bench merge|train|scale --out=FILE.json [--config=NAME --config.FIELD=VALUE]

merge: times a merge round by phase, and compares it with the schedule of the published
    code on the same images, with a merge on as few images as it takes, and with a local
    epoch. --agents names trained agents (the workdir of a run, a folder of PyTorch
    files, or an .npz file of stacked arrays), whose accuracy stands beside.
train: times a step of all agents together, and compares it with as many steps of one
    agent alone, and with a step in bfloat16.
scale: times a step of 1, 2, 5, ... agents, and compares the time for each agent with
    that of a single agent.

Each program that is compared runs in a process of its own, and the programs take turns.
Times are medians over --repeats, after a first call that compiles. Compare only times
within one file.
"""

from pathlib import Path

from absl import flags

from dimat_jax._bench import BENCHES
from dimat_jax._bench._record import Settings
from dimat_jax._metrics import write_json
from dimat_jax.cli import _bundled, _program
from dimat_jax.config import check
from dimat_jax.errors import UserError, nearest

__all__ = ["COMMAND"]


def define_flags() -> None:
    """Defines the flags of the command."""
    _bundled.define_config(
        "cifar100_resnet20:bench",
        "The config to time. By default cifar100_resnet20:bench, which needs no files.",
    )
    flags.DEFINE_string("out", None, "The JSON file to write.", required=True)
    settings = Settings()
    flags.DEFINE_integer(
        "repeats", settings.repeats, "The number of timings of each program.", 1
    )
    flags.DEFINE_integer(
        "steps", settings.steps, "The number of local steps in one timing.", 1
    )
    flags.DEFINE_string(
        "agents", settings.agents, "The trained agents that merge merges."
    )
    flags.DEFINE_bool(
        "full", settings.full, "Whether to measure also what takes over 10 minutes."
    )


def main(arguments: list[str]) -> None:
    """Runs the benchmark that the argument names."""
    if len(arguments) != 1 or arguments[0] not in BENCHES:
        given = " ".join(arguments)
        raise UserError(f"the benchmark is {given!r}; {nearest(given, BENCHES)}")
    given = flags.FLAGS
    bench, config = BENCHES[arguments[0]], _bundled.given_config()
    check(config)
    out = Path(given.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = Settings(given.repeats, given.steps, given.full, given.agents)
    result = bench.run(config, settings)
    write_json(out, {"bench": bench.name, **result, "config": config.to_dict()})
    print(bench.show(result))
    print(f"wrote {out}")


COMMAND = _program.Command("bench", __doc__, main, define_flags)
