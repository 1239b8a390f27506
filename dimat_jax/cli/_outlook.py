"""Says what a config will do, before anything is trained or written."""

import contextlib
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from dimat_jax import _sweeping
from dimat_jax._forecast import abstract_state, messages_of, what_is_sent
from dimat_jax._sweeping import StepTime, Timing
from dimat_jax._without_data import ExperimentWithoutData, Form
from dimat_jax.cli._field_texts import WIDTH
from dimat_jax.config import Config, check, fields_of, resolved
from dimat_jax.data import sources
from dimat_jax.data.partition import class_counts, table
from dimat_jax.data.sources import SOURCES, DataError
from dimat_jax.errors import SweepError, UserError
from dimat_jax.experiment import Experiment
from dimat_jax.mixing import spectral_gap
from dimat_jax.tree import nbytes

__all__ = ["outlook"]

# Each agent has a row of the partition, and its neighbours are listed, if there are at
# most so many agents.
_MOST_LISTED = 12
# The eigenvalues of the mixing matrix of more agents take too long to find.
_MOST_MIXED = 1024
_LABEL = 13
# What a data set's number of classes means, by the kind of its labels.
_LABELS = {
    "classes": "in {n} classes",
    "numbers": "with labels of {n} number{s}",
    "tokens": "of {n} different tokens",
}


class _Subject(NamedTuple):
    """What is described.

    Attributes:
        experiment: the parts of the run; those that need no data if these are missing.
        missing: why the data are missing; "" if they are there.
        timed: the time of a local step, or a sentence that says why there is none.
    """

    experiment: Experiment
    missing: str
    timed: StepTime | str


def outlook(config: Config, seconds: float) -> str:
    """Describes what a config will do.

    Nothing is written but caches of decoded data and of compiled programs. JAX should
    be bound to the CPU in this process, so that another one that times a few local
    steps has the accelerators.

    Args:
        config: the config.
        seconds: how long to wait at most for the times; 0 times nothing.

    Raises:
        UserError: the config cannot be run.
    """
    check(config)
    timing = Timing(config, _sweeping.share_out(1)[0]) if seconds else None
    try:
        experiment, missing = _experiment(config)
        subject = _Subject(experiment, missing, "")
        lines = _described(subject, _PARTS)
    except BaseException:
        if timing is not None:
            # The process that times steps may have failed, too, as what it runs is the
            # same config. The error of this process is the one to report.
            with contextlib.suppress(Exception):
                timing.wait(0)
        raise
    subject = subject._replace(timed=_timed(timing, seconds))
    return "\n".join([*lines, *_described(subject, _COSTS)])


def _described(
    subject: _Subject, parts: dict[str, Callable[[_Subject], Iterable[str]]]
) -> list[str]:
    lines = []
    for label, describe in parts.items():
        texts = [line for text in describe(subject) for line in _wrapped(text)]
        lines.append(f"{label:{_LABEL}}{texts[0]}")
        lines += [f"{'':{_LABEL}}{text}" for text in texts[1:]]
    return lines


def _wrapped(text: str) -> list[str]:
    # A table has lines of its own.
    return text.split("\n") if "\n" in text else textwrap.wrap(text, WIDTH - _LABEL)


def _experiment(config: Config) -> tuple[Experiment, str]:
    """Builds the experiment, or the parts of it that need no data if they are missing.

    Returns:
        the experiment, and why the data are missing.
    """
    try:
        return Experiment(config), ""
    except DataError as error:
        if _can_be_read(config):
            raise  # The config asks for what the data do not have.
        known = SOURCES[config.data.name].signature
        if known is None:
            raise  # The data alone tell what a model needs to know.
        sizes = [1] * config.agents
        form = Form(
            known.n_classes, known.input_shape, sizes, known.input_dtype, known.labels
        )
        return ExperimentWithoutData(config, form, str(error)), str(error)


def _can_be_read(config: Config) -> bool:
    """Whether the whole data set of a config can be read on this machine."""
    try:
        sources.read(
            config.data.name, config.data.dir or None, config.data.cache_dir or None
        )
    except DataError:
        return False
    return True


def _timed(timing: Timing | None, seconds: float) -> StepTime | str:
    """Waits for the time of a local step."""
    if timing is None:
        return "unknown: --seconds=0 times no local step"
    try:
        found = timing.wait(seconds)
    except (UserError, SweepError) as error:
        return f"unknown: {error}"
    if found is None:
        n_steps = _sweeping.CALIBRATION_STEPS + 1
        return (
            f"unknown: {n_steps} local steps were not compiled and taken within "
            f"{seconds:g} seconds; --seconds=N waits longer"
        )
    return found


# What the run does ====================================================================


def _data(subject: _Subject) -> Iterator[str]:
    experiment, missing, _ = subject
    config = experiment.config
    if missing:
        yield f"{config.data.name}, which cannot be read here: {missing}"
        yield "So the numbers of images and of steps are unknown."
        return
    dataset = experiment.dataset
    shape = " x ".join(map(str, experiment.input_shape))
    n = experiment.n_classes
    labels = _LABELS[dataset.labels].format(n=n, s="" if n == 1 else "s")
    yield (
        f"{config.data.name}: {len(dataset.train.labels)} training and "
        f"{len(dataset.test.labels)} test samples of {shape}, {labels}"
    )
    division = experiment.division
    kept_back = sum(map(len, division.validation)), len(division.held_out)
    for size, purpose in zip(kept_back, ("for validation", "held out"), strict=True):
        if size:
            yield f"{size} of the training samples are {purpose}"


def _agents(subject: _Subject) -> Iterator[str]:
    experiment, config = subject.experiment, subject.experiment.config
    n_agents = experiment.placement.n_agents
    variables = experiment.abstract_variables()
    params = jax.tree.leaves(variables["params"])
    n_params = sum(math.prod(leaf.shape[1:]) for leaf in params)
    each = nbytes(variables) // experiment.placement.slots
    yield (
        f"{n_agents} x {config.model.name}: {n_params:,} params, {_bytes(each)} each; "
        f"they start from {config.init_from or config.init + ' random weights'}"
    )
    if subject.missing or experiment.record.single:
        return
    yield f"partition {config.data.partition}:"
    if n_agents <= _MOST_LISTED:
        counts = class_counts(experiment.dataset.train.classes, experiment.shards)
        yield table(counts)
    else:
        sizes = sorted(map(len, experiment.shards))
        yield (
            f"{sizes[0]} to {sizes[-1]} samples each, with a median of "
            f"{sizes[len(sizes) // 2]}"
        )


def _network(subject: _Subject) -> Iterator[str]:
    experiment = subject.experiment
    links, n_agents = experiment.links, experiment.placement.n_agents
    if not experiment.record.uses_graph:
        server, drawn = messages_of(experiment).server, links.faults.sampled
        which = f"{drawn} agents, drawn anew in each round," if drawn else "agents"
        yield f"{which} send to a server" if server else "no agent sends anything"
        return
    edges = np.asarray(links.edges)
    degrees = edges.sum(axis=1).tolist()
    fewest, most = min(degrees), max(degrees)
    span = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    period = len(links.adjacency)
    times = f", which changes with a period of {period}" if period > 1 else ""
    yield (
        f"{experiment.config.topology}{times}: every agent hears {span} "
        f"other{'s' if most != 1 else ''}"
    )
    if n_agents <= _MOST_MIXED:
        gap = spectral_gap(links.mixing_matrix, per_step=True)
        yield (
            f"weights {experiment.config.mixing}: spectral gap {gap:.3g}, rho "
            f"{round((1 - gap) ** 2, 9):.3g}{' per step' if period > 1 else ''}"
        )
    if n_agents <= _MOST_LISTED and most < n_agents - 1:
        yield "; ".join(
            f"{agent} hears {', '.join(map(str, np.flatnonzero(row)))}"
            for agent, row in enumerate(edges)
        )
    faults, found = links.faults, []
    if faults.dropout:
        found.append(
            f"an agent is absent from a round with probability {faults.dropout:g}"
        )
    if faults.edge_loss:
        found.append(f"a link fails with probability {faults.edge_loss:g}")
    if faults.absences:
        found.append(f"absences: {experiment.config.faults.absences}")
    if found:
        yield "; ".join(found)


def _training(subject: _Subject) -> Iterator[str]:
    experiment, config = subject.experiment, subject.experiment.config
    record, fields = experiment.record, resolved(fields_of(config))
    yield (
        f"{record.title}, with {fields['optimizer.name']} at a learning rate of "
        f"{fields['optimizer.learning_rate']:g} ({config.optimizer.schedule})"
    )
    if subject.missing:
        yield f"{config.pretrain.epochs} epochs alone, then {config.rounds} rounds"
        return
    alone, per_round = experiment.pretrain_steps, experiment.local_steps
    if alone:
        yield f"alone: {config.pretrain.epochs} epochs, {alone} steps"
    yield (
        f"together: {config.rounds} rounds of {per_round} steps, "
        f"{config.rounds * per_round} steps with batches of {config.batch_size}"
    )


def _communication(subject: _Subject) -> Iterator[str]:
    experiment = subject.experiment
    messages, merge = messages_of(experiment), experiment.config.merge
    if messages.step:
        yield "with every local step"
    if experiment.record.merges and merge.unit == "steps":
        yield f"a merge in every round, before its first step and every {merge.every}"
    elif experiment.record.merges:
        yield f"a merge at the beginning of {_every(merge.every)}"
    elif messages.round or messages.server:
        yield "at the beginning of every round"
    if not (messages.step or messages.round or messages.server):
        yield "never"


def _measuring(subject: _Subject) -> Iterator[str]:
    config = subject.experiment.config
    number = config.eval.samples or "all"
    yield f"{number} test samples in {_every(config.eval.every)}, and at the end"


def _saving(subject: _Subject) -> Iterator[str]:
    checkpoint = subject.experiment.config.checkpoint
    minutes = checkpoint.every_minutes
    also = f", and after {minutes:g} minutes" if minutes else ""
    yield (
        f"a checkpoint after {_every(checkpoint.every)}{also}; the last "
        f"{checkpoint.keep} are kept"
    )


def _every(rounds: int) -> str:
    return "every round" if rounds == 1 else f"one round of {rounds}"


def _sent(subject: _Subject) -> Iterator[str]:
    experiment = subject.experiment
    if subject.missing:
        messages = messages_of(experiment)
        sizes = {
            "with a step, to each neighbour": messages.step,
            "with a communication, to each neighbour": messages.round,
            "to the server": messages.server,
        }
        for when, message in sizes.items():
            if message:
                yield f"{_bytes(nbytes(message))} {when}"
        return
    sent = what_is_sent(experiment)
    about = "" if sent.is_exact else "about "
    yield (
        f"{_bytes(sent.first_round)} in the first round, {about}{_bytes(sent.total)} "
        f"in all, in {about}{sent.comm_rounds:g} communication rounds of each agent"
    )
    if len(sent.by_kind) > 1:
        yield ", ".join(f"{kind} {_bytes(n)}" for kind, n in sent.by_kind.items())


_PARTS: dict[str, Callable[[_Subject], Iterable[str]]] = {
    "data": _data,
    "agents": _agents,
    "network": _network,
    "training": _training,
    "exchange": _communication,
    "evaluation": _measuring,
    "saved": _saving,
    "sent": _sent,
}
"""What is described before the times are known."""


# What it costs ========================================================================


def _time(subject: _Subject) -> Iterator[str]:
    experiment, missing, timed = subject
    config = experiment.config
    if isinstance(timed, str) or missing:
        yield "unknown without the data" if missing else str(timed)
        return
    per_image = timed.seconds / config.batch_size
    steps = config.rounds * experiment.local_steps
    alone, rounds = _sweeping.seconds_of(
        config, experiment.pretrain_steps, steps, per_image, per_image
    )
    yield (
        f"about {_duration(alone + rounds)} for local steps, of which "
        f"{_sweeping.CALIBRATION_STEPS} took {_duration(timed.seconds)} each on this "
        f"machine ({timed.device}); compiling, merging and evaluating come on top"
    )


def _memory(subject: _Subject) -> Iterator[str]:
    experiment = subject.experiment
    state = nbytes(abstract_state(experiment))
    yield f"{_bytes(state)} for the state of all agents (weights, optimizers, ...)"
    if not isinstance(subject.timed, str):
        yield f"the timed steps used up to {_bytes(subject.timed.memory)} in all"


_COSTS: dict[str, Callable[[_Subject], Iterable[str]]] = {
    "time": _time,
    "memory": _memory,
}
"""What is described once a few local steps have been timed, or have not."""


def _bytes(size: int) -> str:
    """A number of bytes with two digits or three, which say enough."""
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    place = 0
    while size >= 1000 ** (place + 1) and place < len(units) - 1:
        place += 1
    return f"{_rounded(size / 1000**place)} {units[place]}"


def _duration(seconds: float) -> str:
    """A duration with two digits, in a unit that people read easily."""
    for limit, divisor, unit in (
        (0.1, 1e-3, "ms"),
        (120, 1, "s"),
        (7200, 60, "minutes"),
    ):
        if seconds < limit:
            return f"{_rounded(seconds / divisor)} {unit}"
    return f"{_rounded(seconds / 3600)} hours"


def _rounded(number: float) -> str:
    digits = 2 if number < 100 else 3
    if not number:
        return "0"
    place = digits - 1 - math.floor(math.log10(number))
    return f"{round(number, place):,.{max(0, place)}f}"
