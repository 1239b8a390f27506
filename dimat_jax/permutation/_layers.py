"""The axes of Flax Linen layers: building blocks for specs of whole architectures.

Each function returns entries for `PermutationSpec(axes=...)`; merge them with `|`.
`path` is the module's path, e.g. "stage1_block0/conv1".
"""

from collections.abc import Iterable

from dimat_jax.permutation._spec import Axes, Axis, Product

__all__ = [
    "batch_norm",
    "conv",
    "dense",
    "dense_general",
    "flattened",
    "group_norm",
    "layer_norm",
    "statistics",
]

# The collection in which Flax Linen keeps running statistics.
_STATISTICS = "batch_stats/"


def dense(
    path: str, inputs: Axis, outputs: Axis, *, bias: bool = True
) -> dict[str, Axes]:
    """The axes of an `nn.Dense`: kernel `[in, out]` and bias `[out]`."""
    return dense_general(path, (inputs,), (outputs,), bias=bias)


def dense_general(
    path: str, inputs: Iterable[Axis], outputs: Iterable[Axis], *, bias: bool = True
) -> dict[str, Axes]:
    """The axes of an `nn.DenseGeneral`: kernel `[*in, *out]` and bias `[*out]`."""
    inputs, outputs = tuple(inputs), tuple(outputs)
    return _with_bias(path, inputs + outputs, outputs, bias)


def conv(
    path: str, inputs: Axis, outputs: Axis, *, bias: bool = False
) -> dict[str, Axes]:
    """The axes of a two-dimensional `nn.Conv`.

    The kernel is `[height, width, in, out]`, the bias `[out]`.
    """
    return _with_bias(path, (None, None, inputs, outputs), (outputs,), bias)


def batch_norm(path: str, units: Axis) -> dict[str, Axes]:
    """The axes of an `nn.BatchNorm`: scale, bias, running mean and running variance."""
    return layer_norm(path, units) | {
        f"{_STATISTICS}{path}/mean": (units,),
        f"{_STATISTICS}{path}/var": (units,),
    }


def statistics(axes: Iterable[str]) -> frozenset[str]:
    """The running statistics among the leaves that have axes: those of batch norms."""
    return frozenset(path for path in axes if path.startswith(_STATISTICS))


def layer_norm(path: str, units: Axis) -> dict[str, Axes]:
    """The axes of an `nn.LayerNorm` over the units: scale and bias."""
    return {f"params/{path}/scale": (units,), f"params/{path}/bias": (units,)}


def group_norm(path: str, units: Axis) -> dict[str, Axes]:
    """The axes of an `nn.GroupNorm`: scale and bias.

    `units` must keep the channels of a norm group together, as
    `Product("blocks", "within")` does. It permutes the norm groups as blocks, and the
    channels within them alike in all norm groups. A single permutation group for all
    channels would be wrong.
    """
    return layer_norm(path, units)


def flattened(units: str | Product) -> Product:
    """The axis of a flattened feature map `H x W x C` whose channels C are `units`."""
    return Product(None, *([units] if isinstance(units, str) else units.factors))


def _with_bias(path: str, kernel: Axes, outputs: Axes, bias: bool) -> dict[str, Axes]:
    axes = {f"params/{path}/kernel": kernel}
    return axes | ({f"params/{path}/bias": outputs} if bias else {})
