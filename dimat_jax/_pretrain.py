"""Pre-training: every agent trains alone, or runs share agents that one has trained."""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from absl import logging
from filelock import FileLock, Timeout

import dimat_jax
from dimat_jax._checkpoint import CheckpointError, Checkpoints
from dimat_jax._chosen import number_of_agents
from dimat_jax._pauses import RunPauses
from dimat_jax._processes import from_main, is_main
from dimat_jax._run_log import RunLog
from dimat_jax._slots import refill
from dimat_jax._trainer import Trainer
from dimat_jax.algorithms.base import State, Variables
from dimat_jax.config import Config, fields_of, fields_read, resolved
from dimat_jax.experiment import Experiment
from dimat_jax.workdir import Results

__all__ = ["SharedAgents", "pretrain", "pretraining_fields"]


def pretrain(
    experiment: Experiment,
    results: Results,
    state: State | None,
    begin: Callable[[], Variables],
    run_log: RunLog,
    tick: Callable[[int], Any],
    pauses: RunPauses,
) -> tuple[State, dict[str, Any]]:
    """Trains every agent alone, or reads agents that another run has trained.

    Args:
        experiment: What the run's config describes.
        results: The run's files. Its progress ends at the end of pre-training.
        state: The agents' state in the middle of pre-training; None at the beginning.
            It is donated.
        begin: A function that returns the variables that the agents start with.
        run_log: What reports every epoch.
        tick: A function that is called with the number of steps just done.
        pauses: What may save the state between two steps, or end the run.

    Returns:
        The state that the rounds start from, and the metrics of the last epoch.
    """
    progress = results.progress
    shared = SharedAgents(experiment)
    with shared.reserved(run_log.line) as seconds_waited:
        progress.seconds -= seconds_waited
        found = shared.read()
        if found is not None:
            run_log.line(f"pre-trained agents come from {shared.path}")
            variables, metrics, seconds, rows = found
            results.write_pretraining_rows(rows)
            # Times of runs are compared, so the run counts as if it had trained them.
            progress.seconds = seconds - seconds_waited
            tick(experiment.pretrain_steps - progress.steps_done)
        else:
            variables, metrics = _train_alone(
                experiment, results, state, begin, run_log, tick, pauses
            )
            seconds, rows = progress.total_seconds, results.pretraining_rows()
            shared.write(variables, metrics, seconds, rows)
    progress.epoch = experiment.config.pretrain.epochs
    progress.step, progress.within = experiment.pretrain_steps, 0
    return experiment.algorithm.init(variables), metrics


def _train_alone(
    experiment: Experiment,
    results: Results,
    state: State | None,
    begin: Callable[[], Variables],
    run_log: RunLog,
    tick: Callable[[int], Any],
    pauses: RunPauses,
) -> tuple[Variables, dict[str, Any]]:
    """Does the epochs that are left; see `pretrain`."""
    progress, options = results.progress, experiment.config.pretrain
    algorithm, sampler = experiment.pretrain_algorithm, experiment.pretrain_sampler
    steps = sampler.steps_per_epoch
    if state is None:
        state = algorithm.init(begin())
    trainer = Trainer(experiment, algorithm, sampler, experiment.key("pretrain"))
    # A step takes a network, but agents that train alone do not look at it.
    networks = [experiment.network_at_round(1)] * steps
    metrics: dict[str, Any] = {}
    first = progress.epoch

    def after(state: State, totals: Any, number: int) -> None:
        done = number % steps + 1
        pauses.after_step(state, totals, done, done == steps)

    for epoch in range(first, options.epochs):
        if epoch > first:
            progress.epoch, progress.step, progress.within = epoch, epoch * steps, 0
            if epoch % options.checkpoint_every == 0:
                results.save(state)
        within, totals = pauses.begin()
        trainer.go_on(totals)
        start = epoch * steps + within
        state, metrics = trainer.train(state, start, networks[within:], tick, after)
        run_log.pretraining(epoch + 1, metrics, algorithm.variables(state))
    return algorithm.variables(state), metrics


class SharedAgents:
    """Pre-trained agents in `config.pretrain.cache_dir`, where other runs find them.

    Runs share agents if all that their pre-training depends on is equal.

    Args:
        experiment: What the run's config describes.

    Attributes:
        path: The folder of these agents; None if the config names no `cache_dir`.
    """

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
        config = experiment.config
        # Runs share what they have trained from random weights.
        cache_dir = "" if config.init_from else config.pretrain.cache_dir
        self.path = Path(cache_dir) / _fingerprint(experiment) if cache_dir else None

    @contextmanager
    def reserved(self, log: Callable[[str], None]) -> Iterator[float]:
        """Keeps other runs from training the same agents at the same time.

        A run that comes second waits for the first one, and then finds its agents. If
        the first run dies, the system releases its lock, and the next run trains.

        Args:
            log: A function that receives a line of text if the run has to wait.

        Yields:
            The seconds for which the run has waited.
        """
        # The processes of one run train together. They must not wait for each other.
        if self.path is None or jax.process_count() > 1:
            yield 0.0
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        path = self.path.with_name(f".{self.path.name}.lock")
        # A marker file, instead of a lock, would stay if its process died.
        lock = FileLock(path, fallback_to_soft=False)
        start = time.perf_counter()
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log(f"waiting for the run that pre-trains the same agents, {self.path}")
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            # The agents are the same whichever run trains them.
            logging.warning("%s cannot be locked: %s", self.path.parent, error)
        try:
            yield time.perf_counter() - start
        finally:
            lock.release()

    def read(self) -> tuple[Variables, dict[str, Any], float, list[Any]] | None:
        """Reads what another run has written.

        Returns:
            The agents' variables on the devices, the metrics of the last epoch, the
            seconds that the training took, and the rows of its epochs. None if there
            are no such agents yet, or if they are damaged.
        """
        # Another run may be writing these agents now. If every process looked for the
        # folder, their answers could differ.
        if self.path is None or not from_main(self.path.exists()):
            return None
        placement = self._experiment.placement
        checkpoints = Checkpoints(self.path, create=False)
        try:
            restored = checkpoints.restore(
                lambda record: self._experiment.abstract_variables(),
                rows=placement.n_agents,
            )
        except CheckpointError as error:
            restored = None
            logging.warning("%s", error)
        finally:
            checkpoints.close()
        if restored is None:
            self._set_aside(self.path)
            return None
        agents, record = restored
        # Older versions saved no rows.
        rows = record.get("rows", [])
        return refill(placement, agents), record["metrics"], record["seconds"], rows

    def _set_aside(self, path: Path) -> None:
        """Renames agents that cannot be used, so that they can be written again."""
        if is_main():
            damaged = path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:8]}")
            path.rename(damaged)
            logging.warning(
                "The pre-trained agents in %s cannot be used. The run pre-trains them "
                "again; what was there is now in %s",
                path,
                damaged,
            )

    def write(
        self,
        variables: Variables,
        metrics: dict[str, Any],
        seconds: float,
        rows: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Writes pre-trained agents for other runs, if the config names a folder."""
        if self.path is None:
            return
        lists = {name: value.tolist() for name, value in metrics.items()}
        record = {"seconds": seconds, "metrics": lists, "rows": list(rows)}
        # Several runs may pre-train the same agents at a time. Each writes a folder of
        # its own, and then renames it, so that nobody reads a folder that is half full.
        partial = self.path.with_name(
            f".{self.path.name}-{from_main(uuid.uuid4().hex)}"
        )
        checkpoints = Checkpoints(partial, keep=1)
        try:
            checkpoints.save(0, variables, record)
            checkpoints.close()
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        # Every process has written its part once Orbax has closed the folder.
        if is_main():
            try:
                os.replace(partial, self.path)
            except OSError:  # Another run was faster, and its agents are the same.
                shutil.rmtree(partial)


def pretraining_fields(config: Config) -> dict[str, Any]:
    """Returns the fields of a config that its pre-training depends on, by path.

    The number of agents is among them. Runs with equal fields share their agents if
    they name the same `pretrain.cache_dir`.
    """
    parts = ("task", "data.", "augmentation.", "model.", "pretrain.", "seed", "init")
    fields = {
        field: value
        for field, value in fields_read(fields_of(config)).items()
        if field.startswith(parts)
    }
    return fields | {"agents": number_of_agents(resolved(fields_of(config)))}


def _fingerprint(experiment: Experiment) -> str:
    """Returns a name for the agents that a run pre-trains.

    Runs have the same name only if they pre-train the same agents.
    """
    fields = pretraining_fields(experiment.config) | {
        "data": experiment.data_digest,
        "version": dimat_jax.__version__,
    }
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    return digest.hexdigest()[:16]
