"""Runs every algorithm from end to end, on a small network and the digits."""

import shutil
import time

import dimat_jax
from configs import quickstart
from dimat_jax.algorithms import ALGORITHMS
from dimat_jax.config import drop_unread
from experiments.device._cells import Cell, Log
from experiments.device.parts import Settings

__all__ = ["cells"]


def cells(settings: Settings) -> list[Cell]:
    """The cells of this part."""

    def run(name: str, frame: str = ""):
        def measure(log: Log) -> None:
            config = quickstart.get_config()
            config.algorithm = name
            config.update_from_flattened_dict(
                {
                    "rounds": 2,
                    "local_epochs": 0,
                    "local_steps": 3,
                    "pretrain.epochs": 1,
                    "data.train_size": 320,
                    "merge.frame": frame or config.merge.frame,
                    "optimizer.learning_rate": 0.01,
                    "pretrain.cache_dir": str(settings.work / "pretrained-digits"),
                }
            )
            folder = settings.work / "algorithms" / f"{name}{frame}"
            shutil.rmtree(folder, ignore_errors=True)
            started = time.perf_counter()
            summary = dimat_jax.run(drop_unread(config), folder, lambda line: None)
            log.note(run_seconds=time.perf_counter() - started, summary=_short(summary))

        return measure

    merging = [
        Cell(f"dimat {frame}", 40, run("dimat", frame))
        for frame in ("own", "reference", "joint")
    ]
    others = [Cell(name, 40, run(name)) for name in ALGORITHMS if name != "dimat"]
    return merging + others


def _short(summary: dict) -> dict:
    """The single numbers of a summary, without the lists."""
    return {k: v for k, v in summary.items() if isinstance(v, (int, float, str))}
