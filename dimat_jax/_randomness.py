"""The random numbers of a run. They depend on its seed and on their purpose alone."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

__all__ = ["key", "seed_key", "seeds"]


def key(seed: int, purpose: str) -> Key[Array, ""]:
    """Returns the key of all random numbers on the devices for a purpose."""
    return jax.random.fold_in(seed_key(seed), _PURPOSES.index(purpose))


def seed_key(seed: int) -> Key[Array, ""]:
    """Returns a key that differs for all seeds, however large they are.

    `jax.random.key` takes a seed modulo 2**32. Below that it is used as it is. A larger
    seed gives all 64 bits of a key: its own ones, or a hash if it has more.
    """
    if seed < 2**32:
        return jax.random.key(seed)
    words = [seed >> 32, seed % 2**32] if seed < 2**64 else _hashed(seed)
    # A key of another generator than the default one repeats these two words.
    length = jax.random.key_data(jax.random.key(0)).shape[-1]
    return jax.random.wrap_key_data(jnp.array(np.resize(words, length), np.uint32))


def seeds(seed: int, purpose: str) -> Sequence[int]:
    """Returns seeds for `numpy.random.default_rng`, on the host, for a purpose."""
    # NumPy takes a large number of a list as several ones, so that another list could
    # give the same random numbers.
    words = [seed] if seed < 2**32 else _hashed(seed)
    return [*words, _PURPOSES.index(purpose)]


def _hashed(seed: int) -> list[int]:
    """Two numbers below 2**32 that differ for almost all seeds."""
    return np.random.SeedSequence(seed).generate_state(2).tolist()


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
    "label_noise",
)
