"""The axes of Flax Linen layers, so that a spec reads like the architecture.

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
]


def dense(
    path: str, inputs: Axis, outputs: Axis, *, bias: bool = True
) -> dict[str, Axes]:
    """`nn.Dense`: kernel `[in, out]`, bias `[out]`."""
    return dense_general(path, (inputs,), (outputs,), bias=bias)


def dense_general(
    path: str, inputs: Iterable[Axis], outputs: Iterable[Axis], *, bias: bool = True
) -> dict[str, Axes]:
    """`nn.DenseGeneral`: kernel `[*in, *out]`, bias `[*out]`."""
    inputs, outputs = tuple(inputs), tuple(outputs)
    return _with_bias(path, inputs + outputs, outputs, bias)


def conv(
    path: str, inputs: Axis, outputs: Axis, *, bias: bool = False
) -> dict[str, Axes]:
    """Two-dimensional `nn.Conv`: kernel `[height, width, in, out]`, bias `[out]`."""
    return _with_bias(path, (None, None, inputs, outputs), (outputs,), bias)


def batch_norm(path: str, units: Axis) -> dict[str, Axes]:
    """`nn.BatchNorm`: scale, bias, and the running mean and variance."""
    return layer_norm(path, units) | {
        f"batch_stats/{path}/mean": (units,),
        f"batch_stats/{path}/var": (units,),
    }


def layer_norm(path: str, units: Axis) -> dict[str, Axes]:
    """`nn.LayerNorm` over the units: scale and bias."""
    return {f"params/{path}/scale": (units,), f"params/{path}/bias": (units,)}


def group_norm(path: str, units: Axis) -> dict[str, Axes]:
    """`nn.GroupNorm`: scale and bias.

    `units` must keep norm groups together, as `Product("blocks", "within")` does: the
    norm groups are permuted as blocks and, alike in each, the channels within. One
    group that permutes all channels would be wrong.
    """
    return layer_norm(path, units)


def flattened(units: str | Product) -> Product:
    """The axis of a flattened `H x W x C`, of which the channels C are `units`."""
    return Product(None, *([units] if isinstance(units, str) else units.factors))


def _with_bias(path: str, kernel: Axes, outputs: Axes, bias: bool) -> dict[str, Axes]:
    axes = {f"params/{path}/kernel": kernel}
    return axes | ({f"params/{path}/bias": outputs} if bias else {})
