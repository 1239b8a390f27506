"""What permutations are worth by the weights of networks.

The inner product of a network's weights with another's permuted ones is, in each single
group's permutation, a sum of scores, which small programs compute: a group and a stack
of pairs at a time, compiled once for all groups, calls and networks that look the same.
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
from dimat_jax.matching._descent import Known, PairPerms, Pairs
from dimat_jax.permutation import PermutationSpec
from dimat_jax.tree import PyTree, flatten, take

__all__ = ["Include", "WeightScorer", "dot", "included", "not_running_statistics"]

Include = Callable[[str], bool]
"""Whether the leaf of that path counts."""


def not_running_statistics(path: str) -> bool:
    """Leaves out BatchNorm's running statistics: they follow from weights and data."""
    return path.split("/")[0] != "batch_stats"


class _Term(NamedTuple):
    """A block of a leaf."""

    path: str
    block: Block


class WeightScorer:
    """What permutations are worth by the weights of stacked networks.

    Computed a group and a stack of pairs at a time, in small programs that are compiled
    once for all groups, calls and networks that look the same.

    Args:
        spec: the symmetry.
        sizes: of its groups.
        leaves: what counts of the networks: by path, arrays `[networks, ...]`.
        waves: pairs of networks; each wave is a stack of its own.
        lift: makes a function of one pair one of stacked pairs, as `jax.vmap` does.
        fetch: brings arrays to the host.
        names: of the networks, for errors.

    Raises:
        ValueError: weights that are not finite.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        sizes: Mapping[str, int],
        leaves: Mapping[str, Array],
        waves: Sequence[Pairs],
        *,
        lift: Callable[..., Callable[..., Any]] = jax.vmap,
        fetch: Callable[[Array], np.ndarray] = jax.device_get,
        names: Sequence[str],
    ):
        self.sizes = sizes
        self.n_pairs = sum(wave.real for wave in waves)
        self._leaves, self._waves = leaves, waves
        self._lift, self._fetch = lift, fetch
        self._terms = [
            _Term(path, block)
            for path, leaf in leaves.items()
            for block in cut_blocks(spec.axes[path], leaf.shape[1:], sizes)
        ]
        self._terms_of = {
            group: [term for term in self._terms if group in term.block.groups]
            for group in sizes
        }
        squares = self._squares(names)
        references = np.concatenate([w.references[: w.real] for w in waves])
        permutees = np.concatenate([w.permutees[: w.real] for w in waves])
        # Of every term the squares of the pair's two networks.
        self._squares_of = {
            term: np.stack([square[references], square[permutees]])
            for term, square in squares.items()
        }
        norms = _norms(self._squares_of.values(), self.n_pairs)
        self._per_norm = 1 / np.where(norms > 0, norms, np.inf)

    def scores(
        self, group: str, perms: PairPerms, known: Known | None = None
    ) -> Float[np.ndarray, "pairs units units"]:
        terms = self._terms_of[group]
        if not terms:
            return np.zeros((self.n_pairs, *2 * [self.sizes[group]]), np.float32)
        program = _program(terms, group, known)
        reliable = np.array([_reliable(term, group, known) for term in terms])
        scores = self._run(_scores, program, perms, reliable.astype(np.float32))
        return scores * self._per_norm.astype(np.float32)[:, None, None]

    def scale(
        self, group: str, known: Known | None = None
    ) -> Float[np.ndarray, " pairs"]:
        squares = [
            self._squares_of[term]
            for term in self._terms_of[group]
            if _reliable(term, group, known)
        ]
        return _norms(squares, self.n_pairs) * self._per_norm / self.sizes[group]

    def neighbours(self, group: str) -> Collection[str]:
        found = set()
        for _, block in self._terms_of[group]:
            others = list(block.groups)
            others.remove(group)  # once: a term may have the group on two axes
            found.update(other for other in others if other is not None)
        return found

    def evidence(self, group: str, known: Known | None = None) -> float:
        """How many numbers tell of each unit, by what is known."""
        return sum(
            math.prod(term.block.shape) / self.sizes[group]
            for term in self._terms_of[group]
            if _reliable(term, group, known)
        )

    def similarity(self, perms: PairPerms) -> Float[np.ndarray, " pairs"]:
        program = _program(self._terms)
        return self._run(_inner_product, program, perms) * self._per_norm

    def _run(self, compute, program: "_Program", perms: PairPerms, *shared):
        """Runs a program on every wave; its results by pair, on the host."""
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
            )
            results.append(self._fetch(result)[:real])
            start += real
        return np.concatenate(results)

    def _squares(self, names: Sequence[str]) -> dict[_Term, np.ndarray]:
        """Of every term the sum of squares, for each network."""
        program = _program(self._terms)
        leaves = [self._leaves[path] for path in program.paths]
        squares = self._fetch(_squares(leaves, blocks=program.blocks, lift=self._lift))
        for term, square in zip(self._terms, squares.T, strict=True):
            for name, finite in zip(names, np.isfinite(square), strict=False):
                if not finite:
                    raise ValueError(
                        f"{term.path!r} holds values that are NaN, infinite or beyond "
                        f"1e19 in {name}"
                    )
        return dict(zip(self._terms, squares.T, strict=True))


def _unknown(term: _Term, group: str, known: Known | None) -> list[str]:
    """The groups of a term's other axes whose permutations cannot be relied on."""
    if known is None:
        return []
    others = list(term.block.groups)
    others.remove(group)
    return [g for g in others if g is not None and g not in known.groups]


def _reliable(term: _Term, group: str, known: Known | None) -> bool:
    return known is None or len(_unknown(term, group, known)) <= known.slack


def _norms(squares: Collection[np.ndarray], n_pairs: int) -> np.ndarray:
    """|reference| |permutee| for each pair, of what has these squares."""
    reference, permutee = sum(squares, np.zeros((2, n_pairs)))
    return np.sqrt(reference) * np.sqrt(permutee)


def _filled(perms: np.ndarray, length: int) -> np.ndarray:
    """Adds identities for the pairs that only fill up a wave."""
    rest = np.arange(perms.shape[1], dtype=np.int32)
    return np.concatenate([perms, np.tile(rest, (length - len(perms), 1))])


# Programs =============================================================================


class _Program(NamedTuple):
    """What is to be computed, and for what; equal parts of networks share `blocks`.

    Attributes:
        paths: of the leaves.
        groups: whose permutations are needed.
        blocks: of the leaves, each with the leaf's number; groups are numbered, too.
            Last come the groups that may be permuted at will.
    """

    paths: tuple[str, ...]
    groups: tuple[str, ...]
    blocks: tuple[tuple[int, Block, frozenset[int]], ...]


def _program(
    terms: Sequence[_Term], group: str | None = None, known: Known | None = None
) -> _Program:
    """Numbers leaves and groups as they come, `group` first."""
    paths: dict[str, int] = {}
    groups = {} if group is None else {group: 0}
    blocks = []
    for term in terms:
        path, block = term
        numbers = tuple(
            other if other is None else groups.setdefault(other, len(groups))
            for other in block.groups
        )
        leaf = paths.setdefault(path, len(paths))
        free = frozenset()
        if group is not None and _reliable(term, group, known):
            free = frozenset(groups[g] for g in _unknown(term, group, known))
        blocks.append((leaf, block._replace(groups=numbers), free))
    return _Program(tuple(paths), tuple(groups), tuple(blocks))


@partial(jax.jit, static_argnames=("blocks", "lift"))
def _scores(leaves, perms, references, permutees, reliable, *, blocks, lift):
    """The scores of the units of group 0: float32 `[pairs, units, units]`."""

    def of_pair(reference, permutee, perms, reliable):
        total = jnp.zeros(())
        for i, (leaf, block, free) in enumerate(blocks):
            ours, theirs = _cut(block, reference[leaf]), _cut(block, permutee[leaf])
            for axis, group in enumerate(block.groups):
                if group == 0:
                    permuted = _permute(theirs, block, perms, fixed=axis)
                    one, other = (
                        _by_unit(x, block, axis, free) for x in (ours, permuted)
                    )
                    total += reliable[i] * jnp.matmul(
                        one, other.T, precision=jax.lax.Precision.HIGHEST
                    )
        return total

    return lift(of_pair, in_axes=(0, 0, 0, None))(
        take(leaves, references), take(leaves, permutees), perms, reliable
    )


@partial(jax.jit, static_argnames=("blocks", "lift"))
def _inner_product(leaves, perms, references, permutees, *, blocks, lift):
    """<reference, P permutee>: float32 `[pairs]`."""

    def of_pair(reference, permutee, perms):
        total = jnp.zeros(())
        for leaf, block, _ in blocks:
            permuted = _permute(_cut(block, permutee[leaf]), block, perms)
            total += dot(_cut(block, reference[leaf]), permuted)
        return total

    return lift(of_pair)(take(leaves, references), take(leaves, permutees), perms)


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
    """Permutes all axes but one that are to stay as they are."""
    for axis, group in enumerate(block.groups):
        if group is not None and axis != fixed:
            # Permutations stay within bounds; to check it takes code, and time.
            array = jnp.take(array, perms[group], axis=axis, mode="clip")
    return array


def _by_unit(array: Array, block: Block, axis: int, free: frozenset[int]) -> Array:
    """A row for each unit on an axis; what is free to be permuted is sorted.

    Of all ways to permute two lists, sorting makes their inner product largest: so it
    is a bound on what matching the units can be worth, once the others are matched.
    """
    axes = [a for a in range(array.ndim) if a != axis]
    last = [a for a in axes if block.groups[a] in free]
    first = [axis] + [a for a in axes if a not in last]
    array = array.transpose(*first, *last)
    if last:
        array = jnp.sort(array.reshape(*array.shape[: len(first)], -1), axis=-1)
    return array.reshape(len(array), -1)


def dot(a: Array, b: Array) -> Array:
    a, b = (x.astype(jnp.float32).reshape(-1) for x in (a, b))
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


def included(tree: PyTree, include: Include) -> dict[str, Array]:
    """The leaves that count, by path."""
    return {
        path: jnp.asarray(leaf)
        for path, leaf in flatten(tree).items()
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and include(path)
    }
