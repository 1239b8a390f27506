"""A network's activations at the taps of its groups, as samples by units."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from dimat_jax.matching._blocks import cut_blocks
from dimat_jax.permutation import PermutationSpec, PermutationSpecError

__all__ = ["Activations", "check_taps", "tap_units", "with_last_taps"]

Activations = Mapping[str, Array]
"""The activations of a batch of inputs: one array for each tap's name."""


def check_taps(spec: PermutationSpec) -> None:
    """Raises PermutationSpecError for a group without a tap: it cannot be matched."""
    for group in spec.groups:
        if not spec.taps_of(group):
            raise PermutationSpecError(
                f"group {group!r} has no tap, so its activations cannot be matched"
            )


class _LastTaps(PermutationSpec):
    """A spec in which every group is observed at its last tap alone."""

    def taps_of(self, group: str) -> list[str]:
        return super().taps_of(group)[-1:]


def with_last_taps(spec: PermutationSpec) -> PermutationSpec:
    """Returns the spec in which only the last tap of each group shows its units.

    Taps are in the order of `spec.taps`, which is that of the network's layers in the
    bundled models and in derived specs.
    """
    return _LastTaps(spec.axes, spec.taps, spec.sizes, spec.statistics)


def tap_units(
    spec: PermutationSpec, sizes: Mapping[str, int], activations: Activations
) -> dict[str, dict[str, Float[Array, "*layers samples units"]]]:
    """Flattens the activations at each tap of each group to samples by units.

    Every position of a feature map is a sample. A stacked group has samples of the
    units of each layer. Where a tap shows several groups, a group's units are averaged
    over the units of the other groups, because the other groups' permutations do not
    change such a mean. A complex activation is two samples: its two parts. Samples keep
    their order: if examples are the array's first axis, the samples of one example are
    consecutive.

    Args:
        spec: the symmetry, with its taps.
        sizes: each group's number of units.
        activations: an array for each tap.

    Raises:
        PermutationSpecError: the activations lack a tap, or do not have its axes.
    """
    return {
        group: {
            tap: _tap_units(spec, sizes, group, tap, activations)
            for tap in spec.taps_of(group)
        }
        for group in spec.groups
    }


def _tap_units(spec, sizes, group: str, tap: str, activations: Activations) -> Array:
    if tap not in activations:
        raise PermutationSpecError(
            f"group {group!r} is observed at tap {tap!r}, which the activations lack; "
            f"they have {sorted(activations)}"
        )
    array = jnp.asarray(activations[tap])
    try:
        (block,) = cut_blocks(spec.tap_axes(tap, array.ndim), array.shape, sizes)
    except PermutationSpecError as error:
        raise PermutationSpecError(
            f"tap {tap!r}, of shape {array.shape}: {error}"
        ) from None
    others = tuple(
        axis for axis, other in enumerate(block.groups) if other not in (None, group)
    )
    layers = block.layers_of(group)

    def by_unit(real: Array) -> Array:
        units = jnp.moveaxis(
            real.reshape(block.shape).mean(others, keepdims=True, dtype=jnp.float32),
            (*layers, block.groups.index(group)),
            (*range(len(layers)), -1),
        )
        return units.reshape(*units.shape[: len(layers)], -1, units.shape[-1])

    if not jnp.iscomplexobj(array):
        return by_unit(array)
    # The two parts of a complex number are two samples.
    both = jnp.stack([by_unit(array.real), by_unit(array.imag)], axis=-2)
    return both.reshape(*both.shape[:-3], -1, both.shape[-1])
