"""Cuts a traced function on stacked agents into parts that are programs of their own.

Arithmetic on stacked arrays and what agents do alone take turns.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp

from dimat_jax._jaxprs import (
    Atom,
    ClosedJaxpr,
    Equation,
    Var,
    equations,
    run_equation,
    run_equations,
)
from dimat_jax._layouts import Shards, is_per_agent

__all__ = [
    "Part",
    "inlined",
    "of_one_agent",
    "operands",
    "parts_of",
    "shape_and_dtype",
]


class Part(NamedTuple):
    """Equations that are one program.

    Attributes:
        eqns: the equations.
        alone: whether these equations are what each agent does alone. Otherwise they
            are arithmetic on stacked arrays.
        reads: the variables that the equations read and do not make.
        writes: the variables that the equations make and that are needed afterwards.
        last_reads: those of `reads` that are not needed afterwards.
    """

    eqns: list[Equation]
    alone: bool
    reads: list[Var]
    writes: list[Var]
    last_reads: set[Var]


def parts_of(closed: ClosedJaxpr, shards: Shards) -> list[Part]:
    """Cuts a jaxpr into parts that run in this order.

    Each equation is in the first part that comes after all its operands; see `_turns`.
    """
    parts: list[Part] = []
    needed = {var for var in closed.jaxpr.outvars if isinstance(var, Var)}
    for eqns, alone in reversed(_turns(closed.jaxpr.eqns, shards)):
        made = [var for eqn in eqns for var in eqn.outvars]
        read = [v for eqn in eqns for v in eqn.invars if isinstance(v, Var)]
        reads = list(dict.fromkeys(v for v in read if v not in set(made)))
        writes = [var for var in made if var in needed]
        parts.append(Part(eqns, alone, reads, writes, set(reads) - needed))
        needed = needed.difference(made).union(reads)
    return parts[::-1]


def _turns(
    eqns: Iterable[Equation], shards: Shards
) -> list[tuple[list[Equation], bool]]:
    """Sorts equations into turns: of arithmetic on stacked arrays, and of agents alone.

    An equation comes in the first turn that has all its operands. What agents do alone
    may use what they did alone in the same turn, if each reads its own results.

    Returns:
        the equations of each turn, and whether they are what agents do alone.
    """
    stacked: list[list[Equation]] = [[]]
    alone: list[list[Equation]] = [[]]
    # The first turn whose arithmetic can use a variable, and the first turn in which
    # agents that do something alone can use their own rows of the variable.
    whole: dict[Var, int] = {}
    rows: dict[Var, int] = {}
    for eqn in eqns:
        lifted = is_per_agent(eqn) and eqn.params["shards"] == shards
        axes = eqn.params["in_axes"] if lifted else [None] * len(eqn.invars)
        turn = 0
        for atom, axis in zip(eqn.invars, axes, strict=True):
            if isinstance(atom, Var):
                turn = max(turn, (rows if axis == 0 else whole).get(atom, 0))
        while len(stacked) <= turn:
            stacked.append([])
            alone.append([])
        (alone if lifted else stacked)[turn].append(eqn)
        rows |= dict.fromkeys(eqn.outvars, turn)
        whole |= dict.fromkeys(eqn.outvars, turn + lifted)
    pairs = zip(stacked, alone, strict=True)
    turns = [turn for first, then in pairs for turn in ((first, False), (then, True))]
    return [(eqns, lifted) for eqns, lifted in turns if eqns]


def inlined(closed: ClosedJaxpr, copies_all: bool) -> ClosedJaxpr:
    """Replaces calls of jaxprs that lift a function by the equations of these jaxprs.

    Args:
        closed: a traced function.
        copies_all: whether every result is copied. Otherwise a result is copied only if
            it is an argument or a constant of the function, or an earlier result too.
    """

    def run(*args: Any) -> list[Any]:
        results, seen = [], {id(x) for x in (*args, *closed.consts)}
        for result in run_jaxpr(closed, args):
            copied = copies_all or id(result) in seen
            results.append(jnp.copy(result) if copied else result)
            seen.add(id(result))
        return results

    def run_jaxpr(closed: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
        jaxpr = closed.jaxpr
        values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
        values |= dict(zip(jaxpr.invars, args, strict=True))
        return run_equations(jaxpr.eqns, values, jaxpr.outvars, run_one)

    def run_one(eqn: Equation, inputs: list[Any]) -> list[Any]:
        calls = eqn.primitive is jex.core.primitives.jit_p
        if calls and any(map(is_per_agent, equations(eqn))):
            return run_jaxpr(eqn.params["jaxpr"], inputs)
        return run_equation(eqn, inputs)

    return jax.make_jaxpr(run)(*map(_abstract, closed.in_avals))


def operands(part: Part) -> tuple[list[Var], list[Var]]:
    """Returns what the agents of a part read.

    Returns:
        the variables of which each agent reads its own row, and the variables that all
        agents share.
    """
    made = {var for eqn in part.eqns for var in eqn.outvars}
    rows, shared = {}, {}
    for eqn in part.eqns:
        for atom, axis in zip(eqn.invars, eqn.params["in_axes"], strict=True):
            if isinstance(atom, Var) and atom not in made:
                (rows if axis == 0 else shared)[atom] = None
    return list(rows), list(shared)


def of_one_agent(part: Part, rows: Sequence[Var], shared: Sequence[Var]) -> ClosedJaxpr:
    """Makes one jaxpr of all that an agent does alone in a part."""

    def run(*args: Any) -> list[Any]:
        own = dict(zip(rows, args[: len(rows)], strict=True))
        common = dict(zip(shared, args[len(rows) :], strict=True))
        for eqn in part.eqns:
            operands: list[Any] = []
            for atom, axis in zip(eqn.invars, eqn.params["in_axes"], strict=True):
                operands.append(_value(atom, own if axis == 0 else common))
            results = jex.core.jaxpr_as_fun(eqn.params["jaxpr"])(*operands)
            own |= dict(zip(eqn.outvars, results, strict=True))
        return [own[var] for var in part.writes]

    whole = map(shape_and_dtype, rows)
    of_rows = [jax.ShapeDtypeStruct(shape[1:], dtype) for shape, dtype in whole]
    return jax.make_jaxpr(run)(*of_rows, *[_abstract(v.aval) for v in shared])


def _value(atom: Atom, values: dict[Var, Any]) -> Any:
    return values[atom] if isinstance(atom, Var) else atom.val


def shape_and_dtype(var: Var) -> tuple[tuple[int, ...], Any]:
    """The shape and the dtype of a variable's array."""
    aval: Any = var.aval
    return aval.shape, aval.dtype


def _abstract(aval: Any) -> jax.ShapeDtypeStruct:
    """Returns an abstract value as the argument of a function that is traced."""
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)
