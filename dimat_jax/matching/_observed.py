"""Networks whose units are observed on inputs, and correlated with each other."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dimat_jax.matching._descent import Pairs
from dimat_jax.matching._moments import (
    TapMoments,
    centre,
    group_scores,
    no_moments,
    of_layers,
    update_taps,
)
from dimat_jax.matching._taps import Activations, check_taps, tap_units
from dimat_jax.permutation import (
    PermutationSpec,
    PermutationSpecError,
    group_shapes,
    group_sizes,
)
from dimat_jax.tree import PyTree, stack

__all__ = ["ListedNetworks", "NetworkPrograms", "ObservedNetworks", "observer"]

Observed = dict[str, dict[str, Any]]
"""What one network shows of a batch, for each group and tap, as `Centred`.

The arrays of a stacked group have leading axes for the layers.
"""


@runtime_checkable
class ObservedNetworks(Protocol):
    """Some networks, and how to compute their activations and correlations.

    Two kinds of networks implement it: networks in a list, and agents that are stacked
    over devices. What the methods pass to each other has the form that suits the kind.
    """

    def no_moments(self, wave: Pairs) -> Any:
        """The moments of a wave's pairs over no samples."""
        ...

    def observe(self, batch: Any) -> Any:
        """Computes every network's activations at its taps on its own inputs."""
        ...

    def observe_permutees(self, batch: Any, wave: Pairs) -> Any:
        """Computes the activations of a wave's permutees on their references' inputs.

        None if all networks look at the same inputs: `observe` has computed it then.
        """
        ...

    def add(self, moments: Any, observed: Any, permutees: Any, wave: Pairs) -> Any:
        """Adds a batch to the moments of a wave's pairs.

        Args:
            moments: the moments so far; their buffers may be reused.
            observed: what `observe` returned.
            permutees: what `observe_permutees` returned.
            wave: the pairs.
        """
        ...

    def scores(
        self, moments: Any
    ) -> dict[str, Float[Array, "length *layers units units"]]:
        """For each group the scores of a wave's pairs; see `group_scores`."""
        ...


def observer(
    spec: PermutationSpec, activations: Callable[[PyTree, Any], Activations]
) -> Callable[[PyTree, Any, Array | None], Observed]:
    """Returns a function that observes one network on a batch.

    Returns:
        `observe(variables, inputs, mask)`. The mask selects the examples that count;
        None: all of them.

    Raises:
        PermutationSpecError: a group has no tap.
    """
    check_taps(spec)

    def observe(variables, inputs, mask):
        shown = activations(variables, inputs)
        units = tap_units(spec, group_sizes(spec, variables), shown)
        return {
            group: {tap: _centre_examples(tap, taps[tap], mask) for tap in taps}
            for group, taps in units.items()
        }

    return observe


def _centre_examples(tap: str, units: Array, mask: Array | None) -> Any:
    """Centres the activations of a tap over the examples that the mask selects."""
    *layers, n_samples, _ = units.shape
    weights = None
    if mask is not None:
        if n_samples % len(mask):
            raise PermutationSpecError(
                f"tap {tap!r} shows {n_samples} samples of {len(mask)} examples; "
                "the first axis of its activations must be the examples"
            )
        # Every position of a feature map is a sample of its example.
        weights = jnp.repeat(mask, n_samples // len(mask))
    return of_layers(lambda own: centre(own, weights), len(layers))(units)


# Networks in a list ===================================================================


class NetworkPrograms:
    """The compiled programs of `ListedNetworks`: each is for one network or one pair.

    All networks and pairs use the same programs, so the compile time does not depend on
    their number.

    Args:
        spec: the symmetry, with a tap for each group.
        activations: `activations(variables, inputs) -> {tap: array}`.

    Raises:
        PermutationSpecError: a group has no tap.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        activations: Callable[[PyTree, Any], Activations],
    ):
        self.spec = spec
        self.observe = jax.jit(observer(spec, activations))
        self.update = jax.jit(update_taps)
        self.scores = jax.jit(
            lambda of_pairs: stack([group_scores(pair) for pair in of_pairs])
        )


Reading = Callable[[Any, int], tuple[Any, Array | None]]
"""`read(batch, network) -> (inputs, mask)`: what a network sees of a batch."""


class ListedNetworks:
    """Networks in a list, in the form of `ObservedNetworks`.

    They are computed one after the other, so their leaves may differ in shape wherever
    no group is concerned. Activations are never copied to be stacked or indexed. They
    are the largest arrays of a match: on a CPU such copies took longer than the
    products of which correlations consist (1.5 s of 2.4 s for five ResNet-20s).

    Args:
        programs: the compiled programs.
        models: the variables of each network.
        read: what a network sees of a batch.
        shared: whether all networks see the same inputs.
    """

    def __init__(
        self,
        programs: NetworkPrograms,
        models: Sequence[PyTree],
        read: Reading = lambda batch, network: (batch, None),
        *,
        shared: bool = True,
    ):
        self._programs, self._models = programs, models
        self._read, self._shared = read, shared

    def no_moments(self, wave: Pairs) -> list[TapMoments]:
        shapes = group_shapes(self._programs.spec, self._models[0])
        return [no_moments(self._programs.spec, shapes)] * wave.real

    def observe(self, batch: Any) -> list[Observed]:
        return [self._observe(i, batch, i) for i in range(len(self._models))]

    def observe_permutees(self, batch: Any, wave: Pairs) -> list[Observed] | None:
        if self._shared:
            return None
        return [
            self._observe(permutee, batch, reference)
            for reference, permutee in _ends(wave)
        ]

    def add(self, moments, observed, permutees, wave: Pairs) -> list[TapMoments]:
        if permutees is None:
            permutees = [observed[permutee] for _, permutee in _ends(wave)]
        return [
            self._programs.update(of_pair, observed[reference], permutee)
            for of_pair, (reference, _), permutee in zip(
                moments, _ends(wave), permutees, strict=True
            )
        ]

    def scores(self, moments: list[TapMoments]) -> dict[str, Array]:
        return self._programs.scores(moments)

    def _observe(self, network: int, batch: Any, reader: int) -> Observed:
        """Observes a network on the inputs that `reader`, also a network, sees."""
        inputs, mask = self._read(batch, reader)
        return self._programs.observe(self._models[network], inputs, mask)


def _ends(wave: Pairs) -> list[tuple[int, int]]:
    """The pairs of a wave, without the entries that only fill up the arrays."""
    ends = zip(wave.references.tolist(), wave.permutees.tolist(), strict=True)
    return list(ends)[: wave.real]
