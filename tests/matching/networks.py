"""Small networks of every kind of axis: specs and random weights, no functions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dimat_jax import permutation
from dimat_jax.permutation import Concat, PermutationSpec, Product
from dimat_jax.tree import PyTree

# For each a spec's axes, and the leaves' shapes.
NETWORKS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "mlp": (
        {
            "w1": (None, "a"),
            "b1": ("a",),
            "w2": ("a", "b"),
            "b2": ("b",),
            "w3": ("b", None),
        },
        {"w1": (3, 5), "b1": (5,), "w2": (5, 4), "b2": (4,), "w3": (4, 2)},
    ),
    "flattened maps": (
        {
            "conv1": (None, None, None, "c"),
            "conv2": (None, None, "c", "d"),
            "dense": (Product(None, "d"), "e"),
            "head": ("e", None),
        },
        {
            "conv1": (2, 2, 3, 4),
            "conv2": (2, 1, 4, 3),
            "dense": (12, 5),
            "head": (5, 2),
        },
    ),
    "group norm": (
        {
            "conv": (None, Product("groups", "within")),
            "scale": (Product("groups", "within"),),
            "dense": (Product("groups", "within"), "units"),
            "plain": ("groups", None, "within"),
            "head": ("units", None),
        },
        {
            "conv": (3, 12),
            "scale": (12,),
            "dense": (12, 5),
            "plain": (4, 2, 3),
            "head": (5, 2),
        },
    ),
    "concatenation": (
        {
            "left": (None, "a"),
            "right": (None, "b"),
            "joined": (Concat(("a", 4), (Product(2, "b"), 6), (None, 1)), "c"),
            "again": ("c", Concat(("a", 4), ("c", 5))),
        },
        {"left": (3, 4), "right": (2, 3), "joined": (11, 5), "again": (5, 9)},
    ),
    "residual": (
        {
            "stem": (None, "stream"),
            "in1": ("stream", "inner1"),
            "out1": ("inner1", "stream"),
            "in2": ("stream", "inner2"),
            "out2": ("inner2", "stream"),
            "head": ("stream", None),
        },
        {
            "stem": (3, 5),
            "in1": (5, 4),
            "out1": (4, 5),
            "in2": (5, 4),
            "out2": (4, 5),
            "head": (5, 2),
        },
    ),
    "recurrent": (
        {
            "in": (None, "state"),
            "rec": ("state", "state"),
            "gate": (Product("state", "state"), None),
            "out": ("state", None),
        },
        {"in": (4, 5), "rec": (5, 5), "gate": (25, 2), "out": (5, 3)},
    ),
}


def spec_of(kind: str) -> PermutationSpec:
    return PermutationSpec(NETWORKS[kind][0])


def network(kind: str, seed: int = 0) -> PyTree:
    """Normal weights."""
    rng = np.random.default_rng(seed)
    return {
        leaf: rng.normal(size=shape).astype(np.float32)
        for leaf, shape in NETWORKS[kind][1].items()
    }


def noisy(variables: PyTree, noise: float, seed: int = 0) -> PyTree:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + noise * rng.normal(size=x.shape).astype(np.float32), variables
    )


def shuffled(
    spec: PermutationSpec, variables: PyTree, seed: int = 0
) -> tuple[permutation.Perms, PyTree]:
    """Random permutations, and the network permuted by them."""
    rng = np.random.default_rng(seed)
    sizes = permutation.group_sizes(spec, variables)
    perms = {g: jnp.asarray(rng.permutation(n), jnp.int32) for g, n in sizes.items()}
    return perms, jax.tree.map(np.asarray, permutation.apply(spec, perms, variables))
