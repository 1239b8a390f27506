"""A stopwatch for the phases of a computation."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import jax

__all__ = ["Stopwatch"]

T = TypeVar("T")


class Stopwatch:
    """Sums wall seconds by phase.

    The time of a phase that runs within another one counts for the inner phase alone.
    JAX returns from a call before the results are computed. So a phase passes its
    results through the function `block`, which waits for them:

        with stopwatch("forward") as block:
            outputs = block(forward(inputs))

    Attributes:
        seconds: The wall seconds of each phase so far.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    @contextmanager
    def __call__(self, phase: str) -> Iterator[Callable[[T], T]]:
        start = time.perf_counter()
        self._inner.append(0.0)
        yield jax.block_until_ready
        elapsed = time.perf_counter() - start
        own = elapsed - self._inner.pop()
        self._inner[-1] += elapsed
        self.seconds[phase] = self.seconds.get(phase, 0.0) + own
