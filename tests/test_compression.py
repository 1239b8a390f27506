"""Compression of single leaves; algorithms that compress are tested with the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dimat_jax.compression import COMPRESSORS
from dimat_jax.tree import nbytes

LOSSY = [name for name in COMPRESSORS if name != "none"]

complex_numbers = st.complex_numbers(
    max_magnitude=1e3, allow_nan=False, allow_infinity=False, width=64
)


@pytest.mark.parametrize("name", COMPRESSORS)
@settings(max_examples=10)
@given(z=arrays(np.complex64, (3, 4), elements=complex_numbers))
def test_a_complex_leaf_is_compressed_as_its_two_parts(name, z):
    compressor = COMPRESSORS[name]()
    key = jax.random.key(0)
    parts = jnp.stack([jnp.real(z), jnp.imag(z)], axis=-1)
    sent = compressor.compress({"z": jnp.asarray(z)}, key)["z"]
    assert sent.dtype == z.dtype and sent.shape == z.shape
    expected = compressor.compress({"z": parts}, key)["z"]
    np.testing.assert_array_equal(sent.real, expected[..., 0])
    np.testing.assert_array_equal(sent.imag, expected[..., 1])
    assert nbytes(compressor.message({"z": z})) == nbytes(
        compressor.message({"z": parts})
    )


@pytest.mark.parametrize("name", LOSSY)
def test_an_imaginary_part_arrives(name):
    z = jnp.full((4, 4), 1j)
    sent = COMPRESSORS[name](**({"fraction": 1.0} if name.endswith("_k") else {}))
    arrived = sent.compress([z], jax.random.key(1))[0]
    assert jnp.abs(arrived.imag).min() >= 0.5
