"""How much memory a run needs at least, so that one that cannot fit is refused at once.

Only what is certain is counted: the graph, the weights with their gradients, the images
of a batch, and the lists on the host. A run needs more than that.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dimat_jax._chosen import number_of_agents
from dimat_jax._division import load_data
from dimat_jax._fields_together import check_data
from dimat_jax._jaxprs import ClosedJaxpr
from dimat_jax._run_options import BATCH_SIZE, LOCAL_EPOCHS, LOCAL_STEPS, ROUNDS
from dimat_jax.config import ROOT, Config, ConfigError, model_arguments
from dimat_jax.data import selection, sources
from dimat_jax.data.pipeline import FLIP, PAD
from dimat_jax.data.sources import SOURCE, SOURCES, Dataset, Signature
from dimat_jax.errors import UserError, in_one_line
from dimat_jax.evaluate import BATCH_SIZE as EVAL_BATCH_SIZE
from dimat_jax.models import MODEL, MODELS, ModelRecord, classifier
from dimat_jax.options import read
from dimat_jax.placement import AGENTS
from dimat_jax.tasks import TASK, TASKS, output_shape

__all__ = [
    "check_graph_and_steps",
    "check_model",
    "check_steps",
    "load_checked",
    "memory",
]

Fields = Mapping[str, Any]
"""The values of a config's fields, by dotted path; empty ones are resolved."""

# What bundled models raise for images of sizes that they cannot take.
_REFUSALS = (ValueError, TypeError, ArithmeticError)
# Steps are counted in whole numbers of 32 bits on the devices.
_MOST_STEPS = 2**31
# Bytes of an entry of the matrices that every graph needs: float64 and a bool.
_GRAPH_ENTRY = 9
# Bytes of an entry of a list.
_POINTER = 8


def memory() -> int:
    """The bytes of memory of this machine, swap space left out, or of its container."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in (
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ):
        try:
            with open(path) as file:
                found = min(found, int(file.read()))
        except (OSError, ValueError):
            pass  # There is no such limit.
    return found


def check_graph_and_steps(fields: Fields) -> None:
    """Refuses more agents or steps than this machine could hold.

    Raises:
        ConfigError: The message names the field, and says how much memory it needs.
    """
    n_agents = number_of_agents(fields)
    _refuse(
        f"config.{AGENTS.path} is {n_agents}: the graph of so many agents",
        _GRAPH_ENTRY * n_agents**2,
    )
    for option in (LOCAL_STEPS, LOCAL_EPOCHS):
        steps = fields[option.path]
        where = f"config.{option.path} is {steps}"
        _refuse(f"{where}: the list of a round's steps", _POINTER * steps)
        check_steps(f"config.{ROUNDS.path}", steps * fields[ROUNDS.path])


def check_steps(where: str, steps: int) -> None:
    """Refuses more steps than can be counted.

    Args:
        where: The field that asks for so many steps.
        steps: Their number.

    Raises:
        ConfigError: There are too many.
    """
    if steps >= _MOST_STEPS:
        raise ConfigError(
            f"{where} asks for at least {steps} local steps; a phase of a run has less "
            f"than {_MOST_STEPS}"
        )


def check_model(fields: Fields, data: Signature | None = None) -> ClosedJaxpr:
    """Refuses models and batches that are larger than the memory, before data are read.

    Args:
        fields: The config's fields.
        data: What the model must know of the data set. By default it is what the data
            set's source declares, which has to be something then.

    Returns:
        The traced function that draws the variables of a model.

    Raises:
        ConfigError: The message names the field, and says how much memory it needs; or
            the model does not take the data set's images; or images are to be augmented
            that are none.
    """
    n_agents = number_of_agents(fields)
    data = data or SOURCES[fields[SOURCE.path]].signature
    assert data is not None
    for option in (FLIP, PAD):
        if fields[option.path] and not data.has_images:
            raise ConfigError(
                f"config.{option.path} is {fields[option.path]}, but the inputs of "
                f"{data.name} are no images: they are {data.input_dtype}"
                f"{list(data.input_shape)}"
            )
    for what, n_bytes in _batches(fields, data):
        _refuse(what, n_bytes, on_devices=True)
    name, given = fields[MODEL.path], model_arguments(fields)
    shape = output_shape(TASKS[fields[TASK.path]], data.n_classes, data.input_shape)
    traced = _traced_init(MODELS[name], tuple(sorted(given.items())), data, shape)
    one = sum(math.prod(x.shape) * x.dtype.itemsize for x in traced.out_avals)
    _refuse(
        f"{n_agents} agent(s) with a {name} of {_words(one)} each, and the gradients,",
        2 * one * n_agents,
        on_devices=True,
    )
    return traced


def load_checked(
    config: Config,
    fields: Fields,
    read_data: Callable[..., Dataset] = sources.read,
) -> tuple[Dataset, ClosedJaxpr]:
    """Loads a run's data, and checks that the config, the model and they fit together.

    What the data set's source declares is checked before the data are loaded, because
    that may take minutes. The rest is checked afterwards.

    Args:
        config: The run's config.
        fields: The config's fields.
        read_data: Reads a whole data set, as `sources.read` does.

    Returns:
        The data set, and what `check_model` returns.

    Raises:
        UserError: The data cannot be loaded, or they, the config and the model do not
            fit together.
    """
    declared = SOURCES[fields[SOURCE.path]].signature
    traced = None if declared is None else check_model(fields, declared)
    dataset = load_data(config, read_data)
    if traced is None:
        check_data(fields, dataset.signature)
        traced = check_model(fields, dataset.signature)
    return dataset, traced


@functools.lru_cache(maxsize=32)
def _traced_init(
    record: ModelRecord,
    given: tuple[tuple[str, Any], ...],
    data: Signature,
    output: tuple[int, ...],
) -> ClosedJaxpr:
    """Traces the function that draws a model's variables; see `check_model`."""
    model = record(n_classes=data.n_classes, **dict(given))
    model = classifier.for_inputs(model, data.input_shape, data.input_dtype)
    images = np.zeros((1, *data.input_shape), data.input_dtype)
    expected = (1, *output)

    def draw(key):
        variables = classifier.init(model, key, images)
        if record.spec is not None and data.input_dtype == "float32":
            return variables
        # A model of a user may draw its variables without looking at the inputs.
        outputs = classifier.forward(model)(variables, jnp.asarray(images))
        if outputs.shape != expected:
            raise ConfigError(
                f"config.{MODEL.path} is {record.name!r}, which returns an array of "
                f"shape {outputs.shape} for one image; expected logits, {expected}"
            )
        return variables, outputs

    try:
        return jax.make_jaxpr(draw)(jax.random.key(0))
    except UserError:
        raise
    except Exception as error:
        if record.spec is not None and not isinstance(error, _REFUSALS):
            raise
        if data.has_images:
            height, width, _ = data.input_shape
            what = f"images of {height} x {width} pixels"
        else:
            what = f"inputs {data.input_dtype}{list(data.input_shape)}"
        raise ConfigError(
            f"config.{MODEL.path} is {record.name!r}, which cannot take {what}, as "
            f"{data.name} has: {in_one_line(error)}"
        ) from error


def _batches(fields: Fields, data: Signature) -> Iterator[tuple[str, int]]:
    """Yields the batches of images that a run makes, with their bytes."""
    found, n_agents = read(ROOT, fields), number_of_agents(fields)
    readers = {
        BATCH_SIZE.path: n_agents,
        BATCH_SIZE.under("pretrain").path: n_agents,
        EVAL_BATCH_SIZE.path: 1,
        selection.BATCH_SIZE.path: 1,
        selection.BN_BATCH_SIZE.path: 1,
    }
    for path, times in readers.items():
        if path in found:
            size = fields[path]
            pixels = times * size * math.prod(data.input_shape)
            yield f"config.{path} is {size}: a batch of so many images", 4 * pixels
    if not data.has_images:
        return
    height, width, channels = data.input_shape
    pad = 2 * fields[PAD.path]
    padded = (height + pad) * (width + pad) * channels
    yield (
        f"config.{PAD.path} is {fields[PAD.path]}: a batch of images of "
        f"{height + pad} x {width + pad} pixels",
        n_agents * fields[BATCH_SIZE.path] * padded,
    )


def _refuse(what: str, n_bytes: int, on_devices: bool = False) -> None:
    """Refuses what needs more bytes than all processes have.

    What lies on devices is only refused where these are the CPU: accelerators have
    memory of their own.
    """
    available = memory()
    if n_bytes <= available:
        return
    # These questions start JAX, so they are asked only if they matter.
    if on_devices and jax.default_backend() != "cpu":
        return
    available *= jax.process_count()
    if n_bytes > available:
        raise ConfigError(
            f"{what} would need at least {_words(n_bytes)} of memory, but there are "
            f"{_words(available)}"
        )


def _words(n_bytes: int) -> str:
    """A number of bytes in words."""
    size, units = n_bytes, ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"]
    place = max(0, min((max(size, 1).bit_length() - 1) // 10, len(units) - 1))
    # Whole numbers may be too large for a float.
    return f"{size // 2 ** (10 * place)} {units[place]}"
