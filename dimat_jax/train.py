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
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import auto, tqdm

import dimat_jax
from dimat_jax._division import too_small_to_normalise
from dimat_jax._lock import Lock, held
from dimat_jax._pauses import RunPauses
from dimat_jax._pretrain import pretrain
from dimat_jax._processes import check_equal, from_main, is_main, together
from dimat_jax._race import settled
from dimat_jax._restored import mend_rows
from dimat_jax._rounds import Rounds
from dimat_jax._run_log import RunLog
from dimat_jax._signals import deferrable
from dimat_jax._slots import agent_of_slots, local_slots
from dimat_jax._starting import Start, is_there, read_start
from dimat_jax._storage import explained
from dimat_jax.algorithms.base import State
from dimat_jax.config import Config, ConfigError, fields_of
from dimat_jax.data.partition import table
from dimat_jax.errors import concerning
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
    make_bar: Callable[..., tqdm] = auto.tqdm,
    callbacks: Sequence[Callable[[dict[str, Any]], Any]] = (),
) -> dict[str, Any]:
    """Runs a config, or what is left of it, and writes all results into `workdir`.

    With several processes (see `jax.distributed`), all of them make the same call.
    Each trains the agents on its own devices; process 0 logs and writes.

    Args:
        config: A config as `config.default_config` describes.
        workdir: The run's folder. It is made if it is missing, and may hold the same
            config's interrupted run.
        log: A function that receives a line of text for every evaluation, and for
            every epoch of pre-training and of long rounds.
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
        if (summary := _finished(folder, config, log)) is not None:
            return summary
        with _locked(folder, log) as lock:
            # Another process may have worked here before the lock was taken.
            with together():
                folder.check(config)
            if (summary := _finished(folder, config, log)) is not None:
                return summary
            with together():
                _set_rounds(folder, config, log)
            experiment, start = _prepare(config, folder, log)
            with (
                refusals_explained(experiment.placement),
                Results(folder, experiment, callbacks) as results,
                _bar(experiment, results, make_bar) as bar,
            ):
                every = config.checkpoint.every_minutes
                pauses = RunPauses(results, every, signals, lock)
                log = log if bar.disable else bar.write
                try:
                    _train(experiment, start, results, pauses, log, bar.update)
                except Stopped as stopped:
                    log(f"the run ends early: {stopped}")
                return results.summarize()


def _train(
    experiment: Experiment,
    start: Start | None,
    results: Results,
    pauses: RunPauses,
    log: Callable[[str], None],
    tick: Callable[[int], Any],
) -> None:
    """Does what is left of a run: pre-training, and then the rounds."""
    config, algorithm = experiment.config, experiment.algorithm
    run_log = RunLog(experiment, results, log)
    evaluate = run_log.evaluation
    progress, state = results.progress, results.restore()
    if state is not None:
        log(f"going on after local step {progress.steps_done}")
    if state is None or progress.epoch < config.pretrain.epochs:
        begin = experiment.initial_variables
        if start is not None:
            begin = partial(start.variables, experiment)
        state, metrics = pretrain(
            experiment, results, state, begin, run_log, tick, pauses
        )
        evaluate("pretrained", 0, state, metrics)
        results.save(state)
    messages = algorithm.messages(state)
    rounds = Rounds(experiment, progress, messages, pauses, tick, run_log.training)
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


def _finished(
    folder: Workdir, config: Config, log: Callable[[str], None]
) -> dict[str, Any] | None:
    """The summary of a run that has finished; None if it has not."""
    if (summary := from_main(folder.read_summary(config.rounds))) is not None:
        log(f"{folder.path} holds this run, finished")
        if jax.process_count() == 1 and mend_rows(folder.path, summary, log):
            log("its rows were damaged, and are restored from its last checkpoint")
    return summary


def _set_rounds(folder: Workdir, config: Config, log: Callable[[str], None]) -> None:
    """Lets a run that has begun go on to the rounds of a config."""
    if is_main() and folder.is_started:
        before = folder.set_rounds(config.rounds)
        if before is not None:
            log(f"the run goes on to {config.rounds} rounds; it was one of {before}")


@contextmanager
def _locked(folder: Workdir, log: Callable[[str], None]) -> Iterator[Lock | None]:
    """Keeps other runs out of the folder. Process 0 alone has the lock."""
    lock = None
    with ExitStack() as stack:
        with together():
            if is_main():
                lock = stack.enter_context(held(folder.path, log))
        yield lock


def _prepare(
    config: Config, folder: Workdir, log: Callable[[str], None]
) -> tuple[Experiment, Start | None]:
    """Builds and checks a run's experiment, and makes its folder if it is new.

    Returns:
        The experiment, and the trained weights that the config names. These are None if
        it names none, or if the run no longer needs them and they are gone.
    """
    is_new = not from_main(folder.is_started)
    goes_on = from_main(folder.has_checkpoint)
    with together():
        start = read_start(config) if is_there(config) or not goes_on else None
        experiment = settled(folder.with_own_files(config), folder, log)
        folder.check_data(experiment)
        if start is not None:
            start.check(experiment)
            folder.check_start(start.digest)
    check_equal(
        {
            "the digest of their data": experiment.data_digest,
            "the digest of the weights they start from": start and start.digest,
        }
    )
    with together():
        if is_new and experiment.record.aligns:
            experiment.verify_spec()
    with together():
        if is_new and is_main():
            _warn(experiment)
            log(table(folder.create(experiment, start and start.digest)))
    with together():
        if not folder.is_started:
            raise ConfigError(
                f"{folder.path} is not the folder that process 0 writes; all processes "
                "must see the same workdir"
            )
    return experiment, start


def _warn(experiment: Experiment) -> None:
    """Warns of agents whose statistics for BatchNorm come from a single sample."""
    if experiment.task.batch_statistics is None:
        return
    if warning := too_small_to_normalise(experiment.division):
        logging.warning("%s", warning)


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
