"""Runs a config.

    pre-train every agent alone
    every round:
        communicate (merge with the neighbours), evaluate
        train locally, evaluate
        checkpoint

A run that was killed goes on from its last checkpoint when it is started again, with
the same results: what is drawn at random depends on the seed and on counters alone.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import dimat_jax
from dimat_jax._checkpoint import Checkpoints
from dimat_jax._metrics import MetricsWriter, read_rows, write_json
from dimat_jax._trainer import Trainer
from dimat_jax.algorithms import Algorithm
from dimat_jax.algorithms.base import State, Variables
from dimat_jax.config import Config, ConfigError, default_config, result_fields
from dimat_jax.data.partition import class_counts, table
from dimat_jax.errors import NonFiniteError
from dimat_jax.evaluate import Evaluation
from dimat_jax.experiment import Experiment
from dimat_jax.ledger import Ledger
from dimat_jax.mixing import spectral_gap
from dimat_jax.network import Network
from dimat_jax.tree import PyTree

__all__ = ["load_agents", "run"]


@dataclasses.dataclass
class Progress:
    """How far a run has come. Everything else follows from the config.

    Attributes:
        ledger: what was sent.
        epoch: pre-training epochs done.
        round: rounds done.
        step: local steps done, pre-training included.
        rows: rows of metrics.jsonl written.
        seconds: wall time, over all the times that the run was started.
    """

    ledger: Ledger
    epoch: int = 0
    round: int = 0
    step: int = 0
    rows: int = 0
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {**dataclasses.asdict(self), "ledger": self.ledger.record()}

    @staticmethod
    def of(record: dict[str, Any]) -> "Progress":
        """The inverse of `record`."""
        return Progress(**{**record, "ledger": Ledger.of(record["ledger"])})


def run(
    config: Config, workdir: str | os.PathLike[str], say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Runs a config, or what is left of it, and writes all results into `workdir`.

    Args:
        config: as `config.default_config` describes.
        workdir: made if missing; may hold the same config's interrupted run.
        say: is told a line for every evaluation.

    Returns:
        the content of `workdir`/summary.json.

    Raises:
        UserError: a config that cannot be run, or a workdir that holds another run.
        NonFiniteError: a loss that is not finite.
    """
    workdir = Path(workdir)
    _check_workdir(config, workdir)
    summary = workdir / "summary.json"
    if summary.exists():
        say(f"{workdir} holds this run, finished")
        return json.loads(summary.read_text())
    experiment = Experiment(config)
    if not (workdir / "config.json").exists():
        if experiment.record.aligns:
            experiment.verify_spec()
        workdir.mkdir(parents=True, exist_ok=True)
        counts = class_counts(experiment.dataset.train.labels, experiment.shards)
        write_json(
            workdir / "partition.json",
            {"partition": config.data.partition, "classes": None, "counts": counts},
        )
        say(table(counts))
        write_json(workdir / "config.json", _as_dict(config))
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    started = _Run(experiment, workdir, checkpoints, say)
    try:
        return started.finish()
    finally:
        started.close()


def load_agents(
    workdir: str | os.PathLike[str], data_dir: str | None = None
) -> tuple[Experiment, Variables]:
    """Loads the agents of a run, finished or not; nothing is written.

    Args:
        workdir: of the run.
        data_dir: where its data are now, if not where they were.

    Returns:
        the run's experiment, and the agents' variables as its newest checkpoint has
        them: NumPy arrays `[agents, ...]`.

    Raises:
        UserError: a workdir without a run that can be read, or without a checkpoint.
    """
    workdir = Path(workdir)
    config = _read_config(workdir / "config.json")
    if data_dir:
        config.data.dir = data_dir
    experiment = Experiment(config)
    checkpoints = Checkpoints(workdir / "checkpoints", create=False)
    try:
        found = _restore(experiment, checkpoints)
    finally:
        checkpoints.close()
    if found is None:
        raise ConfigError(f"{workdir} holds a run that has no checkpoint yet")
    algorithm, state, _ = found
    placement = experiment.placement
    return experiment, placement.gather(algorithm.variables(placement.put(state)))


class _Run:
    """One run, from wherever it stands to its end."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        checkpoints: Checkpoints,
        say: Callable[[str], None],
    ):
        self.experiment = experiment
        self.config = experiment.config
        self.algorithm = experiment.algorithm
        self.workdir = workdir
        self.checkpoints = checkpoints
        self.restored, self.progress = self._restore()
        self.writer = MetricsWriter(workdir, keep_rows=self.progress.rows)
        self._started = time.perf_counter() - self.progress.seconds
        self._evaluated: Evaluation | None = None
        self.bar = tqdm(
            total=experiment.pretrain_steps
            + self.config.rounds * experiment.local_steps,
            initial=self.progress.step,
            unit="step",
            disable=None,  # a bar on terminals only
        )
        self.say = say if self.bar.disable else self.bar.write
        if self.restored is not None:
            self.say(f"going on after local step {self.progress.step}")

    def finish(self) -> dict[str, Any]:
        """Does all that is left to do."""
        experiment, config, progress = self.experiment, self.config, self.progress
        algorithm, ledger = self.algorithm, progress.ledger
        pretrained = progress.epoch == config.pretrain.epochs
        state = self.restored
        if state is None or not pretrained:
            state = self._pretrain(state)
        messages = algorithm.messages(state)
        trainer = Trainer(
            experiment, algorithm, experiment.sampler, experiment.key("rounds")
        )
        steps = experiment.local_steps

        for number in range(progress.round + 1, config.rounds + 1):
            evaluating = number % config.eval.every == 0 or number == config.rounds
            key = jax.random.fold_in(experiment.key("communicate"), number)
            network = experiment.network_at_round(number)
            state, metrics = algorithm.communicate(
                state, experiment.merge_data(number), network, key
            )
            ledger.record_round(
                messages,
                active_edges=np.asarray(network.active_edges),
                present=np.asarray(network.present),
                edges=experiment.links.edges,
                matching=metrics.pop("matching_bytes", None),
            )
            if evaluating:
                # Whoever does not communicate is what it was after the last steps.
                changed = bool(messages.round or messages.server)
                self._evaluate("merged", number, state, metrics, changed)

            def network_at(step: int, number: int = number) -> Network:
                network = experiment.network_at_step(step, number)
                ledger.record_steps(messages, np.asarray(network.active_edges))
                return network

            state, metrics = trainer.train(
                state, (number - 1) * steps, steps, network_at, self.bar.update
            )
            self._evaluated = None
            progress.step += steps
            progress.round = number
            if evaluating:
                self._evaluate("trained", number, state, metrics)
            if number % config.checkpoint.every == 0 or number == config.rounds:
                self._save(config.pretrain.epochs + number, state)
        return self._summarize()

    def close(self) -> None:
        """Leaves everything written and closed."""
        self.bar.close()
        self.writer.close()
        self.checkpoints.close()

    def _pretrain(self, state: State | None) -> State:
        """Trains every agent alone, or fetches agents that another run trained so."""
        experiment, progress = self.experiment, self.progress
        options = self.config.pretrain
        shared = _shared_agents(experiment)
        found = _read_agents(shared, experiment) if shared and state is None else None
        if found:
            self.say(f"pre-trained agents come from {shared}")
            agents, record = found
            variables, metrics = experiment.placement.put(agents), record["metrics"]
            # As if it had trained them: the times of runs are to be compared.
            self._started -= record["seconds"]
            self.bar.update(experiment.pretrain_steps)
        else:
            variables, metrics = self._pretrain_anew(state)
            if shared:
                agents = experiment.placement.gather(variables)
                metrics = {name: value.tolist() for name, value in metrics.items()}
                record = {"seconds": self._seconds(), "metrics": metrics}
                _write_agents(shared, agents, record)
        progress.epoch, progress.step = options.epochs, experiment.pretrain_steps
        state = self.algorithm.init(variables)
        self._evaluate("pretrained", 0, state, metrics)
        self._save(options.epochs, state)
        return state

    def _pretrain_anew(self, state: State | None) -> tuple[Variables, dict[str, Any]]:
        experiment, progress = self.experiment, self.progress
        algorithm, options = experiment.pretrain_algorithm, self.config.pretrain
        metrics: dict[str, Any] = {}
        if state is None:
            state = algorithm.init(experiment.initial_variables())
        trainer = Trainer(
            experiment,
            algorithm,
            experiment.pretrain_sampler,
            experiment.key("pretrain"),
        )
        steps = experiment.pretrain_sampler.steps_per_epoch

        def alone(step: int) -> Network:
            del step  # nobody asks what the network is like
            return experiment.network_at_round(1)

        for epoch in range(progress.epoch, options.epochs):
            if epoch > progress.epoch and epoch % options.checkpoint_every == 0:
                progress.epoch, progress.step = epoch, epoch * steps
                self._save(epoch, state)
            state, metrics = trainer.train(
                state, epoch * steps, steps, alone, self.bar.update
            )
        return algorithm.variables(state), metrics

    def _evaluate(
        self,
        phase: str,
        number: int,
        state: State,
        metrics: dict[str, Any],
        changed: bool = True,
    ) -> None:
        """Writes a row of metrics.jsonl, and says how the agents do."""
        if changed or self._evaluated is None:
            variables = self.algorithm.variables(state)
            self._evaluated = self.experiment.evaluator(variables)
        accuracy, loss, distance = self._evaluated
        if not np.isfinite(loss).all():
            agents = np.flatnonzero(~np.isfinite(loss)).tolist()
            raise NonFiniteError(
                f"the test loss of agent(s) {agents} is not finite in round {number} "
                f"(phase {phase!r})"
            )
        ledger = self.progress.ledger
        self.writer.write(
            {
                "round": number,
                "step": self.progress.step,
                "phase": phase,
                "test_accuracy": accuracy,
                "test_accuracy_mean": accuracy.mean(),
                "test_accuracy_std": accuracy.std(),
                "test_loss": loss,
                "test_loss_mean": loss.mean(),
                "consensus_distance": distance,
                "bytes_sent_total": ledger.bytes_sent,
                "bytes_sent_by_kind": ledger.by_kind,
                "bytes_sent_by_link": ledger.by_link,
                "comm_rounds_total": ledger.comm_rounds,
                "present": self.experiment.links.present(number),
                "seconds_total": self._seconds(),
                **metrics,
            }
        )
        self.say(
            f"round {number:3d} {phase:>10}: test accuracy {accuracy.mean():.4f} "
            f"± {accuracy.std():.4f}, loss {loss.mean():.4f}, consensus distance "
            f"{distance:.3g}"
        )

    def _summarize(self) -> dict[str, Any]:
        """Writes summary.json: the last rows, and what computed them."""
        rows = read_rows(self.workdir)
        summary = {
            **rows[-1],
            # Also what the merge alone made of the agents, before they trained on.
            **{f"last_{row['phase']}": row for row in rows},
            # Without faults, over a period.
            "spectral_gap": spectral_gap(self.experiment.links.mixing_matrix),
            "seconds_total": self._seconds(),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "versions": {"dimat_jax": dimat_jax.__version__, "jax": jax.__version__},
        }
        self.checkpoints.wait()
        write_json(self.workdir / "summary.json", summary)
        return json.loads((self.workdir / "summary.json").read_text())

    def _restore(self) -> tuple[State | None, Progress]:
        """The state and the progress of the newest checkpoint, if there is one."""
        found = _restore(self.experiment, self.checkpoints)
        if found is None:
            return None, Progress(Ledger(self.experiment.placement.n_agents))
        _, state, progress = found
        return self.experiment.placement.put(state), progress

    def _save(self, number: int, state: State) -> None:
        self.progress.rows = self.writer.rows
        self.progress.seconds = self._seconds()
        self.checkpoints.save(
            number, self.experiment.placement.gather(state), self.progress.record()
        )

    def _seconds(self) -> float:
        return time.perf_counter() - self._started


def _restore(
    experiment: Experiment, checkpoints: Checkpoints
) -> tuple[Algorithm, State, Progress] | None:
    """The newest checkpoint: whose state it is, and this state, on the host."""

    def algorithm(record) -> Algorithm:
        pretraining = record["epoch"] < experiment.config.pretrain.epochs
        return experiment.pretrain_algorithm if pretraining else experiment.algorithm

    def like(record):
        slots, n_agents = experiment.placement.slots, experiment.placement.n_agents
        variables = _resized(experiment.abstract_variables(), slots)
        return _resized(jax.eval_shape(algorithm(record).init, variables), n_agents)

    restored = checkpoints.restore(like)
    if restored is None:
        return None
    state, record = restored
    return algorithm(record), state, Progress.of(record)


def _resized(abstract: PyTree, size: int) -> PyTree:
    """`jax.ShapeDtypeStruct`s with another length of the leading axis."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), abstract
    )


def _as_dict(config: Config) -> dict[str, Any]:
    return json.loads(config.to_json())


def _read_config(path: Path) -> Config:
    """The config that a run was started with; fields that it lacks have defaults."""
    config = default_config()
    try:
        fields = json.loads(path.read_text())
        unknown = result_fields(fields).keys() - result_fields(_as_dict(config)).keys()
        if unknown:
            raise ValueError(f"there are no fields {', '.join(sorted(unknown))}")
        config.update(fields)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be used: {error}") from error
    return config


def _check_workdir(config: Config, workdir: Path) -> None:
    """Refuses a workdir that holds the run of another config."""
    path = workdir / "config.json"
    if not path.exists():
        leftovers = ("metrics.jsonl", "summary.json", "checkpoints")
        if workdir.is_file() or any((workdir / name).exists() for name in leftovers):
            raise ConfigError(f"{workdir} is no fresh folder, and has no config.json")
        return
    try:
        there = result_fields(json.loads(path.read_text()))
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    here = result_fields(_as_dict(config))
    differing = [
        f"{field} ({there.get(field)!r} there, {here.get(field)!r} here)"
        for field in sorted(there.keys() | here.keys())
        if there.get(field) != here.get(field)
    ]
    if differing:
        raise ConfigError(
            f"{workdir} holds the run of another config; they differ in "
            f"{', '.join(differing)}. Choose another workdir"
        )


def _shared_agents(experiment: Experiment) -> Path | None:
    """Where runs that pre-train the same agents on the same data share them."""
    config, dataset = experiment.config, experiment.dataset
    if not config.pretrain.cache_dir:
        return None
    parts = ("data.", "augmentation.", "model.", "pretrain.", "seed", "init")
    fields = {
        field: value
        for field, value in result_fields(_as_dict(config)).items()
        if field.startswith(parts)
    }
    fields |= {
        "agents": experiment.placement.n_agents,
        "examples": len(dataset.train.labels),
        "mean": dataset.mean.tolist(),
        "version": dimat_jax.__version__,
    }
    fingerprint = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    return Path(config.pretrain.cache_dir) / fingerprint.hexdigest()[:16]


def _read_agents(
    directory: Path, experiment: Experiment
) -> tuple[Variables, dict[str, Any]] | None:
    """Pre-trained agents, and the seconds and metrics of their training."""
    if not directory.exists():
        return None
    checkpoints = Checkpoints(directory, keep=1)
    try:
        return checkpoints.restore(lambda record: experiment.abstract_variables())
    finally:
        checkpoints.close()


def _write_agents(
    directory: Path, variables: Variables, record: dict[str, Any]
) -> None:
    # Elsewhere first: several runs may pre-train the same agents at a time.
    partial = directory.with_name(f".{directory.name}-{uuid.uuid4().hex}")
    checkpoints = Checkpoints(partial, keep=1)
    checkpoints.save(0, variables, record)
    checkpoints.close()
    try:
        os.replace(partial, directory)
    except OSError:  # another run was faster, and its agents are as good
        shutil.rmtree(partial)
