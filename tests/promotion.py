"""Implicit promotion of dtypes and ranks, where tests have to allow it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import flax.linen.normalization
import jax
import optax

__all__ = ["allow", "allow_in_flax_and_optax"]


@contextmanager
def allow() -> Iterator[None]:
    """JAX's own defaults, for programs that stand for those of users."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def allow_in_flax_and_optax() -> None:
    """Lets the functions of Flax and Optax that promote dtypes do so.

    Pooling divides a float32 array by an integer array; BatchNorm in bfloat16 combines
    its input with float32 statistics; Adam raises a float to the power of an int32
    count, and so do schedules. Everything that these functions return is passed back to
    code in which promotion is strict.
    """
    _replace(nn, "avg_pool", _allowing)
    for name in ("_compute_stats", "_normalize"):
        _replace(flax.linen.normalization, name, _allowing)
    _replace(optax.tree, "bias_correction", _allowing)
    for name in ("exponential_decay", "cosine_decay_schedule"):
        _replace(optax, name, _making_schedules_that_allow)


def _replace(module: Any, name: str, change: Callable[[Callable], Callable]) -> None:
    setattr(module, name, change(getattr(module, name)))


def _allowing(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return wrapped


def _making_schedules_that_allow(make: Callable) -> Callable:
    @functools.wraps(make)
    def wrapped(*args, **kwargs):
        return _allowing(make(*args, **kwargs))

    return wrapped
