"""Scores of permutations by the weights of networks.

Take the inner product of one network's weights with another's permuted weights, while
all permutations but one group's are fixed. It is a sum of scores that the group's
permutation picks. Small programs compute these scores for one group and a stack of
pairs at a time. Each is compiled once for all groups, calls and networks of the same
structure.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dimat_jax.matching._blocks import Block, cut_blocks, take_block
from dimat_jax.matching._descent import MatchedGroups, PairPerms, Pairs
from dimat_jax.matching._errors import MatchingError
from dimat_jax.permutation import PermutationSpec
from dimat_jax.permutation._actions import take_of_layers
from dimat_jax.tree import PyTree, flatten, take

__all__ = ["Include", "WeightScorer", "dot", "included"]

Include = Callable[[str], bool]
"""A function that says whether the leaf with a path counts."""


class _Term(NamedTuple):
    """A block of a leaf.

    Attributes:
        path: the leaf's path.
        block: which part of the leaf it is, and which groups permute its axes.
    """

    path: str
    block: Block


class WeightScorer:
    """Scores permutations by the weights of stacked networks; a `Scorer`.

    Args:
        spec: the symmetry.
        shapes: the shape of each group's permutation.
        leaves: the leaves that count, by path: arrays `[networks, ...]`.
        waves: the pairs of networks. The pairs of one wave are computed together.
        lift: makes a function of one pair a function of stacked pairs, as `jax.vmap`.
        pick: takes entries of stacked arrays by index, as `tree.take`.
        fetch: brings arrays to the host.
        names: what to call each network in error messages.

    Raises:
        MatchingError: weights that are not finite, or too large to be squared.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        shapes: Mapping[str, tuple[int, ...]],
        leaves: Mapping[str, Array],
        waves: Sequence[Pairs],
        *,
        lift: Callable[..., Callable[..., Any]] = jax.vmap,
        pick: Callable[[PyTree, Any], PyTree] = take,
        fetch: Callable[[Array], np.ndarray] = jax.device_get,
        names: Sequence[str],
    ):
        self.shapes = shapes
        self.sizes = {group: shape[-1] for group, shape in self.shapes.items()}
        self.n_pairs = sum(wave.real for wave in waves)
        self.n_batches = 0
        self._leaves, self._waves = leaves, waves
        self._lift, self._pick, self._fetch = lift, pick, fetch
        self._terms = [
            _Term(path, block)
            for path, leaf in leaves.items()
            for block in cut_blocks(spec.axes[path], leaf.shape[1:], self.sizes)
        ]
        self._terms_of = {
            group: [term for term in self._terms if group in term.block.groups]
            for group in self.sizes
        }
        squares = self._squares(names)
        references = np.concatenate([w.references[: w.real] for w in waves])
        permutees = np.concatenate([w.permutees[: w.real] for w in waves])
        # For every term the sums of squares of the pair's two networks.
        self._squares_of = {
            term: np.stack([square[references], square[permutees]])
            for term, square in squares.items()
        }
        norms = _norms(self._squares_of.values(), self.n_pairs)
        self._per_norm = 1 / np.where(norms > 0, norms, np.inf)

    def scores(
        self, group: str, perms: PairPerms, matched: MatchedGroups | None = None
    ) -> Float[np.ndarray, "pairs *layers units units"]:
        terms, (*layers, units) = self._terms_of[group], self.shapes[group]
        if not terms:
            return np.zeros((self.n_pairs, *layers, units, units), np.float32)
        program = _program(terms, group, matched)
        counting = np.array([_counts(term, group, matched) for term in terms])
        scores = self._run(_scores, program, perms, counting.astype(np.float32))
        per_norm = self._per_norm.astype(np.float32)
        return scores * per_norm.reshape(-1, *[1] * (scores.ndim - 1))

    def scale(
        self, group: str, matched: MatchedGroups | None = None
    ) -> Float[np.ndarray, " pairs"]:
        squares = [
            self._squares_of[term]
            for term in self._terms_of[group]
            if _counts(term, group, matched)
        ]
        return _norms(squares, self.n_pairs) * self._per_norm / self._units(group)

    def neighbours(self, group: str) -> Collection[str]:
        found = set()
        for _, block in self._terms_of[group]:
            others = list(block.groups)
            # Only once: a term may have the group on two of its axes.
            others.remove(group)
            found.update(other for other in others if other is not None)
        return found

    def evidence(self, group: str, matched: MatchedGroups | None = None) -> float:
        """How many numbers for each unit the counting leaves hold."""
        return sum(
            math.prod(term.block.shape) / self._units(group)
            for term in self._terms_of[group]
            if _counts(term, group, matched)
        )

    def _units(self, group: str) -> int:
        """The number of a group's units, in all of its layers."""
        return math.prod(self.shapes[group])

    def similarity(self, perms: PairPerms) -> Float[np.ndarray, " pairs"]:
        """The cosine of the angle between the reference and the permuted permutee."""
        program = _program(self._terms)
        return self._run(_inner_product, program, perms) * self._per_norm

    def total(self, perms: PairPerms) -> Float[np.ndarray, " pairs"]:
        """The similarity: scores are parts of the same inner product."""
        return self.similarity(perms)

    def _run(self, compute, program: "_Program", perms: PairPerms, *shared):
        """Runs a program on every wave. Returns its results by pair, on the host."""
        leaves = [self._leaves[path] for path in program.paths]
        results, start = [], 0
        for references, permutees, real in self._waves:
            filled = [
                _filled(perms[group][start : start + real], len(references))
                for group in program.groups
            ]
            result = compute(
                leaves,
                filled,
                references,
                permutees,
                *shared,
                blocks=program.blocks,
                lift=self._lift,
                pick=self._pick,
            )
            results.append(self._fetch(result)[:real])
            start += real
        return np.concatenate(results)

    def _squares(self, names: Sequence[str]) -> dict[_Term, np.ndarray]:
        """For every term the sum of squares of each network."""
        program = _program(self._terms)
        leaves = [self._leaves[path] for path in program.paths]
        squares = self._fetch(_squares(leaves, blocks=program.blocks, lift=self._lift))
        for term, square in zip(self._terms, squares.T, strict=True):
            for name, finite in zip(names, np.isfinite(square), strict=False):
                if not finite:
                    raise MatchingError(
                        f"{term.path!r} holds values that are NaN, infinite or beyond "
                        f"1e19 in {name}"
                    )
        return dict(zip(self._terms, squares.T, strict=True))


def _unmatched(term: _Term, group: str, matched: MatchedGroups | None) -> list[str]:
    """The groups of a term's other axes that have not been matched yet."""
    if matched is None:
        return []
    others = list(term.block.groups)
    others.remove(group)
    return [g for g in others if g is not None and g not in matched.groups]


def _counts(term: _Term, group: str, matched: MatchedGroups | None) -> bool:
    """Whether a term counts when a group is matched."""
    return matched is None or len(_unmatched(term, group, matched)) <= matched.slack


def _norms(squares: Collection[np.ndarray], n_pairs: int) -> np.ndarray:
    """|reference| |permutee| for each pair, from the sums of squares of some terms."""
    reference, permutee = sum(squares, np.zeros((2, n_pairs)))
    return np.sqrt(reference) * np.sqrt(permutee)


def _filled(perms: np.ndarray, length: int) -> np.ndarray:
    """Adds identities for the entries that only fill up a wave."""
    rest = np.arange(perms.shape[-1], dtype=np.int32)
    n_missing = length - len(perms)
    filling = np.broadcast_to(rest, (n_missing, *perms.shape[1:]))
    return np.concatenate([perms, filling])


# Programs =============================================================================


class _Program(NamedTuple):
    """The part of a program that is fixed when it is compiled.

    Parts of networks with equal `blocks` share a program.

    Attributes:
        paths: the paths of the leaves that are needed.
        groups: the groups whose permutations are needed.
        blocks: for each block the number of its leaf, the block with numbers in place
            of its groups' names, and the numbers of the groups that are not matched.
    """

    paths: tuple[str, ...]
    groups: tuple[str, ...]
    blocks: tuple[tuple[int, Block, frozenset[int]], ...]


def _program(
    terms: Sequence[_Term],
    group: str | None = None,
    matched: MatchedGroups | None = None,
) -> _Program:
    """Numbers leaves and groups in the order of the terms; `group` is number 0."""
    paths: dict[str, int] = {}
    groups = {} if group is None else {group: 0}
    blocks = []
    for term in terms:
        path, block = term
        numbered = block.renamed(lambda g: groups.setdefault(g, len(groups)))
        leaf = paths.setdefault(path, len(paths))
        unmatched = frozenset()
        if group is not None and _counts(term, group, matched):
            unmatched = frozenset(groups[g] for g in _unmatched(term, group, matched))
        blocks.append((leaf, numbered, unmatched))
    return _Program(tuple(paths), tuple(groups), tuple(blocks))


@partial(jax.jit, static_argnames=("blocks", "lift", "pick"))
def _scores(leaves, perms, references, permutees, counting, *, blocks, lift, pick):
    """The scores of the units of group 0: float32 `[pairs, *layers, units, units]`."""

    def of_pair(reference, permutee, perms, counting):
        total = jnp.zeros(())
        for i, (leaf, block, unmatched) in enumerate(blocks):
            ours, theirs = _cut(block, reference[leaf]), _cut(block, permutee[leaf])
            for axis, group in enumerate(block.groups):
                if group == 0:
                    permuted = _permute(theirs, block, perms, fixed=axis)
                    one, other = (
                        _by_unit(x, block, axis, unmatched) for x in (ours, permuted)
                    )
                    total += counting[i] * jnp.matmul(
                        one, other.mT, precision=jax.lax.Precision.HIGHEST
                    )
        return total

    return lift(of_pair, in_axes=(0, 0, 0, None))(
        pick(leaves, references), pick(leaves, permutees), perms, counting
    )


@partial(jax.jit, static_argnames=("blocks", "lift", "pick"))
def _inner_product(leaves, perms, references, permutees, *, blocks, lift, pick):
    """<reference, P permutee>: float32 `[pairs]`."""

    def of_pair(reference, permutee, perms):
        total = jnp.zeros(())
        for leaf, block, _ in blocks:
            permuted = _permute(_cut(block, permutee[leaf]), block, perms)
            total += dot(_cut(block, reference[leaf]), permuted)
        return total

    return lift(of_pair)(pick(leaves, references), pick(leaves, permutees), perms)


@partial(jax.jit, static_argnames=("blocks", "lift"))
def _squares(leaves, *, blocks, lift):
    """The sum of squares of every block: float32 `[networks, blocks]`."""

    def of_network(leaves):
        cut = [_cut(block, leaves[leaf]) for leaf, block, _ in blocks]
        return jnp.stack([dot(x, x) for x in cut])

    return lift(of_network)(leaves)


def _cut(block: Block, leaf: Array) -> Array:
    return take_block(block, leaf).astype(jnp.float32)


def _permute(array: Array, block: Block, perms, fixed: int | None = None) -> Array:
    """Permutes all axes that a group acts on, except the axis `fixed`."""
    for axis, group in enumerate(block.groups):
        if group is None or axis == fixed:
            continue
        if layers := block.layers_of(group):
            array = take_of_layers(array, perms[group], layers, axis)
        else:
            # A permutation's entries are within bounds, and checking them costs time.
            array = jnp.take(array, perms[group], axis=axis, mode="clip")
    return array


def _by_unit(array: Array, block: Block, axis: int, unmatched: frozenset[int]) -> Array:
    """A row for each unit on an axis; the axes of unmatched groups are sorted.

    The rows of a stacked group are `[*layers, units, numbers]`.

    Of all ways to permute two lists, sorting both makes their inner product largest. So
    the score is an upper bound of the score once the other groups are matched.
    """
    rows = [*block.layers_of(block.groups[axis]), axis]
    axes = [a for a in range(array.ndim) if a not in rows]
    last = [a for a in axes if block.groups[a] in unmatched]
    first = rows + [a for a in axes if a not in last]
    array = array.transpose(*first, *last)
    if last:
        array = jnp.sort(array.reshape(*array.shape[: len(first)], -1), axis=-1)
    return array.reshape(*array.shape[: len(rows)], -1)


def dot(a: Array, b: Array) -> Array:
    """The inner product of two arrays of the same shape, in float32."""
    a, b = (x.astype(jnp.float32).reshape(-1) for x in (a, b))
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


def included(tree: PyTree, include: Include) -> dict[str, Array]:
    """The leaves that count, by path: those that are floating and that `include` takes.

    Args:
        tree: any pytree of arrays.
        include: which leaves count, by path.
    """
    return {
        path: jnp.asarray(leaf)
        for path, leaf in flatten(tree).items()
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and include(path)
    }
