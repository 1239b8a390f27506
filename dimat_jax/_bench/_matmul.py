"""A large matrix product: the peak speed to which programs are compared."""

from typing import Any

import jax
import jax.numpy as jnp

from dimat_jax._bench._worker import Program, jax_program

__all__ = ["matmul"]

# The number of rows and columns of the matrices, by whether the device is a CPU.
_SIZES = {True: 2048, False: 8192}
# The number of products in a call, by whether the device is a CPU. An accelerator takes
# about a millisecond for a product, which is too short a time to measure.
_PRODUCTS = {True: 1, False: 20}


def matmul(dtype: str) -> Program:
    """Makes a program that multiplies square matrices at JAX's default precision.

    Its facts are the floating-point operations of a call.
    """
    on_cpu = jax.devices()[0].platform == "cpu"
    size, products = _SIZES[on_cpu], _PRODUCTS[on_cpu]
    left = jnp.ones((size, size), dtype)
    right = jnp.full((size, size), 1 / size, dtype)
    multiply = jax.jit(jnp.matmul)

    def call() -> dict[str, Any]:
        product = left
        for _ in range(products):
            product = multiply(product, right)
        product.block_until_ready()
        return {"flops": 2.0 * products * size**3}

    return jax_program(call)
