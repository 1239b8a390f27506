"""What the parts measure: configs, and the time and memory of a local step.

Times are taken of the library's own loop, `Trainer`: reading and augmenting a batch on
the device, the step of all agents, and the host's work between two steps. The images
are random, since the time of a step does not depend on them.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from dimat_jax._layouts import LAYOUTS as LAYOUT_RECORDS
from dimat_jax._trainer import Trainer
from dimat_jax.config import Config, default_config, drop_unread
from dimat_jax.experiment import Experiment

__all__ = [
    "LAYOUTS",
    "Steps",
    "layout_fields",
    "step_config",
]

# Every way in which agents that share a device can run, and the size of chunks, for the
# layout that has them.
LAYOUTS = tuple(name for name in LAYOUT_RECORDS) + ("chunks of 4",)

BATCH = 100
# The seconds that one timing lasts at least, unless it has `_MOST_STEPS` steps.
_LEAST_SECONDS = 0.3
_MOST_STEPS = 100
_REPEATS = 3


def layout_fields(layout: str) -> dict[str, Any]:
    """The fields of a config by which agents run in a layout: "chunks of 4", "vmap"."""
    batching, _, chunk = layout.partition(" of ")
    fields: dict[str, Any] = {"placement.batching": batching}
    return fields | ({"placement.chunk": int(chunk)} if chunk else {})


def step_config(
    model: str,
    width: float,
    n_agents: int,
    *,
    layout: str = "auto",
    batch: int = BATCH,
    **fields: Any,
) -> Config:
    """A config whose local steps are measured: agents on CIFAR-sized images.

    Args:
        model: the architecture.
        width: the width of the model.
        n_agents: the number of agents.
        layout: the layout: a key of `LAYOUTS`, or "auto".
        batch: the number of images in an agent's batch.
        **fields: other fields of the config, with `__` in the place of dots.
    """
    config = default_config()
    chosen = {
        "algorithm": "local",
        "agents": n_agents,
        "batch_size": batch,
        "local_epochs": 1,
        "data.name": "random",
        "augmentation.flip": True,
        "augmentation.pad": 4,
        "model.name": model,
        "model.width": width,
        "optimizer.name": "sgd",
        "pretrain.epochs": 0,
        **layout_fields(layout),
    }
    chosen |= {path.replace("__", "."): value for path, value in fields.items()}
    config.update_from_flattened_dict(chosen)
    return drop_unread(config)


class Steps:
    """The local steps of a config.

    Args:
        config: the config.

    Attributes:
        experiment: the parts of the config's run.
        first_seconds: the time of the first step, which traces and compiles.
    """

    def __init__(self, config: Config):
        # What earlier steps in this process have left on the device does not count.
        self._left_bytes = _bytes_in_use() or 0
        self.experiment = experiment = Experiment(config)
        key = experiment.key("rounds")
        algorithm, sampler = experiment.algorithm, experiment.sampler
        self._trainer = Trainer(experiment, algorithm, sampler, key)
        self._network = experiment.network_at_step(0, 1)
        self._done = 0
        self._state = algorithm.init(experiment.initial_variables())
        jax.block_until_ready((self._state, experiment.train_pool))
        self.first_seconds = self.take(1)
        # The second call may still compile, if the first one changed a layout.
        self.take(1)

    def take(self, n_steps: int) -> float:
        """Takes some steps and returns the seconds that they took."""
        started = time.perf_counter()
        # `train` returns once the losses are on the host, so no work is left then.
        self._state, _ = self._trainer.train(
            self._state, self._done, [self._network] * n_steps
        )
        self._done += n_steps
        return time.perf_counter() - started

    def seconds(self) -> tuple[float, float]:
        """The median time of a step over some timings, and the spread of these.

        The spread is the difference of the slowest and the fastest timing, over the
        median.
        """
        estimate = self.take(2) / 2
        n_steps = int(np.clip(_LEAST_SECONDS / estimate, 2, _MOST_STEPS))
        times = np.array([self.take(n_steps) / n_steps for _ in range(_REPEATS)])
        median = float(np.median(times))
        return median, float(np.ptp(times)) / median

    def host_seconds(self) -> float:
        """The time in which the host draws and sends the indices of one step's images.

        A step cannot be faster than that, however fast the device is.
        """
        experiment, times = self.experiment, []
        for number in range(20):
            started = time.perf_counter()
            drawn = experiment.placement.put(experiment.sampler.batch(number))
            jax.block_until_ready(drawn)
            times.append(time.perf_counter() - started)
        return float(np.median(times))

    def peak_bytes(self) -> int | None:
        """The most memory that the steps use on the device; None if unknown."""
        with _peak_memory() as peak:
            self.take(3)
        return max(peak) - self._left_bytes if peak else None


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """Lists the memory in use on the first device; nothing if it is unknown.

    The device's own record of its peak cannot be set back, so a thread asks for the
    memory in use, again and again. A program holds all its memory while it runs.
    """
    found: list[int] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            if (in_use := _bytes_in_use()) is not None:
                found.append(in_use)
            time.sleep(0.0005)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def _bytes_in_use() -> int | None:
    statistics = jax.devices()[0].memory_stats() or {}
    return statistics.get("bytes_in_use")
