"""Runs every model from end to end: training, matching, merging, evaluating."""

import shutil
import time

import dimat_jax
from dimat_jax.models import MODELS
from experiments.device._cells import Cell, Log
from experiments.device._subject import step_config
from experiments.device.parts import Settings

__all__ = ["cells"]

# Deep models compile for minutes on a CPU.
_TINY = ("mlp", "resnet20", "vit")


def cells(settings: Settings) -> list[Cell]:
    """The cells of this part, the models of the other parts first."""
    first = [name for name in ("mlp", "resnet20", "vgg16", "vit") if name in MODELS]
    names = first + [name for name in MODELS if name not in first]
    if settings.tiny:
        names = [name for name in names if name in _TINY]

    def run(name: str):
        def measure(log: Log) -> None:
            config = step_config(
                name,
                0.25,
                2,
                batch=16,
                algorithm="dimat",
                rounds=1,
                local_epochs=0,
                local_steps=2,
                data__train_size=1000,
                data__test_size=100,
                eval__batch_size=50,
                merge__match_samples=100,
            )
            folder = settings.work / "models" / name
            shutil.rmtree(folder, ignore_errors=True)
            started = time.perf_counter()
            summary = dimat_jax.run(config, folder, lambda line: None)
            log.note(run_seconds=time.perf_counter() - started)
            log.note(test_loss_mean=summary.get("test_loss_mean"))

        return measure

    return [Cell(name, 60, run(name)) for name in names]
