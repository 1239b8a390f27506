"""Permutation specs as JSON."""

import json
from collections.abc import Iterable
from typing import Any

from dimat_jax.permutation._spec import (
    Axes,
    Axis,
    Concat,
    PermutationSpec,
    PermutationSpecError,
    Product,
    Stack,
)

__all__ = ["spec_from_json", "spec_to_json"]


def spec_to_json(spec: PermutationSpec) -> str:
    """Writes a spec as JSON text; `spec_from_json` reads it.

    A `Product` becomes `{"product": [factors]}`, a `Concat` becomes
    `{"concat": [[axis, size], ...]}`, and a `Stack` becomes `{"stack": [groups]}`.
    """
    return json.dumps(
        {
            "axes": {leaf: _axes_out(axes) for leaf, axes in spec.axes.items()},
            "taps": {
                tap: axes if isinstance(axes, str) else _axes_out(axes)
                for tap, axes in spec.taps.items()
            },
            "sizes": dict(spec.sizes),
            "statistics": sorted(spec.statistics),
        },
        indent=1,
    )


def spec_from_json(text: str) -> PermutationSpec:
    """Reads a spec from JSON text that `spec_to_json` has written.

    Raises:
        PermutationSpecError: the text is no such JSON.
    """
    try:
        content = json.loads(text)
        return PermutationSpec(
            {leaf: _axes_in(axes) for leaf, axes in content["axes"].items()},
            {
                tap: axes if isinstance(axes, str) else _axes_in(axes)
                for tap, axes in content.get("taps", {}).items()
            },
            {group: int(size) for group, size in content.get("sizes", {}).items()},
            frozenset(map(str, content.get("statistics", ()))),
        )
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        if isinstance(error, PermutationSpecError):
            raise
        raise PermutationSpecError(
            f"the text is no permutation spec in JSON: {error!r}"
        ) from error


def _axes_out(axes: Iterable[Axis]) -> list[Any]:
    return [_axis_out(axis) for axis in axes]


def _axis_out(axis: Axis) -> Any:
    match axis:
        case Product(factors):
            return {"product": list(factors)}
        case Concat(parts):
            return {"concat": [[_axis_out(part), size] for part, size in parts]}
        case Stack(groups):
            return {"stack": list(groups)}
        case _:
            return axis


def _axes_in(axes: Any) -> Axes:
    return tuple(_axis_in(axis) for axis in axes)


def _axis_in(axis: Any) -> Axis:
    match axis:
        case None | str():
            return axis
        case {"product": factors, **rest} if not rest:
            if all(f is None or isinstance(f, int | str) for f in factors):
                return Product(*factors)
        case {"concat": parts, **rest} if not rest:
            return Concat(*((_axis_in(part), int(size)) for part, size in parts))
        case {"stack": groups, **rest} if not rest:
            return Stack(*map(str, groups))
    raise PermutationSpecError(f"the text is no permutation spec: {axis!r} is no axis")
