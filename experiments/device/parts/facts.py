"""The machine: device, versions, and the rate of large matrix products."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time

import jax
import jax.numpy as jnp

from experiments.device._cells import Cell, Log
from experiments.device.parts import Settings

__all__ = ["cells"]

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch")
# The number of calls in one timing.
_CALLS = 10
# Each product by name: the dtype of its factors, and JAX's precision for it.
_PRODUCTS = {
    "float32": (jnp.float32, "highest"),
    "tf32": (jnp.float32, "default"),
    "bfloat16": (jnp.bfloat16, "default"),
}


def cells(settings: Settings) -> list[Cell]:
    """The cells of this part."""
    size = 256 if settings.tiny else 8192
    return [Cell("machine", 20, _machine), Cell("copy", 10, _copy(size))] + [
        Cell(f"product {name}", 15, _product(name, size)) for name in _PRODUCTS
    ]


def _machine(log: Log) -> None:
    device = jax.devices()[0]
    log.note(
        device_kind=device.device_kind,
        platform=device.platform,
        devices=jax.device_count(),
        cores=len(os.sched_getaffinity(0)),
        python=platform.python_version(),
        versions={name: _version(name) for name in _PACKAGES},
        memory_stats=device.memory_stats(),
        driver=_driver(),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The name, memory and driver of NVIDIA GPUs; None without their tool."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    query = "--query-gpu=name,memory.total,driver_version"
    command = [tool, query, "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    return done.stdout.strip()


def _median_seconds(call) -> float:
    """The median time of a call over five timings, after one that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(5):
        started = time.perf_counter()
        # The device works through them without waiting for the host.
        results = [call() for _ in range(_CALLS)]
        jax.block_until_ready(results)
        times.append((time.perf_counter() - started) / _CALLS)
    return sorted(times)[2]


def _copy(size: int):
    """Measures a large copy, counting the bytes that are read and written."""

    def measure(log: Log) -> None:
        x = jax.random.normal(jax.random.key(0), (4 * size, size))
        # Without the addition, XLA would return its argument.
        add = jax.jit(lambda x: x + 1)
        log.note(bytes_per_second=2 * x.nbytes / _median_seconds(lambda: add(x)))

    return measure


def _product(name: str, size: int):
    """Measures a product of two square matrices, on random numbers."""
    dtype, precision = _PRODUCTS[name]

    def measure(log: Log) -> None:
        keys = jax.random.split(jax.random.key(0))
        a, b = (jax.random.normal(key, (size, size)).astype(dtype) for key in keys)
        multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
        seconds = _median_seconds(lambda: multiply(a, b))
        log.note(size=size, flops_per_second=2 * size**3 / seconds)

    return measure
