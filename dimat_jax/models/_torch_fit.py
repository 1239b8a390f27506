"""Finds the module of an architecture to which named arrays belong.

The names and shapes of arrays tell an architecture's settings, its width, the number of
classes, and the sizes of images. This holds for PyTorch's keys and shapes as well as
for this library's own, so importing and exporting weights share it.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from dimat_jax.models._state_dict import TorchImportError, listed
from dimat_jax.models._torch_names import (
    ARCHITECTURES,
    Leaf,
    Settings,
    keys_of,
    leaves_of,
    settings_of,
)

__all__ = ["FLAX", "TORCH", "Fit", "Framework", "find_fit"]

Shape = tuple[int, ...]


class Framework(NamedTuple):
    """How a framework names leaves and orders the axes of kernels.

    Attributes:
        labels: a function from a leaf's path and keys to the names that it may have.
        shape: a function from a leaf to its shape.
        inputs: the axis of a kernel's input channels.
        outputs: the axis of a kernel's output channels.
    """

    labels: Callable[[str, tuple[str, ...]], tuple[str, ...]]
    shape: Callable[[Leaf], Shape]
    inputs: int
    outputs: int


FLAX = Framework(lambda path, keys: (path,), lambda leaf: leaf.shape, -2, -1)
TORCH = Framework(lambda path, keys: keys, lambda leaf: leaf.torch_shape, 1, 0)


class Fit(NamedTuple):
    """How named arrays fit an architecture.

    Attributes:
        name: a key of `ARCHITECTURES`.
        arguments: the arguments of `MODELS[name]`.
        leaves: by the name of each array, the leaf that it is.
        faults: by the kind of a fault, descriptions of the arrays that have it.
        resembled: the names of other architectures whose leaves have these names.
    """

    name: str
    arguments: dict[str, Any]
    leaves: dict[str, Leaf]
    faults: dict[str, list[str]]
    resembled: tuple[str, ...] = ()

    @property
    def n_faults(self) -> int:
        """The number of faults, of all kinds."""
        return sum(map(len, self.faults.values()))

    def check(self, source: str) -> None:
        """Raises a TorchImportError that lists the faults, if there are any."""
        if not self.n_faults:
            return
        arguments = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        message = f"{source} does not fit {self.name} ({arguments})"
        if self.resembled:
            message += f": these are the names of {' and '.join(self.resembled)}"
        faults = [
            f"{kind}: {listed(arrays)}"
            for kind, arrays in self.faults.items()
            if arrays
        ]
        raise TorchImportError(f"{message}. {'; '.join(faults)}")


def find_fit(name: str, shapes: Mapping[str, Shape], framework: Framework) -> Fit:
    """Finds the settings and sizes of an architecture that fit arrays best.

    Args:
        name: a key of `ARCHITECTURES`.
        shapes: the shape of each array, by its name.
        framework: the framework whose names and layouts these are.

    Raises:
        TorchImportError: there is no such architecture.
    """
    fits = []
    for settings in settings_of(name):
        fits.append(_fit_settings(name, settings, shapes, framework))
        if not fits[-1].n_faults:
            return fits[-1]
    best = min(fits, key=lambda fit: fit.n_faults)
    if best.faults["missing"] or best.faults["unexpected"]:
        return best._replace(resembled=_architectures_of(shapes, framework))
    return best


def _fit_settings(
    name: str,
    settings: Settings,
    shapes: Mapping[str, Shape],
    framework: Framework,
) -> Fit:
    found, missing, unexpected = _pair(keys_of(name, settings), shapes, framework)
    narrow = leaves_of(name, settings)

    def size(path: str, axis: int) -> int:
        """The size of a leaf's axis, or 0 if no array tells it."""
        shape = shapes.get(found.get(path, ""), ())
        return shape[axis] if len(shape) == len(narrow[path].shape) else 0

    stem, head = "params/conv0/kernel", "params/head/kernel"
    channels = size(stem, framework.outputs)
    image_channels = size(stem, framework.inputs)
    n_classes, features = size(head, framework.outputs), size(head, framework.inputs)
    sizes_known = all((channels, image_channels, n_classes, features))
    leaves, arguments = narrow, dict[str, Any](settings)
    if sizes_known:
        width = channels / narrow[stem].shape[-1]
        pixels = max(int(features / (width * narrow[head].shape[0])), 1)
        leaves = leaves_of(name, settings, n_classes, width, image_channels, pixels)
        arguments = {"n_classes": n_classes, "width": width, **arguments}
    misshapen = []
    for path, label in found.items():
        shape, expected = shapes[label], framework.shape(leaves[path])
        if len(shape) != len(expected) or 0 in shape:
            misshapen.append(f"{label} {shape}, expected {len(expected)} axes, none 0")
        elif sizes_known and shape != expected:
            misshapen.append(f"{label} {shape}, expected {expected}")
    faults = {
        "missing": missing,
        "unexpected": [f"{label} {shapes[label]}" for label in unexpected],
        "of another shape": misshapen,
    }
    labelled = {label: leaves[path] for path, label in found.items()}
    return Fit(name, arguments, labelled, faults)


def _pair(
    keys: Mapping[str, tuple[str, ...]], labels: Collection[str], framework: Framework
) -> tuple[dict[str, str], list[str], list[str]]:
    """Pairs leaves with the names of arrays.

    If arrays have two spellings of one leaf's name, the second of them is unexpected.

    Args:
        keys: for each leaf's path, the spellings of its PyTorch key.
        labels: the names of the arrays.
        framework: the framework whose names these are.

    Returns:
        for each leaf's path, the name of its array; the names of the leaves that have
        no array; and the names of the arrays that belong to no leaf.
    """
    found, missing, present = {}, [], set(labels)
    for path, spellings in keys.items():
        names = framework.labels(path, spellings)
        if matches := [name for name in names if name in present]:
            found[path] = matches[0]
        else:
            missing.append(names[0])
    paired = set(found.values())
    # PyTorch's BatchNorm counts its batches, which has no counterpart in Flax.
    counters = {
        f"{label.removesuffix('.running_mean')}.num_batches_tracked" for label in paired
    }
    unexpected = [label for label in labels if label not in paired | counters]
    return found, missing, unexpected


def _architectures_of(labels: Collection[str], framework: Framework) -> tuple[str, ...]:
    """The architectures whose leaves have exactly these names."""

    def fits(name: str, settings: Settings) -> bool:
        _, missing, unexpected = _pair(keys_of(name, settings), labels, framework)
        return not missing and not unexpected

    return tuple(
        name
        for name in ARCHITECTURES
        if any(fits(name, settings) for settings in settings_of(name))
    )
