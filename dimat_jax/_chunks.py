"""Runs a function on stacked agents as several programs, one of them for a chunk.

The function is traced once. Its equations are cut into parts that take turns:

    arithmetic on stacked arrays, which is one program
    what agents do alone: one program for a chunk of agents, called once for each chunk

So what agents do alone is compiled once for any number of agents. A chunk reads its
rows of the stacked arrays and writes its rows of the results.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from dimat_jax._jaxprs import (
    ClosedJaxpr,
    Var,
    run_equations,
)
from dimat_jax._layouts import LAYOUTS, Shards, over_rows
from dimat_jax._parts import (
    Part,
    inlined,
    of_one_agent,
    operands,
    parts_of,
    shape_and_dtype,
)

__all__ = ["Chunked"]


class Chunked:
    """A function on stacked agents that runs chunk by chunk.

    It is called like a function that `jax.jit` returns. Within another traced function
    it is a part of that function.

    Args:
        fn: the function. Its arguments and results are pytrees of arrays.
        shards: the layout of the agents.
        out_shardings: the sharding of all results. None: each result keeps the sharding
            with which it was computed.
        options: further options of `jax.jit`.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        shards: Shards,
        out_shardings: Sharding | None = None,
        **options: Any,
    ):
        self._shards, self._out_sharding = shards, out_shardings
        self._whole = jax.jit(fn, out_shardings=out_shardings, **options)
        self._compiler_options = options.get("compiler_options")
        # The programs by the identity of the traced jaxpr, which they keep alive.
        self._programs: dict[int, _Programs] = {}

    def __call__(self, *args: Any) -> Any:
        leaves = jax.tree.leaves(args)
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return self._whole(*args)
        # JAX keeps traces: arguments of the same shapes and dtypes give the same jaxpr.
        traced = self._whole.trace(*args)
        programs = self._programs.get(id(traced.jaxpr))
        if programs is None:
            programs = _Programs(
                traced.jaxpr,
                [info.donated for info in jax.tree.leaves(traced.args_info)],
                _Where(self._shards, self._out_sharding),
                self._compiler_options,
            )
            self._programs[id(traced.jaxpr)] = programs
        if not programs.has_chunks:
            return self._whole(*args)
        return jax.tree.unflatten(jax.tree.structure(traced.out_info), programs(leaves))


class _Where:
    """The shardings of the arrays that variables stand for.

    Attributes:
        shards: the layout of the agents.
        results: the sharding of all results. None: each result keeps the sharding with
            which it was computed.
        agents: the sharding of stacked arrays.
        shared: the sharding of arrays that all agents share.
    """

    def __init__(self, shards: Shards, results: Sharding | None):
        self.shards, self.results = shards, results
        self.agents = NamedSharding(shards.mesh, PartitionSpec("agents"))
        self.shared = NamedSharding(shards.mesh, PartitionSpec())


class _Programs:
    """The programs of one traced function. Calling it with flat arguments runs them.

    Args:
        closed: the traced function.
        donated: for each argument whether its memory may be reused.
        where: the shardings.
        compiler_options: options for XLA.

    Attributes:
        has_chunks: whether any program is for a chunk of agents.
    """

    def __init__(
        self,
        closed: ClosedJaxpr,
        donated: Sequence[bool],
        where: _Where,
        compiler_options: dict[str, Any] | None,
    ):
        self._traced = closed
        closed = inlined(closed, copies_all=where.results not in (None, where.agents))
        jaxpr, parts = closed.jaxpr, parts_of(closed, where.shards)
        self.has_chunks = any(part.alone for part in parts)
        self._invars, self._outvars = jaxpr.invars, jaxpr.outvars
        self._donated = {v for v, d in zip(jaxpr.invars, donated, strict=True) if d}
        self._wanted = _operand_shardings(parts, where)
        self._consts = {
            var: jax.device_put(const, self._wanted.get(var))
            for var, const in zip(jaxpr.constvars, closed.consts, strict=True)
        }
        results = {v for v in jaxpr.outvars if isinstance(v, Var)}
        shardings = {v: self._wanted.get(v) for part in parts for v in part.writes}
        if where.results is not None:
            shardings |= dict.fromkeys(results, where.results)
        # The arrays of these variables may be overwritten after their last use.
        owned = self._donated.union(*(part.writes for part in parts))
        self._steps = [
            (
                part,
                _ChunkProgram(part, owned, where, compiler_options)
                if part.alone
                else _stacked_program(part, owned, shardings, compiler_options),
            )
            for part in parts
        ]

    def __call__(self, args: Sequence[Any]) -> list[Any]:
        values = dict(self._consts)
        for var, arg in zip(self._invars, args, strict=True):
            wanted = self._wanted.get(var)
            if wanted is not None and getattr(arg, "sharding", None) != wanted:
                arg = jax.device_put(arg, wanted)
            values[var] = arg
        for part, program in self._steps:
            values |= program(values)
            for var in part.last_reads:
                array = values.pop(var)
                donated = var in self._donated and isinstance(array, jax.Array)
                if donated and not array.is_deleted():
                    array.delete()
        return [
            values[var] if isinstance(var, Var) else jnp.asarray(var.val)
            for var in self._outvars
        ]


def _operand_shardings(parts: Iterable[Part], where: _Where) -> dict[Var, Sharding]:
    """The shardings in which chunks take their operands."""
    wanted: dict[Var, Sharding] = {}
    for part in parts:
        for eqn in part.eqns if part.alone else ():
            for atom, axis in zip(eqn.invars, eqn.params["in_axes"], strict=True):
                if isinstance(atom, Var) and axis == 0:
                    wanted[atom] = where.agents
                elif isinstance(atom, Var):
                    wanted.setdefault(atom, where.shared)
    return wanted


def _overwritten(part: Part, owned: set[Var], reads: Iterable[Var]) -> dict[Var, Var]:
    """Finds variables whose arrays the results of a part can overwrite.

    Returns:
        for each result that has one, the variable of the same shape and dtype. The
        order decides, so that parameters overwrite the parameters before the step.
    """
    waiting: dict[Any, list[Var]] = {}
    for var in reads:
        if var in part.last_reads and var in owned:
            waiting.setdefault(shape_and_dtype(var), []).append(var)
    found = {}
    for var in part.writes:
        if candidates := waiting.get(shape_and_dtype(var)):
            found[var] = candidates.pop(0)
    return found


Program = Callable[[dict[Var, Any]], dict[Var, Any]]
"""Runs a part: takes the values of all variables, returns those of `part.writes`."""


def _stacked_program(
    part: Part,
    owned: set[Var],
    shardings: dict[Var, Sharding | None],
    compiler_options: dict[str, Any] | None,
) -> Program:
    """Makes the program of a part that is arithmetic on stacked arrays."""
    given = list(_overwritten(part, owned, part.reads).values())
    kept = [var for var in part.reads if var not in set(given)]

    def run(given_arrays, kept_arrays):
        values = dict(zip(given, given_arrays, strict=True))
        values |= dict(zip(kept, kept_arrays, strict=True))
        return run_equations(part.eqns, values, part.writes)

    program = jax.jit(
        run,
        donate_argnums=0,
        out_shardings=[shardings.get(var) for var in part.writes],
        compiler_options=compiler_options,
    )

    def run_part(values):
        results = program([values[v] for v in given], [values[v] for v in kept])
        return dict(zip(part.writes, results, strict=True))

    return run_part


class _ChunkProgram:
    """The program of a part that agents do alone, which is called for each chunk.

    Chunks are shared out over lanes. The chunks of one lane write their results into
    the same arrays, so they run one after the other. No lane reads the arrays of
    another one, so XLA:CPU runs the lanes at once. In the end the rows of all lanes are
    concatenated.

    Args:
        part: the part.
        owned: the variables whose arrays may be overwritten.
        where: the shardings.
        compiler_options: options for XLA.
    """

    def __init__(
        self,
        part: Part,
        owned: set[Var],
        where: _Where,
        compiler_options: dict[str, Any] | None,
    ):
        self._writes, self._shards = part.writes, where.shards
        self._rows, self._shared = operands(part)
        self._one = of_one_agent(part, self._rows, self._shared)
        self._lanes = _lanes(where)
        n_rows = sum(self._lanes[0].sizes)
        slots = n_rows * (where.shards.slots // where.shards.n_local)
        avals = [shape_and_dtype(var) for var in part.writes]
        of_lane = [((slots, *shape[1:]), dtype) for shape, dtype in avals]
        self._make_lane = jax.jit(
            lambda: [_empty(*aval) for aval in of_lane],
            out_shardings=where.agents,
        )
        self._program = jax.jit(
            self._on_all_devices,
            static_argnums=0,
            donate_argnums=3,
            compiler_options=compiler_options,
            out_shardings=where.agents,
        )
        # The joined rows overwrite arrays that are not read any more.
        self._old = list(_overwritten(part, owned, part.reads).values())
        self._join = jax.jit(
            self._joined, donate_argnums=0, keep_unused=True, out_shardings=where.agents
        )

    def __call__(self, values: dict[Var, Any]) -> dict[Var, Any]:
        rows = [values[var] for var in self._rows]
        shared = [values[var] for var in self._shared]
        results = [self._make_lane() for _ in self._lanes]
        for turn in zip_longest(*(zip(*lane, strict=True) for lane in self._lanes)):
            for number, chunk in enumerate(turn):
                if chunk is not None:
                    results[number] = self._program(
                        *chunk, results[number], rows, shared
                    )
        (joined, *others) = results
        if others:
            joined = self._join([values[var] for var in self._old], results)
        return dict(zip(self._writes, joined, strict=True))

    def _on_all_devices(self, size: int, *args: Any) -> Any:
        def on_one_device(*local):
            return self._run_chunk(size, *local)

        return self._shards.map(on_one_device, (None, None, 0, 0, None), *args)

    def _run_chunk(
        self, size: int, first: Any, place: Any, results: Any, rows: Any, shared: Any
    ) -> list[Any]:
        """Runs the agents of a chunk, and writes their results into those of a lane.

        Args:
            size: the number of agents.
            first: the first agent's row in stacked arrays.
            place: the first agent's row in the lane's results.
            results: the lane's results so far.
            rows: the stacked arrays of which agents read their own rows.
            shared: the arrays that agents share.
        """
        own = [jax.lax.dynamic_slice_in_dim(x, first, size) for x in rows]
        axes = (0,) * len(rows) + (None,) * len(shared)
        build = LAYOUTS["vmap"].build
        new = over_rows(build, self._one, axes, [*own, *shared], size)
        return [
            jax.lax.dynamic_update_slice_in_dim(result, x, place, axis=0)
            for result, x in zip(results, new, strict=True)
        ]

    def _joined(self, old: Any, lanes: list[Any]) -> list[Any]:
        del old
        n_local = self._shards.n_local

        def join(*local):
            return [
                jnp.concatenate(pieces)[:n_local] for pieces in zip(*local, strict=True)
            ]

        return self._shards.map(join, (0,) * len(lanes), *lanes)


class _Lane(NamedTuple):
    """The chunks of a lane.

    Attributes:
        sizes: the number of agents of each chunk.
        firsts: the first row of each chunk in stacked arrays, on the devices.
        places: the first row of each chunk in the lane's results, on the devices.
    """

    sizes: list[int]
    firsts: list[Array]
    places: list[Array]


def _lanes(where: _Where) -> list[_Lane]:
    """Shares out the chunks over lanes. The first lane has the most rows."""
    size, n_local = where.shards.chunk, where.shards.n_local
    firsts = range(0, n_local, size)
    n_chunks = -(-len(firsts) // min(where.shards.lanes, len(firsts)))

    def placed(row: int) -> Array:
        return jax.device_put(np.int32(row), where.shared)

    lanes = [firsts[i : i + n_chunks] for i in range(0, len(firsts), n_chunks)]
    return [
        _Lane(
            [min(size, n_local - first) for first in lane],
            [placed(first) for first in lane],
            [placed(first - lane[0]) for first in lane],
        )
        for lane in lanes
    ]


def _empty(shape: tuple[int, ...], dtype: Any) -> Array:
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.vmap(jax.random.key)(jnp.zeros(shape, jnp.uint32))
    return jnp.zeros(shape, dtype)
