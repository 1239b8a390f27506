"""Finds the module of an architecture to which named arrays belong.

The names and shapes of arrays tell an architecture's settings, its width, the number of
classes, and the sizes of images. This holds for PyTorch's keys and shapes as well as
for this library's own, so importing and exporting weights share it.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from dimat_jax.models._state_dict import listed
from dimat_jax.models._torch_files import TorchImportError
from dimat_jax.models._torch_names import (
    ARCHITECTURES,
    Leaf,
    Names,
    Settings,
    Shape,
    architecture,
    keys_of,
    leaves_of,
    settings_of,
)

__all__ = ["FLAX", "TORCH", "Fit", "Framework", "find_fit", "fit_leaves"]


class Framework(NamedTuple):
    """How a framework names leaves and orders the axes of kernels.

    Attributes:
        labels: a function from a leaf's path and keys to the names that it may have.
        shape: a function from a leaf to its shape.
        inputs: the axis of a kernel's input channels.
        outputs: the axis of a kernel's output channels.
        may_lack_biases: whether a layer may have a kernel alone. Its bias is then 0.
    """

    labels: Callable[[str, tuple[str, ...]], tuple[str, ...]]
    shape: Callable[[Leaf], Shape]
    inputs: int
    outputs: int
    may_lack_biases: bool


FLAX = Framework(lambda path, keys: (path,), lambda leaf: leaf.shape, -2, -1, False)
TORCH = Framework(lambda path, keys: keys, lambda leaf: leaf.torch_shape, 1, 0, True)


class Fit(NamedTuple):
    """How named arrays fit an architecture.

    Attributes:
        name: a key of `ARCHITECTURES`, or words for another model.
        arguments: the arguments of `MODELS[name]`.
        leaves: by the name of each array, the leaf that it is.
        faults: by the kind of a fault, descriptions of the arrays that have it.
        absent: the biases that have no array, because their layers have none.
        resembled: the names of other architectures to which the arrays belong.
        unlike: the reason why the arrays belong to a model that this library does not
            have; "" if there is none.
    """

    name: str
    arguments: dict[str, Any]
    leaves: dict[str, Leaf]
    faults: dict[str, list[str]]
    absent: tuple[Leaf, ...] = ()
    resembled: tuple[str, ...] = ()
    unlike: str = ""

    @property
    def n_faults(self) -> int:
        """The number of faults, of all kinds."""
        return sum(map(len, self.faults.values()))

    def check(self, source: str) -> None:
        """Raises a TorchImportError that lists the faults, if there are any."""
        if not self.n_faults:
            return
        arguments = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        message = f"{source} does not fit {self.name}"
        if self.arguments:
            message += f" ({arguments})"
        if self.unlike:
            raise TorchImportError(f"{message}: {self.unlike}")
        if self.resembled:
            message += f": these are the names of {' and '.join(self.resembled)}"
        faults = [
            f"{kind}: {listed(arrays)}"
            for kind, arrays in self.faults.items()
            if arrays
        ]
        raise TorchImportError(f"{message}. {'; '.join(faults)}")


def find_fit(
    name: str, shapes: Mapping[str, Shape], framework: Framework, names: Names = ()
) -> Fit:
    """Finds the settings and sizes of an architecture that fit arrays best.

    Args:
        name: a key of `ARCHITECTURES`.
        shapes: the shape of each array, by its name.
        framework: the framework whose names and layouts these are.
        names: a user's names of layers.

    Raises:
        TorchImportError: there is no such architecture, or it lacks a layer of `names`.
    """
    fits = []
    for settings in settings_of(name):
        fits.append(_fit_settings(name, settings, shapes, framework, names))
        if not fits[-1].n_faults:
            return fits[-1]
    best = min(fits, key=lambda fit: fit.n_faults)
    return best._replace(
        resembled=_resembled(best, shapes, framework),
        unlike=architecture(name).unlike(shapes),
    )


def _fit_settings(
    name: str,
    settings: Settings,
    shapes: Mapping[str, Shape],
    framework: Framework,
    names: Names = (),
) -> Fit:
    narrow = leaves_of(name, settings, names=names)
    found = _pair(keys_of(name, settings, names), shapes, framework)[0]

    def size(path: str, axis: int) -> int:
        """The size of a leaf's axis, or 0 if no array tells it."""
        shape = shapes.get(found.get(path, ""), ())
        return shape[axis] if len(shape) == len(narrow[path].shape) else 0

    stem, head = "params/conv0/kernel", "params/head/kernel"
    channels = size(stem, framework.outputs)
    image_channels = size(stem, framework.inputs)
    n_classes, features = size(head, framework.outputs), size(head, framework.inputs)
    if not all((channels, image_channels, n_classes, features)):
        fit = fit_leaves(name, narrow, shapes, framework, sizes_known=False)
        return fit._replace(arguments=dict(settings))
    width = channels / narrow[stem].shape[-1]
    pixels = max(int(features / (width * narrow[head].shape[0])), 1)
    sizes = (n_classes, width, image_channels, pixels)
    leaves = leaves_of(name, settings, *sizes, names)
    arguments = {"n_classes": n_classes, "width": width, **dict(settings)}
    return fit_leaves(name, leaves, shapes, framework)._replace(arguments=arguments)


def fit_leaves(
    name: str,
    leaves: Mapping[str, Leaf],
    shapes: Mapping[str, Shape],
    framework: Framework,
    *,
    sizes_known: bool = True,
) -> Fit:
    """Pairs the leaves of a model with arrays, and collects the faults.

    Args:
        name: the name of the model for messages.
        leaves: the leaves of the model, by path.
        shapes: the shape of each array, by its name.
        framework: the framework whose names and layouts these are.
        sizes_known: whether arrays must have the shapes of the leaves. Otherwise, only
            the numbers of axes must agree.
    """
    keys = {path: leaf.keys for path, leaf in leaves.items()}
    found, missing, unexpected = _pair(keys, shapes, framework)
    absent = []
    if framework.may_lack_biases:
        absent = [p for p in missing if f"{p.removesuffix('bias')}kernel" in found]
    misshapen = []
    for path, label in found.items():
        shape, expected = shapes[label], framework.shape(leaves[path])
        if len(shape) != len(expected) or 0 in shape:
            misshapen.append(f"{label} {shape}, expected {len(expected)} axes, none 0")
        elif sizes_known and shape != expected:
            misshapen.append(f"{label} {shape}, expected {expected}")
    faults = {
        "missing": [name for path, name in missing.items() if path not in absent],
        "unexpected": [f"{label} {shapes[label]}" for label in unexpected],
        "of another shape": misshapen,
    }
    labelled = {label: leaves[path] for path, label in found.items()}
    return Fit(name, {}, labelled, faults, tuple(leaves[path] for path in absent))


def _pair(
    keys: Mapping[str, tuple[str, ...]], labels: Collection[str], framework: Framework
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Pairs leaves with the names of arrays.

    If arrays have two spellings of one leaf's name, the second of them is unexpected.

    Args:
        keys: for each leaf's path, the spellings of its PyTorch key.
        labels: the names of the arrays.
        framework: the framework whose names these are.

    Returns:
        for each leaf's path, the name of its array; for each leaf that has no array,
        the name that it would have; and the names of the arrays that belong to no leaf.
    """
    found, missing, present = {}, {}, set(labels)
    for path, spellings in keys.items():
        names = framework.labels(path, spellings)
        if matches := [name for name in names if name in present]:
            found[path] = matches[0]
        else:
            missing[path] = names[0]
    paired = set(found.values())
    # PyTorch's BatchNorm counts its batches, which has no counterpart in Flax.
    counters = {
        f"{label.removesuffix('.running_mean')}.num_batches_tracked" for label in paired
    }
    unexpected = [label for label in labels if label not in paired | counters]
    return found, missing, unexpected


def _resembled(
    fit: Fit, shapes: Mapping[str, Shape], framework: Framework
) -> tuple[str, ...]:
    """The architectures whose leaves have these names, and these shapes if need be."""
    names_differ = fit.faults["missing"] or fit.faults["unexpected"]

    def resembles(name: str, settings: Settings) -> bool:
        _, missing, unexpected = _pair(keys_of(name, settings), shapes, framework)
        if missing or unexpected:
            return False
        fits = (
            names_differ
            or not _fit_settings(name, settings, shapes, framework).n_faults
        )
        return bool(fits)

    return tuple(
        name
        for name in ARCHITECTURES
        if any(resembles(name, settings) for settings in settings_of(name))
    )
