"""bfloat16 against float32, and how much of the device's peak a step uses.

Model FLOPs utilisation is the number of operations of all agents' losses and gradients,
over the time of a step, over the rate of a large matrix product in the same format (for
float32: in TF32, which is what JAX uses on GPUs unless it is told otherwise).
"""

from dimat_jax._bench._steps import gradient_flops
from experiments.device._cells import Cell, Log, read_record
from experiments.device._subject import BATCH, Steps, step_config
from experiments.device.parts import Settings
from experiments.device.parts.layouts import Subject, best_layout

__all__ = ["cells"]

_SUBJECTS = (
    Subject("resnet20", 8, 1),
    Subject("resnet20", 1, 5),
    Subject("resnet20", 8, 5),
    Subject("vgg16", 1, 5),
    Subject("vit", 1, 5),
)
_TINY = (Subject("resnet20", 0.25, 2),)
# The product in facts.json whose rate is the peak for a model's dtype.
_PEAKS = {"float32": "product tf32", "bfloat16": "product bfloat16"}


def cells(settings: Settings) -> list[Cell]:
    """The cells of this part."""
    return [
        Cell(
            f"{subject}, {dtype}",
            45,
            _measure(settings, subject, dtype),
        )
        for subject in (_TINY if settings.tiny else _SUBJECTS)
        for dtype in _PEAKS
    ]


def _measure(settings: Settings, subject: Subject, dtype: str):
    batch = 8 if settings.tiny else BATCH

    def measure(log: Log) -> None:
        layouts = read_record(settings.out / "layouts.json")
        layout = best_layout(layouts, *subject)
        log.note(**subject._asdict(), layout=layout, dtype=dtype)
        config = step_config(*subject, layout=layout, batch=batch, model__dtype=dtype)
        steps = Steps(config)
        log.note(first_seconds=steps.first_seconds)
        seconds, spread = steps.seconds()
        log.note(step_seconds=seconds, spread=spread)
        flops = subject.agents * gradient_flops(steps.experiment)
        log.note(step_flops=flops, flops_per_second=flops / seconds)
        products = read_record(settings.out / "facts.json")["cells"]
        peak = products.get(_PEAKS[dtype], {}).get("figures", {})
        if "flops_per_second" in peak:
            log.note(utilisation=flops / seconds / peak["flops_per_second"])

    return measure
