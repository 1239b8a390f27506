"""Times training: stacked agents, one agent, and one model in plain loops.

The yardsticks are one model in a plain Flax loop and in a plain PyTorch loop, which
take batches that lie ready on the device. The agents' steps also gather, normalise and
augment their images.
"""

from collections.abc import Sequence
from typing import Any

from dimat_jax._bench._plain import Plain
from dimat_jax._bench._record import Bench, Settings, table
from dimat_jax._bench._steps import changed, number_of_agents
from dimat_jax._bench._timing import Side, Timing, race, ratio, ratio_range
from dimat_jax.config import Config, fields_of, model_arguments, resolved
from dimat_jax.data import sources
from dimat_jax.models import MODELS
from dimat_jax.models._settings import DTYPE
from dimat_jax.models.mlp import MLP
from dimat_jax.models.resnet import ResNet
from dimat_jax.optimizers import LEARNING_RATE
from dimat_jax.placement import AGENTS

__all__ = ["BENCH"]

AGENTS_TOGETHER = "agents together"
ONE_AGENT = "one agent"
FLAX = "plain Flax loop"
TORCH_NCHW = "plain PyTorch loop, NCHW"
TORCH_NHWC = "plain PyTorch loop, channels_last"
MATMUL = "matrix product"
HALF = ", bfloat16"

# The pairs of sides whose images per second are compared.
PAIRS = (
    (AGENTS_TOGETHER, ONE_AGENT),
    (AGENTS_TOGETHER + HALF, AGENTS_TOGETHER),
    (ONE_AGENT, FLAX),
    (ONE_AGENT, TORCH_NCHW),
    (ONE_AGENT, TORCH_NHWC),
    (ONE_AGENT + HALF, ONE_AGENT),
    (ONE_AGENT + HALF, TORCH_NHWC + HALF),
    (FLAX, TORCH_NHWC),
)


def run(config: Config, settings: Settings) -> dict[str, Any]:
    """Measures images per second, FLOPs, compile time and memory of every side.

    With `settings.full` the agents together and the plain loops run in bfloat16 too.

    Raises:
        UserError: one agent's steps cannot be timed.
    """
    n_agents, plain = number_of_agents(config), _plain(config)
    sides = _agents(config, settings)
    if isinstance(plain, Plain):
        sides += _plain_loops(plain, settings)
    for dtype, suffix in (("float32", ""), ("bfloat16", HALF)):
        program = "dimat_jax._bench._matmul:matmul"
        sides.append(Side(MATMUL + suffix, program, {"dtype": dtype}))
    timings = race(sides, settings.repeats)
    images = {
        name: config.batch_size * (n_agents if name.startswith(AGENTS_TOGETHER) else 1)
        for name in timings
    }
    one_agent = timings[ONE_AGENT].required()
    flops = one_agent.facts[0]["flops_per_step"] / config.batch_size
    return {
        "agents": n_agents,
        "flops_per_image": flops,
        "no_plain_loops": "" if isinstance(plain, Plain) else plain,
        "sides": {
            name: timing.record()
            if name.startswith(MATMUL) or timing.unavailable
            else _speed(timing, images[name], flops, timings, settings.steps)
            for name, timing in timings.items()
        },
        "matmul_flops_per_second": {
            dtype: _matmul_speed(timings[MATMUL + suffix])
            for dtype, suffix in (("float32", ""), ("bfloat16", HALF))
        },
        "ratios": _ratios(timings, images),
    }


def _agents(config: Config, settings: Settings) -> list[Side]:
    """Returns the sides that take a config's local steps."""
    one = {AGENTS.path: 1}
    half = {DTYPE.path: "bfloat16"}
    variants = {AGENTS_TOGETHER: {}, ONE_AGENT: one, ONE_AGENT + HALF: {**one, **half}}
    if settings.full:
        variants[AGENTS_TOGETHER + HALF] = half
    return [
        Side(
            name,
            "dimat_jax._bench._steps:local_steps",
            {
                "config": changed(config, fields).to_dict(),
                "steps": settings.steps,
            },
        )
        for name, fields in variants.items()
    ]


def _plain_loops(plain: Plain, settings: Settings) -> list[Side]:
    """Returns the sides that train one model in a plain loop."""
    flax = "dimat_jax._bench._plain_flax:flax_loop"
    torch = "dimat_jax._bench._plain_torch:torch_loop"
    nchw = {"memory_format": "contiguous_format"}
    nhwc = {"memory_format": "channels_last"}
    variants = [
        (FLAX, flax, {}, "float32"),
        (TORCH_NCHW, torch, nchw, "float32"),
        (TORCH_NHWC, torch, nhwc, "float32"),
    ]
    if settings.full:
        variants += [
            (FLAX + HALF, flax, {}, "bfloat16"),
            (TORCH_NHWC + HALF, torch, nhwc, "bfloat16"),
        ]
    return [
        Side(
            name,
            program,
            {
                "plain": plain._replace(dtype=dtype)._asdict(),
                "steps": settings.steps,
                **layout,
            },
        )
        for name, program, layout, dtype in variants
    ]


def _plain(config: Config) -> Plain | str:
    """Returns the sizes of the plain model, or why there is none."""
    dataset = sources.load(
        config.data.name,
        directory=config.data.dir or None,
        cache_dir=config.data.cache_dir or None,
    )
    name = config.model.name
    model = MODELS[name](
        n_classes=dataset.n_classes, **model_arguments(fields_of(config))
    )
    match model:
        case ResNet(block="basic", stem="cifar", norm="batch", shortcut="conv3x3"):
            blocks, units = model.blocks[0], model.channels
        case MLP(norm="none"):
            blocks, units = 0, model.hidden
        case _:
            return f"there is no plain loop for {name} with the config's options"
    return Plain(
        blocks,
        units,
        dataset.n_classes,
        dataset.train.images.shape[1:],
        config.batch_size,
        resolved(fields_of(config))[LEARNING_RATE.path],
    )


def _speed(
    timing: Timing, images: int, flops: float, timings: dict[str, Timing], steps: int
) -> dict[str, Any]:
    """Returns a side's measurements.

    Args:
        timing: the timing of the side.
        images: the number of images in a step.
        flops: the floating-point operations by which a model learns from an image.
        timings: the timings of all sides, with the matrix products.
        steps: the number of steps in a call.
    """
    per_second = images * steps / timing.median
    suffix = HALF if timing.name.endswith(HALF) else ""
    peak = _matmul_speed(timings[MATMUL + suffix])
    return {
        **timing.record(),
        "step_seconds": timing.median / steps,
        "images_per_second": per_second,
        "utilisation": peak and per_second * flops / peak,
        "compile_seconds": timing.compile_seconds,
        "peak_bytes": timing.peak_bytes,
    }


def _matmul_speed(timing: Timing) -> float | None:
    """Returns the floating-point operations a second of the matrix product."""
    return None if timing.unavailable else timing.facts[0]["flops"] / timing.median


def _ratios(
    timings: dict[str, Timing], images: dict[str, int]
) -> dict[str, dict[str, float]]:
    """Returns for each pair the ratio of its images per second, over the rounds."""
    found = {}
    for above, below in PAIRS:
        if not {above, below} <= timings.keys():
            continue
        if ratio(timings[below], timings[above]) is None:
            continue
        scale = images[above] / images[below]
        least, median, most = ratio_range(timings[below], timings[above])
        found[f"{above} / {below}"] = {
            "median": scale * median,
            "least": scale * least,
            "most": scale * most,
        }
    return found


def show(result: dict[str, Any]) -> str:
    """Writes a table of all sides, a table of ratios, and what was not measured."""
    sides: dict[str, dict[str, Any]] = result["sides"]
    speeds = table(
        ["", "ms a step", "images/s", "utilisation", "compile s", "peak MiB"],
        [_row(name, side) for name, side in sides.items() if "step_seconds" in side],
    )
    ratios = table(
        ["images/s", "ratio", "least", "most"],
        [[name, *values.values()] for name, values in result["ratios"].items()],
    )
    notes = [
        f"{name}: not measured: {side['unavailable']}"
        for name, side in sides.items()
        if "unavailable" in side
    ]
    if result["no_plain_loops"]:
        notes.append(result["no_plain_loops"])
    peaks: Sequence[str] = [
        f"{dtype} {speed / 1e9:,.0f} GFLOP/s"
        for dtype, speed in result["matmul_flops_per_second"].items()
        if speed
    ]
    notes.append(
        "Utilisation is the share of the speed of a large matrix product "
        f"({', '.join(peaks)}). "
        f"The model takes {result['flops_per_image'] / 1e6:,.3g} MFLOP for an image."
    )
    return "\n\n".join([speeds, ratios, "\n".join(notes)])


def _row(name: str, side: dict[str, Any]) -> list[Any]:
    return [
        name,
        1e3 * side["step_seconds"],
        side["images_per_second"],
        side["utilisation"],
        side["compile_seconds"],
        side["peak_bytes"] / 2**20,
    ]


BENCH = Bench("train", run, show)
