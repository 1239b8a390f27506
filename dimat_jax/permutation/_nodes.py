"""Walks through the parts that units consist of."""

from collections.abc import Iterator

from dimat_jax.permutation._units import AxisUnits, Units

__all__ = ["fixed_nodes", "nodes"]


def nodes(units: AxisUnits) -> Iterator[Units]:
    """Yields the units and all parts that they consist of."""
    if units is not None:
        node = units.root()
        yield node
        for part in node.parts:
            yield from nodes(part)


def fixed_nodes(units: AxisUnits) -> Iterator[Units]:
    """Yields the largest parts of the units that are fixed, or all units as one."""
    if units is not None:
        node = units.root()
        if node.fixed:
            yield node
        else:
            for part in node.parts:
                yield from fixed_nodes(part)
