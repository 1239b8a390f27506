"""Layouts: the ways in which agents that share a device run.

`Placement.per_agent` calls one JAX primitive, "per_agent", that holds the jaxpr of one
agent's function. So a function on stacked agents can be traced before it is decided how
its agents run. Within any JAX transformation the primitive stands for what it is
lowered to: `jax.shard_map` over the devices, and on each device the layout's own way to
run the agents there. `_chunks` finds the primitive in a traced function and runs one
program for a chunk of agents instead, several times.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.extend as jex
from jax.core import ShapedArray
from jax.interpreters import ad, batching, mlir
from jax.sharding import Mesh, PartitionSpec

from dimat_jax import _conv_forms
from dimat_jax._jaxprs import ClosedJaxpr, Equation
from dimat_jax.errors import UserError
from dimat_jax.options import Option, Record, registry

__all__ = [
    "AUTO",
    "BATCHING",
    "CHUNK",
    "LAYOUTS",
    "PlacementError",
    "Shards",
    "automatic",
    "is_per_agent",
    "lift",
    "over_rows",
]

Axes = tuple[int | None, ...]


class PlacementError(UserError):
    """Agents cannot be laid out over the devices."""


CHUNK = Option(
    "placement.chunk",
    1,
    "The number of agents in a chunk. The agents of a chunk are one batched program.",
    at_least=1,
    unit="agents",
    changes_results=False,
)


@dataclasses.dataclass(frozen=True)
class Shards:
    """How stacked agents lie on devices, and how those of one device run.

    Attributes:
        mesh: a mesh with the axis "agents".
        n_local: the number of slots on each device of that axis.
        layout: the name of the layout, one of `LAYOUTS`.
        chunk: the number of agents in a chunk, for the layout "chunks".
        lanes: the number of chunks that run at once on a device, for the same layout.
    """

    mesh: Mesh
    n_local: int
    layout: str
    chunk: int
    lanes: int

    @property
    def slots(self) -> int:
        """The length of stacked axes."""
        return self.n_local * self.mesh.shape["agents"]

    def map(self, fn: Callable[..., Any], in_axes: Any, *args: Any) -> Any:
        """Calls `fn` on each device with its own rows of the stacked arguments.

        Args:
            fn: a function of the rows `[n_local, ...]` that one device holds.
            in_axes: for each argument 0 if it is stacked, and None if it is shared.
            args: the arguments, which are pytrees.

        Returns:
            the results, which are all stacked.
        """
        specs = {0: PartitionSpec("agents"), None: PartitionSpec()}
        return jax.shard_map(
            fn,
            mesh=self.mesh,
            in_specs=tuple(specs[axis] for axis in in_axes),
            out_specs=specs[0],
            axis_names={"agents"},
            check_vma=False,
        )(*args)


# The primitive ========================================================================

_per_agent_p = jex.core.Primitive("per_agent")
_per_agent_p.multiple_results = True


def is_per_agent(eqn: Equation) -> bool:
    """Whether an equation is a lifted function of one agent."""
    return eqn.primitive is _per_agent_p


def lift(fn: Callable[..., Any], in_axes: Axes, args: tuple, shards: Shards) -> Any:
    """Runs a function of one agent on stacked arguments; see `Placement.per_agent`.

    Args:
        fn: the function of one agent.
        in_axes: for each argument 0 or None.
        args: the stacked and the shared arguments, pytrees.
        shards: the layout.

    Raises:
        PlacementError: a stacked array has another leading axis than `shards.slots`.
    """
    flat, tree, axes = [], jax.tree.structure(args), []
    for arg, axis in zip(args, in_axes, strict=True):
        leaves = jax.tree.leaves(arg)
        flat, axes = flat + leaves, axes + [axis] * len(leaves)
    one = [_of_one(leaf, axis, shards) for leaf, axis in zip(flat, axes, strict=True)]
    trace = jax.make_jaxpr(fn, return_shape=True)
    closed, results = trace(*jax.tree.unflatten(tree, one))
    # What the function closes over may be traced, so it becomes a shared operand.
    consts = closed.consts
    jaxpr = _with_arguments_for_consts(closed)
    outputs = _per_agent_p.bind(
        *consts,
        *flat,
        jaxpr=jaxpr,
        in_axes=(*[None] * len(consts), *axes),
        shards=shards,
    )
    return jax.tree.unflatten(jax.tree.structure(results), outputs)


def _of_one(leaf: Any, axis: int | None, shards: Shards) -> jax.ShapeDtypeStruct:
    """The shape and the dtype of what one agent receives of an argument."""
    aval = jax.typeof(leaf)
    shape = aval.shape
    if axis == 0 and shape[:1] != (shards.slots,):
        raise PlacementError(
            f"expected a leading axis of {shards.slots} slots, got an array of shape "
            f"{shape}"
        )
    return jax.ShapeDtypeStruct(
        shape if axis is None else shape[1:],
        aval.dtype,
        weak_type=axis is None and aval.weak_type,
    )


def _with_arguments_for_consts(closed: ClosedJaxpr) -> ClosedJaxpr:
    jaxpr = closed.jaxpr
    return ClosedJaxpr(
        jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars]), ()
    )


def _run(*args: Any, jaxpr: ClosedJaxpr, in_axes: Axes, shards: Shards) -> list[Any]:
    """Runs the primitive as a part of one program."""
    build = LAYOUTS[shards.layout].build

    def over_shard(*local):
        return over_rows(build, jaxpr, in_axes, local, shards.n_local)

    return shards.map(over_shard, in_axes, *args)


def over_rows(
    build: Callable[..., list[Any]],
    jaxpr: ClosedJaxpr,
    in_axes: Axes,
    args: Sequence[Any],
    size: int,
) -> list[Any]:
    """Runs a jaxpr of one agent on `size` stacked agents of one device."""
    # A single agent needs no batching. Batching rules would turn its convolutions into
    # grouped ones, which takes more time on some backends.
    return (_unroll if size == 1 else build)(jaxpr, in_axes, args, size)


@_per_agent_p.def_effectful_abstract_eval
def _abstract(*avals, jaxpr, in_axes, shards):
    del avals, in_axes
    return [
        ShapedArray((shards.slots, *x.shape), x.dtype) for x in jaxpr.out_avals
    ], jaxpr.effects


@_per_agent_p.def_impl
def _run_now(*args, **params):
    return jax.jit(partial(_run, **params))(*args)


def _differentiate(primals, tangents, **params):
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    return jax.jvp(partial(_run, **params), tuple(primals), tuple(tangents))


def _batch(args, axes, **params):
    outputs = jax.vmap(partial(_run, **params), in_axes=axes)(*args)
    return outputs, [0] * len(outputs)


ad.primitive_jvps[_per_agent_p] = _differentiate
batching.primitive_batchers[_per_agent_p] = _batch
mlir.register_lowering(_per_agent_p, mlir.lower_fun(_run, multiple_results=True))


# The layouts ==========================================================================


def _unroll(jaxpr: ClosedJaxpr, in_axes: Axes, args: Sequence[Any], size: int):
    """Runs the agents one after the other in one program."""
    run = jax.jit(jex.core.jaxpr_as_fun(jaxpr))  # one trace serves all agents
    pairs = list(zip(args, in_axes, strict=True))
    rows = [
        run(*(x if axis is None else x[i] for x, axis in pairs)) for i in range(size)
    ]
    return [jax.numpy.stack(leaves) for leaves in zip(*rows, strict=True)]


def _vmap(jaxpr: ClosedJaxpr, in_axes: Axes, args: Sequence[Any], size: int):
    """Runs the agents as one batched program, with JAX's form of convolutions."""
    run = jex.core.jaxpr_as_fun(jaxpr)
    return jax.vmap(run, in_axes=in_axes, axis_size=size)(*args)


def _im2col(jaxpr: ClosedJaxpr, in_axes: Axes, args: Sequence[Any], size: int):
    """Runs the agents as one batched program whose convolutions are matrix products."""
    return _conv_forms.batched(jaxpr, in_axes, args, size, _conv_forms.im2col)


def _grouped(jaxpr: ClosedJaxpr, in_axes: Axes, args: Sequence[Any], size: int):
    """Runs the agents as one batched program that has cuDNN's form of gradients."""
    form = _conv_forms.kernel_gradients
    return _conv_forms.batched(jaxpr, in_axes, args, size, form)


def _within_one_program(jaxpr, in_axes, args, size):
    """Runs agents of the layout "chunks" where a chunk cannot be a program of its own.

    This is so within loops and other transformations. Unrolling is for convolutions
    alone, because everything else compiles and runs fast as one batched program.
    """
    convolves = _conv_forms.has_convolution(jaxpr.jaxpr)
    return (_unroll if convolves else _vmap)(jaxpr, in_axes, args, size)


LAYOUTS = registry(
    Record(
        "vmap",
        _vmap,
        summary="All agents of a device are one batched program.",
    ),
    Record(
        "unroll",
        _unroll,
        summary="The agents of a device run one after the other in one program, which "
        "takes time to compile for each agent.",
    ),
    Record(
        "chunks",
        _within_one_program,
        (CHUNK,),
        summary="One program for a chunk of agents is called for one chunk after the "
        "other.",
    ),
    Record(
        "im2col",
        _im2col,
        summary="All agents of a device are one batched program whose convolutions are "
        "products of matrices.",
    ),
    Record(
        "grouped",
        _grouped,
        summary="All agents of a device are one batched program in which the gradients "
        "of convolution kernels have batch groups, the form that cuDNN computes fast.",
    ),
)
"""The layouts, by name. `build(jaxpr, in_axes, args, size)` runs stacked agents."""


def automatic(
    platform: str, convolves: bool = True
) -> Literal["vmap", "chunks", "grouped"]:
    """Returns the layout that suits a platform and a model, without any timing.

    The choices follow measurements, see experiments/RESULTS.md. JAX turns the
    convolutions of several agents in one batched program into grouped convolutions.
    XLA:CPU runs these about six times slower than those of one agent after the other.
    cuDNN is slow at their gradients, for which "grouped" has another form.

    Args:
        platform: the platform of the devices, e.g. "cpu".
        convolves: whether the model has convolutions.
    """
    if not convolves:
        return "vmap"
    return "chunks" if platform == "cpu" else "grouped" if platform == "gpu" else "vmap"


AUTO = Record(
    "auto",
    automatic,
    summary="The program chooses. Agents with convolutions run as chunks on a CPU and "
    "as grouped on a GPU, where a long run of one process first times a few training "
    "steps of several layouts. All other agents run as vmap.",
)
BATCHING = Option(
    "placement.batching",
    "auto",
    "The layout: how agents that share a device run.",
    choices=registry(AUTO, *LAYOUTS.values()),
    changes_results=False,
)
