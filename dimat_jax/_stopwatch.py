"""Where the time goes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import jax

__all__ = ["Stopwatch"]

T = TypeVar("T")


class Stopwatch:
    """Sums wall seconds by phase. A phase within a phase counts as its own alone.

    JAX returns before it has computed, so what a phase computes is to be passed
    through the function that it gives:

        with stopwatch("forward") as block:
            outputs = block(forward(inputs))
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
