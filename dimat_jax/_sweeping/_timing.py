"""Times a few local steps of a run, in a process of its own."""

import multiprocessing
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax

from dimat_jax._inputs import FromPlugin, from_plugins, load_plugins
from dimat_jax._sweeping._job import inherited_jax_options
from dimat_jax._sweeping._shares import Share, applied
from dimat_jax._trainer import Trainer
from dimat_jax.config import Config
from dimat_jax.errors import SweepError
from dimat_jax.experiment import Experiment
from dimat_jax.placement import request_cpu_devices

__all__ = ["CALIBRATION_STEPS", "StepTime", "Timing", "seconds_of"]

CALIBRATION_STEPS = 5
"""The number of local steps that are timed."""


class StepTime(NamedTuple):
    """How long a local step of all agents takes, once it has been compiled.

    Attributes:
        seconds: The mean over the timed steps.
        memory: The most bytes that have been in use so far: of the first device, or of
            the whole process where the CPU is the device.
        device: The kind of the device.
    """

    seconds: float
    memory: int
    device: str


class Timing:
    """A process that times local steps. It starts at once.

    Args:
        config: The run's config.
        share: What the process has of this machine.
    """

    def __init__(self, config: Config, share: Share):
        context = multiprocessing.get_context("spawn")
        options = {**inherited_jax_options(), **share.jax_options}
        self._receiver, sender = context.Pipe(duplex=False)
        arguments = sender, config, from_plugins(config), options
        self._process = context.Process(target=_send_time, args=arguments)
        with applied(share):
            self._process.start()
        # Only the process may hold this end, so that its death ends the waiting.
        sender.close()

    def wait(self, seconds: float | None = None) -> StepTime | None:
        """Waits for the result, and ends the process.

        Args:
            seconds: How long to wait at most; None for as long as it takes.

        Returns:
            The result; None if it is not there in time.

        Raises:
            SweepError: The process has ended without a result.
            Exception: Whatever the process has raised.
        """
        try:
            found = self._receiver.recv() if self._receiver.poll(seconds) else None
        except EOFError:
            self._process.join()
            raise SweepError(
                "the process that was to time local steps has ended with the exit code "
                f"{self._process.exitcode}"
            ) from None
        finally:
            self._process.kill()
            self._process.join()
            self._receiver.close()
        if isinstance(found, Exception):
            raise found
        return found


def seconds_of(
    config: Config, steps_alone: int, steps: int, alone: float, together: float
) -> tuple[float, float]:
    """The seconds of pre-training and of the rounds.

    Args:
        config: The run's config.
        steps_alone: The local steps of pre-training.
        steps: The local steps of the rounds.
        alone: The seconds of a step of pre-training for each image of a batch.
        together: The same for a step of the rounds.
    """
    return (
        steps_alone * config.pretrain.batch_size * alone,
        steps * config.batch_size * together,
    )


def _send_time(
    sender: Connection,
    config: Config,
    named: Sequence[FromPlugin],
    options: Mapping[str, Any],
) -> None:
    """Sends the time of a step, or the error that has kept it from being measured."""
    try:
        load_plugins(named, "the config")
        sender.send(_time_steps(config, options))
    except Exception as error:
        try:
            sender.send(error)
        except Exception:  # Not every error can be sent to another process.
            sender.send(SweepError(f"{type(error).__name__}: {error}"))


def _time_steps(config: Config, jax_options: Mapping[str, Any]) -> StepTime:
    """Times local steps. Agents have the layout that is chosen without a race."""
    for name, value in jax_options.items():
        jax.config.update(name, value)
    request_cpu_devices(config.placement.cpu_devices)
    experiment = Experiment(config)
    algorithm = experiment.algorithm
    trainer = Trainer(
        experiment, algorithm, experiment.sampler, experiment.key("rounds")
    )
    state = algorithm.init(experiment.initial_variables())
    networks = [experiment.network_at_step(0, 1)] * CALIBRATION_STEPS
    state, _ = trainer.train(state, 0, networks[:1])
    start = time.perf_counter()
    # The losses are on the host when the method returns, so no work is left then.
    trainer.train(state, 1, networks)
    seconds = (time.perf_counter() - start) / CALIBRATION_STEPS
    device = jax.devices()[0]
    return StepTime(seconds, _peak_memory(device), device.device_kind)


def _peak_memory(device: Any) -> int:
    """The most bytes in use so far: of an accelerator, or of this process."""
    if statistics := device.memory_stats():
        return statistics["peak_bytes_in_use"]
    # Linux counts in kibibytes, and macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
