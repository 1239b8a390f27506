"""Chooses the layout of a run's agents by a short timing, where that is worth it.

On a CPU a rule is enough (see `_layout_choice`). On accelerators no rule holds for all
models and devices: the layout that is fastest for a narrow ResNet is not the fastest
for a wide one. There a long run takes a few real training steps in several layouts, on
its own model and data. The fastest one is kept on disk for further runs of the same
kind. A short run follows the rule, because a race takes longer than it could save.

A run that resumes has the layout with which it began, because layouts differ by
rounding.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging

import dimat_jax
from dimat_jax._layout_choice import LayoutChoice
from dimat_jax._layouts import AUTO, PlacementError
from dimat_jax._metrics import write_json
from dimat_jax._trainer import Trainer
from dimat_jax.config import Config, fields_of, fields_read
from dimat_jax.data._cache import user_cache
from dimat_jax.errors import first_line
from dimat_jax.experiment import Experiment
from dimat_jax.workdir import Workdir

__all__ = ["candidates", "race", "racers", "settled"]

Seconds = Callable[[LayoutChoice], float]
"""Measures the seconds of a training step in a layout."""

# The number of timed steps in each layout, after a first one that compiles.
_STEPS = 5
# The seconds after which no further step of a layout is timed.
_CAP = 20.0
# The number of agents on a device up to which unrolling them is tried. Each agent adds
# to the time that compilation takes.
_FEW = 8
# The number of training steps from which on a run may race. On an H200 the first steps
# of five ResNet-20s in both layouts took 31 to 41 s together, most of it compilation,
# and the layout of the rule was at most a sixth slower than the fastest one: 8 ms a
# step.
_LONG = 5000


def settled(config: Config, folder: Workdir, log: Callable[[str], None]) -> Experiment:
    """Builds the experiment of a run in the layout that its agents shall have.

    Args:
        config: the run's config.
        folder: the run's folder. The layout of an interrupted run is read there.
        log: a function that receives a line of text about the layout.

    Raises:
        UserError: the config cannot be run.
        PlacementError: no layout runs on the devices.
    """
    automatic = config.placement.batching == AUTO.name
    begun = folder.read_layout() if automatic else None
    device = jax.devices()[0].device_kind
    if begun is not None and begun.device != device:
        log(f"the run began on {begun.device}, and goes on in a layout for {device}")
        begun = None
    experiment = Experiment(config, begun)
    if automatic and begun is None and len(candidates(experiment)) > 1:
        experiment = Experiment(config, _chosen(experiment, log))
    name, reason = experiment.layout.name, experiment.layout.reason
    log(f"agents on a device run as {name}: {reason}")
    return experiment


def candidates(experiment: Experiment) -> list[LayoutChoice]:
    """The layouts that are worth a timing. A single one needs none."""
    placement, preferred = experiment.placement, experiment.layout
    n_local = placement.slots // placement.mesh.shape["agents"]
    platform = placement.mesh.devices.flat[0].platform
    # Several processes would have to agree on the result, and on which layouts fail.
    several = jax.process_count() > 1
    if platform == "cpu" or several or n_local == 1 or not experiment.convolves:
        return [preferred]
    return racers(platform, n_local)


def racers(platform: str, n_local: int) -> list[LayoutChoice]:
    """The layouts that are timed, for some agents that share a device.

    On a GPU these are two, because the others were never the fastest there: see
    experiments/RESULTS.md.
    """
    batched = ("grouped",) if platform == "gpu" else ("vmap", "grouped", "im2col")
    if n_local <= _FEW:
        apart = LayoutChoice("unroll", 1, "")
    else:
        apart = LayoutChoice("chunks", 4, "")
    return [*(LayoutChoice(name, 1, "") for name in batched), apart]


def _chosen(experiment: Experiment, log: Callable[[str], None]) -> LayoutChoice:
    """Reads the fastest layout from the cache, or finds it and stores it there.

    A short run for which the cache has none keeps the layout that it has.
    """
    path = user_cache() / "layouts" / f"{_fingerprint(experiment)}.json"
    stored = _read(path)
    rounds = experiment.config.rounds * experiment.local_steps
    if stored is None and experiment.pretrain_steps + rounds < _LONG:
        return experiment.layout
    if stored is None:
        log("timing the layouts of agents, once for this model and device")

        def seconds(choice: LayoutChoice) -> float:
            return _step_seconds(Experiment(experiment.config, choice))

        device = experiment.placement.mesh.devices.flat[0].device_kind
        stored = race(candidates(experiment), seconds, device)
        _write(path, stored)
    return stored


def race(
    choices: Sequence[LayoutChoice], seconds: Seconds, device: str
) -> LayoutChoice:
    """Returns the fastest of several layouts.

    A layout that fails, because the device refuses it or has too little memory, drops
    out.

    Args:
        choices: the layouts.
        seconds: measures a training step in a layout.
        device: the kind of the device, for messages.

    Returns:
        the fastest layout. Its reason holds all times, and what has failed.

    Raises:
        PlacementError: every layout fails.
    """
    times, failures = {}, {}
    for choice in choices:
        try:
            times[choice] = seconds(choice)
        except (PlacementError, jax.errors.JaxRuntimeError) as error:
            failures[choice] = first_line(error)
    notes = [f"{choice.name} fails ({error})" for choice, error in failures.items()]
    if not times:
        raise PlacementError(f"no layout runs on {device}: {'; '.join(notes)}")
    ranking = sorted(times, key=lambda choice: times[choice])
    shown = [f"{choice.name} {1e3 * times[choice]:.4g} ms" for choice in ranking]
    reason = f"a training step takes {', '.join([*shown, *notes])}"
    return ranking[0]._replace(reason=reason, device=device)


def _step_seconds(experiment: Experiment) -> float:
    """Measures the median seconds of a training step."""
    state = experiment.algorithm.init(experiment.initial_variables())
    trainer = Trainer(
        experiment, experiment.algorithm, experiment.sampler, experiment.key("rounds")
    )
    times = []
    for step in range(1 + _STEPS):
        start = time.perf_counter()
        network = experiment.network_at_step(step, 1)
        # `train` returns once the losses are on the host, so no work is left then.
        state, _ = trainer.train(state, step, [network])
        times.append(time.perf_counter() - start)
        if step > 0 and sum(times) > _CAP:
            break
    return float(np.median(times[1:]))


def _fingerprint(experiment: Experiment) -> str:
    """A name for all runs that share the fastest layout."""
    config, placement = experiment.config, experiment.placement
    device = placement.mesh.devices.flat[0]
    parts = ("model.", "optimizer.name", "algorithm", "batch_size")
    fields = {
        field: value
        for field, value in fields_read(fields_of(config)).items()
        if field.startswith(parts)
    }
    fields |= {
        "agents": placement.n_agents,
        "devices": placement.mesh.size,
        "device": device.device_kind,
        "image": experiment.signature.input_shape,
        "classes": experiment.dataset.n_classes,
        "versions": [jax.__version__, dimat_jax.__version__],
    }
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _read(path: Path) -> LayoutChoice | None:
    """Reads a stored layout; None if there is none that can be read."""
    try:
        return LayoutChoice.read(path)
    except (OSError, ValueError, TypeError):
        return None


def _write(path: Path, choice: LayoutChoice) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, choice._asdict())
    except OSError as error:
        logging.warning("Cannot keep the choice of a layout: %s", error)
