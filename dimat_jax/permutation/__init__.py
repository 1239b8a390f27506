"""Permutation symmetries of networks: declare, check and apply them.

The convention, everywhere: `perm[u]` is the permutee's unit that lands on the
reference's unit `u`, so aligning is `jnp.take(w, perm, axis)`. Permutations are int32.

This package knows nothing of agents, data sets or architectures: variables are any
pytree of arrays.
"""

from dimat_jax._lazy import public_names
from dimat_jax.permutation._actions import (
    Perms,
    apply,
    compose,
    identity,
    invert,
    permute_leaf,
    random,
)
from dimat_jax.permutation._derive import derive
from dimat_jax.permutation._explain import AxisExplanation, Explanation, explain
from dimat_jax.permutation._json import spec_from_json, spec_to_json
from dimat_jax.permutation._sizes import group_shapes, group_sizes, validate
from dimat_jax.permutation._spec import (
    Axis,
    Concat,
    PermutationSpec,
    PermutationSpecError,
    PermutationSpecWarning,
    Product,
    Stack,
)
from dimat_jax.permutation._verify import verify

__all__ = [
    "Axis",
    "AxisExplanation",
    "Concat",
    "Explanation",
    "PermutationSpec",
    "PermutationSpecError",
    "PermutationSpecWarning",
    "Perms",
    "Product",
    "Stack",
    "apply",
    "compose",
    "derive",
    "explain",
    "group_shapes",
    "group_sizes",
    "identity",
    "invert",
    "permute_leaf",
    "random",
    "spec_from_json",
    "spec_to_json",
    "validate",
    "verify",
]


def __dir__() -> list[str]:
    return public_names(__name__)
