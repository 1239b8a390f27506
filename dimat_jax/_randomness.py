"""The random numbers of a run. They depend on its seed and on their purpose alone."""

from collections.abc import Sequence

import jax
from jaxtyping import Array, Key

__all__ = ["key", "seeds"]


def key(seed: int, purpose: str) -> Key[Array, ""]:
    """Returns the key of all random numbers on the devices for a purpose."""
    return jax.random.fold_in(jax.random.key(seed), _PURPOSES.index(purpose))


def seeds(seed: int, purpose: str) -> Sequence[int]:
    """Returns seeds for `numpy.random.default_rng`, on the host, for a purpose."""
    return [seed, _PURPOSES.index(purpose)]


# Each purpose has random numbers of its own. A new purpose is added at the end, because
# another order would change the results of every run.
_PURPOSES = (
    "init",
    "pretrain",
    "rounds",
    "communicate",
    "verify",
    "order",
    "pretrain_order",
    "proxy",
    "own",
    "eval",
    "own_for_evaluation",
    "align",
    "held_out",
    "validation",
)
