"""Measures how long merging and training take, in relation to each other.

    dimat bench merge|train|scale --out=FILE.json [--config=NAME --config.FIELD=VALUE]
    dimat bench gpt2 --out=FILE.json

merge: times a merge round by phase, and compares it with the schedule of the published
    code on the same images, with a merge on as few images as it takes, and with a local
    epoch. --agents names trained agents (the workdir of a run, a folder of PyTorch
    files, or an .npz file of stacked arrays); their accuracy is then measured too.
train: compares the images per second of all agents together, of one agent alone and of
    one model in a plain Flax loop and in a plain PyTorch loop, in float32 and bfloat16.
scale: times steps and merges of 1, 2, 5, ... agents, up to the config's number or until
    ten minutes are over, and fits how time and memory grow. A cost model predicts 64 to
    4096 agents on the hardware that --bandwidth, --latency, --agents_per_device and
    --speed describe.
gpt2: derives the spec of a GPT-2 of 124 million parameters, verifies it, and finds the
    permutations that were planted in a copy, by weights. It reads no config. A call
    takes minutes on few cores, so --repeats=1 is a good choice.

Each program that is compared runs in a process of its own, and the programs take turns.
Times are medians over --repeats, after a first call that compiles. A ratio is the
median of the ratios within one turn. Compare only times within one file.
"""

from pathlib import Path

from absl import flags

from dimat_jax._bench._benches import BENCHES
from dimat_jax._bench._hardware import Hardware
from dimat_jax._bench._record import Settings
from dimat_jax._folders import check_output_file
from dimat_jax._metrics import write_json
from dimat_jax.cli import _bundled, _program
from dimat_jax.config import check
from dimat_jax.errors import UserError, nearest

__all__ = ["COMMAND"]

# The benchmarks that read a flag, for flags that not all benchmarks read.
_ONLY_FOR = {
    "agents": ("merge",),
    **dict.fromkeys(Hardware._fields, ("scale",)),
    **dict.fromkeys(["steps", "full"], ("merge", "train", "scale")),
}


def define_flags() -> None:
    """Defines the flags of the command."""
    _bundled.define_config(
        "cifar100_resnet20:bench",
        "The config to time. By default cifar100_resnet20:bench, which needs no files. "
        "`dimat show options` lists the fields that may be overridden.",
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

    hardware = Hardware()
    text = "For scale: "
    flags.DEFINE_float(
        "bandwidth", hardware.bandwidth, text + "what a device sends, in Gbit/s.", 1e-9
    )
    flags.DEFINE_float(
        "latency", hardware.latency, text + "the milliseconds of a message.", 0
    )
    flags.DEFINE_integer(
        "agents_per_device",
        hardware.agents_per_device,
        text + "the number of agents that share a device.",
        1,
    )
    flags.DEFINE_float(
        "speed",
        hardware.speed,
        text + "how many times faster a device computes than this machine.",
        1e-9,
    )


def _settings(bench: str) -> Settings:
    """Returns the settings that the flags describe.

    Raises:
        UserError: the benchmark does not read one of the flags that are given.
    """
    given = flags.FLAGS
    for name, readers in _ONLY_FOR.items():
        if bench not in readers and given[name].present:
            for_them = " and ".join(readers)
            raise UserError(f"--{name} is for {for_them}; {bench} does not read it")
    hardware = Hardware(
        given.bandwidth, given.latency, given.agents_per_device, given.speed
    )
    return Settings(
        given.repeats, given.steps, given.full, hardware=hardware, agents=given.agents
    )


def main(arguments: list[str]) -> None:
    """Runs the benchmark that the argument names."""
    if len(arguments) != 1 or arguments[0] not in BENCHES:
        given = " ".join(arguments)
        raise UserError(f"the benchmark is {given!r}; {nearest(given, BENCHES)}")
    given = flags.FLAGS
    bench, config = BENCHES[arguments[0]], _bundled.given_config()
    if not bench.times_a_config and _bundled.is_config_given():
        raise UserError(f"--config is not for {bench.name}, which reads no config")
    check(config)
    settings = _settings(bench.name)
    check_output_file(given.out, "--out")
    out = Path(given.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    result = bench.run(config, settings)
    used = {"config": config.to_dict()} if bench.times_a_config else {}
    write_json(out, {"bench": bench.name, **result, **used})
    print(bench.show(result))
    print(f"wrote {out}")


COMMAND = _program.Command("bench", __doc__, main, define_flags)
