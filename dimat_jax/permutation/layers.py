"""The axes of Flax Linen layers, so that a spec reads like the architecture.

Each function returns entries for `PermutationSpec(axes=...)`; merge them with `|`.
`path` is the module's path, e.g. "stage1_block0/conv1".
"""

from dimat_jax.permutation.spec import Axes, Axis

__all__ = ["batch_norm", "conv", "dense"]


def dense(path: str, inputs: Axis, outputs: Axis) -> dict[str, Axes]:
    """`nn.Dense`: kernel `[in, out]`, bias `[out]`."""
    return {
        f"params/{path}/kernel": (inputs, outputs),
        f"params/{path}/bias": (outputs,),
    }


def conv(
    path: str, inputs: Axis, outputs: Axis, *, bias: bool = False
) -> dict[str, Axes]:
    """Two-dimensional `nn.Conv`: kernel `[height, width, in, out]`, bias `[out]`."""
    axes: dict[str, Axes] = {f"params/{path}/kernel": (None, None, inputs, outputs)}
    return axes | ({f"params/{path}/bias": (outputs,)} if bias else {})


def batch_norm(path: str, units: Axis) -> dict[str, Axes]:
    """`nn.BatchNorm`: scale, bias, and the running mean and variance."""
    return {
        f"params/{path}/scale": (units,),
        f"params/{path}/bias": (units,),
        f"batch_stats/{path}/mean": (units,),
        f"batch_stats/{path}/var": (units,),
    }
