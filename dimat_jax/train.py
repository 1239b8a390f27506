"""Runs a config.

    pre-train every agent alone
    every round:
        communicate (merge with the neighbours), evaluate
        train locally (and merge in between, if the config says so), evaluate
        checkpoint

One process at a time works in a folder. SIGTERM, SIGINT and SIGHUP end a run after its
current step, and the state is saved. A run that was killed goes on from its last
checkpoint when it is started again, with the same results: everything random depends on
the seed and on counters alone.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import dimat_jax
from dimat_jax._lock import Lock, held
from dimat_jax._measuring import Measuring
from dimat_jax._pauses import RunPauses
from dimat_jax._pretrain import pretrain
from dimat_jax._processes import check_equal, from_main, is_main, together
from dimat_jax._race import settled
from dimat_jax._restored import mend_rows
from dimat_jax._rounds import Rounds
from dimat_jax._signals import deferrable
from dimat_jax._slots import agent_of_slots, local_slots
from dimat_jax._storage import explained
from dimat_jax.algorithms.base import State
from dimat_jax.config import Config, ConfigError, fields_of
from dimat_jax.data.partition import table
from dimat_jax.errors import NonFiniteError, concerning
from dimat_jax.experiment import Experiment
from dimat_jax.permutation._verify import InconclusiveError
from dimat_jax.placement import refusals_explained
from dimat_jax.workdir import Results, Stopped, Workdir, load_agents

__all__ = ["load_agents", "run"]

# What holds after the system has refused to write a file.
_GOES_ON = (
    "Earlier checkpoints are as they were; the same command goes on once this is mended"
)


def run(
    config: Config,
    workdir: str | os.PathLike[str],
    log: Callable[[str], None] = print,
    make_bar: Callable[..., tqdm] = tqdm,
    callbacks: Sequence[Callable[[dict[str, Any]], Any]] = (),
) -> dict[str, Any]:
    """Runs a config, or what is left of it, and writes all results into `workdir`.

    With several processes (see `jax.distributed`), all of them make the same call.
    Each trains the agents on its own devices; process 0 logs and writes.

    Args:
        config: A config as `config.default_config` describes.
        workdir: The run's folder. It is made if it is missing, and may hold the same
            config's interrupted run.
        log: A function that receives a line of text for every evaluation.
        make_bar: The class of the progress bar, which counts local steps.
        callbacks: Functions that receive every row, beside the callbacks that the
            config names; see `dimat_jax.callbacks`.

    Returns:
        The content of `workdir`/summary.json.

    Raises:
        UserError: The config cannot be run, or the folder holds another run, or
            another process works there.
        StorageError: A file cannot be written, because the disk is full for example.
        Interrupted: A signal has ended the run. What it has done is saved.
        NonFiniteError: A loss is not finite.
        CallbackError: A callback has failed. What the run has done is saved.
        PlacementError: The devices refuse the layout, or have too little memory.
    """
    folder, log = Workdir(workdir), log if is_main() else _silent
    with explained(folder.path, _GOES_ON), deferrable() as signals:
        _check(config, folder)
        if (summary := _finished(folder, log)) is not None:
            return summary
        with _locked(folder, log) as lock:
            # Another process may have worked here before the lock was taken.
            with together():
                folder.check(config)
            if (summary := _finished(folder, log)) is not None:
                return summary
            experiment = _prepare(config, folder, log)
            with (
                refusals_explained(experiment.placement),
                Results(folder, experiment, callbacks) as results,
                _bar(experiment, results, make_bar) as bar,
            ):
                every = config.checkpoint.every_minutes
                pauses = RunPauses(results, every, signals, lock)
                log = log if bar.disable else bar.write
                try:
                    _train(experiment, results, pauses, log, bar.update)
                except Stopped as stopped:
                    log(f"the run ends early: {stopped}")
                return results.summarize()


def _train(
    experiment: Experiment,
    results: Results,
    pauses: RunPauses,
    log: Callable[[str], None],
    tick: Callable[[int], Any],
) -> None:
    """Does what is left of a run: pre-training, and then the rounds."""
    config, algorithm = experiment.config, experiment.algorithm
    evaluate = _Evaluations(experiment, results, log)
    progress, state = results.progress, results.restore()
    if state is not None:
        log(f"going on after local step {progress.steps_done}")
    if state is None or progress.epoch < config.pretrain.epochs:
        state, metrics = pretrain(experiment, results, state, log, tick, pauses)
        evaluate("pretrained", 0, state, metrics)
        results.save(state)
    messages = algorithm.messages(state)
    rounds = Rounds(experiment, progress, messages, pauses, tick)
    verify = _Verifications(experiment, log)
    # Whether agents communicate at the beginning of a round, or while they train.
    at_once = bool(messages.round or messages.server)

    for number in range(progress.round + 1, config.rounds + 1):
        pauses.before_round(state)
        is_last = number == config.rounds
        evaluates = is_last or number % config.eval.every == 0

        for part in rounds.parts(number):
            if not rounds.is_begun(part):
                if part.merge == 1:
                    verify(state, "before the first merge")
                state, metrics = rounds.communicate(state, part)
                if evaluates and part.begins_round and part.merge is not None:
                    changed = at_once or experiment.recalibrates == "communication"
                    metrics["communicated"] = at_once
                    evaluate("merged", number, state, metrics, rounds.frames, changed)
            state = rounds.train(state, part)
        metrics = {**rounds.end(number), "communicated": not at_once}
        if evaluates:
            evaluate("trained", number, state, metrics, rounds.frames)
        due = number % config.checkpoint.every == 0 or results.keeps(number)
        if is_last or due:
            results.save(state)
    verify(state, "at the end of the run")


def _finished(folder: Workdir, log: Callable[[str], None]) -> dict[str, Any] | None:
    """The summary of a run that has finished; None if it has not."""
    if (summary := from_main(folder.read_summary())) is not None:
        log(f"{folder.path} holds this run, finished")
        if jax.process_count() == 1 and mend_rows(folder.path, summary, log):
            log("its rows were damaged, and are restored from its last checkpoint")
    return summary


@contextmanager
def _locked(folder: Workdir, log: Callable[[str], None]) -> Iterator[Lock | None]:
    """Keeps other runs out of the folder. Process 0 alone has the lock."""
    lock = None
    with ExitStack() as stack:
        with together():
            if is_main():
                lock = stack.enter_context(held(folder.path, log))
        yield lock


def _prepare(config: Config, folder: Workdir, log: Callable[[str], None]) -> Experiment:
    """Builds and checks a run's experiment, and makes its folder if it is new."""
    is_new = not from_main(folder.is_started)
    with together():
        experiment = settled(folder.with_own_files(config), folder, log)
        folder.check_data(experiment)
    check_equal({"the digest of their data": experiment.data_digest})
    with together():
        if is_new and experiment.record.aligns:
            experiment.verify_spec()
    with together():
        if is_new and is_main():
            log(table(folder.create(experiment)))
    with together():
        if not folder.is_started:
            raise ConfigError(
                f"{folder.path} is not the folder that process 0 writes; all processes "
                "must see the same workdir"
            )
    return experiment


def _check(config: Config, folder: Workdir) -> None:
    """Refuses a config or a folder that cannot be used, before anything is written."""
    with together():
        folder.check(config)
    fields = {f"config.{name}": value for name, value in fields_of(config).items()}
    versions = {
        "the version of dimat_jax": dimat_jax.__version__,
        "the version of jax": jax.__version__,
        "the workdir's name": folder.path.resolve().name,
    }
    check_equal({**fields, **versions})


def _silent(line: str) -> None:
    """Logs nothing, in processes that do not print."""
    del line


def _bar(
    experiment: Experiment, results: Results, make_bar: Callable[..., tqdm]
) -> tqdm:
    """A progress bar over all local steps, drawn on terminals only."""
    rounds = experiment.config.rounds
    return make_bar(
        total=experiment.pretrain_steps + rounds * experiment.local_steps,
        initial=results.progress.steps_done,
        unit="step",
        disable=None if is_main() else True,
    )


class _Verifications:
    """Verifies a run's permutation spec on trained weights.

    New weights may hide a wrong spec: an array that an initializer fills with some
    pattern, for example, may look the same after a permutation of its units.

    Args:
        experiment: What the run's config describes.
        log: A function that receives a line of text if rounding hides whether the
            symmetry holds. A run is not ended for that.
    """

    def __init__(self, experiment: Experiment, log: Callable[[str], None]):
        self._experiment = experiment
        self._log = log

    def __call__(self, state: State, when: str) -> None:
        """Verifies the spec on the weights of one agent of this process.

        An algorithm that aligns no agents has no use for a spec, which is not verified.

        Args:
            state: The agents' state.
            when: When in the run this is, for the message.

        Raises:
            PermutationSpecError: The declared symmetry does not hold. The message names
                the group and the leaf that is declared wrongly.
        """
        experiment = self._experiment
        if not experiment.record.aligns:
            return
        stacked = experiment.algorithm.variables(state)
        slot = local_slots(experiment.placement)[0]
        agent = agent_of_slots(experiment.placement)[slot]
        one = jax.tree.map(_first_local, stacked)
        what = f"the permutation spec, on agent {agent}'s weights {when}"
        with together():
            try:
                with concerning(what):
                    experiment.verify_spec(one)
            except InconclusiveError as error:
                self._log(f"{error} (the run goes on)")


def _first_local(stacked: jax.Array) -> np.ndarray:
    """Copies the first row of a stacked array that is on this process's devices."""
    shards = stacked.addressable_shards
    first = min(shards, key=lambda shard: shard.index[0].start or 0)
    return np.array(first.data[0])


class _Evaluations:
    """Evaluates the agents of a run, and reports how good they are.

    Args:
        experiment: What the run's config describes.
        results: The run's files, which get a row for every evaluation.
        log: A function that receives a line of text for every evaluation.
    """

    def __init__(
        self, experiment: Experiment, results: Results, log: Callable[[str], None]
    ):
        self._measure = Measuring(experiment)
        self._results = results
        self._log = log
        # What was measured last, and the number of local steps done before it.
        self._last: tuple[int, dict[str, Any]] | None = None

    def __call__(
        self,
        phase: str,
        number: int,
        state: State,
        metrics: dict[str, Any],
        frames: Any = None,
        changed: bool = True,
    ) -> None:
        """Evaluates the agents.

        Args:
            phase: "pretrained", "merged" or "trained".
            number: The round; 0 before the first one.
            state: The agents' state.
            metrics: Further entries of the row in metrics.jsonl.
            frames: The agents' frames after the round's communication; None if there
                was none, or it aligned no agents.
            changed: Whether the agents may have changed since the last local step. If
                they have not, an evaluation after that step still holds.

        Raises:
            NonFiniteError: An agent's test loss is not finite.
        """
        step = self._results.progress.steps_done
        if changed or self._last is None or self._last[0] != step:
            self._last = step, self._measure(state, frames, number, step)
        _, measures = self._last
        loss = measures["test_loss"]
        if not np.isfinite(loss).all():
            agents = np.flatnonzero(~np.isfinite(loss)).tolist()
            raise NonFiniteError(
                f"the test loss of agent(s) {agents} is not finite in round {number} "
                f"(phase {phase!r})"
            )
        self._results.write(phase, number, measures, metrics)
        self._log(
            f"round {number:3d} {phase:>10}: "
            f"test accuracy {measures['test_accuracy_mean']:.4f} "
            f"± {measures['test_accuracy_std']:.4f} over agents, "
            f"loss {measures['test_loss_mean']:.4f}, "
            f"consensus distance {measures['consensus_distance']:.3g}"
        )
