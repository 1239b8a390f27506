"""The package's batch norm computes what Flax's own layer computes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimat_jax.models._norm import EPSILON, BatchNorm
from dimat_jax.tree import flatten

MOMENTUM = 0.8


def data(shape: tuple[int, ...], masked: bool):
    rng = np.random.default_rng(0)
    channels = shape[-1]
    x = 2 * rng.normal(size=shape) + rng.normal(size=channels)
    mask = np.arange(shape[0]) % 3 != 1 if masked else None
    variables = {
        "params": {
            "scale": rng.normal(size=channels),
            "bias": rng.normal(size=channels),
        },
        "batch_stats": {
            "mean": rng.normal(size=channels),
            "var": rng.uniform(0.5, 2, size=channels),
        },
    }
    cotangent = rng.normal(size=shape)
    if mask is not None:
        # The loss does not count masked examples.
        cotangent[~mask] = 0
    as_float32 = jax.tree.map(jnp.float32, (x, variables, cotangent))
    return *as_float32, None if mask is None else jnp.asarray(mask)


def outputs_of(apply, x, variables, cotangent):
    """The layer's results, its new statistics, and the gradients of all it reads."""

    def loss(params, x):
        y, state = apply({**variables, "params": params}, x)
        return (y.astype(jnp.float32) * cotangent).sum(), (y, state)

    grads, (y, state) = jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)
    return {"y": y, "state": state, "grads": grads}


@pytest.mark.every_nth(2)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", [(12, 5, 4, 3), (12, 3)])
def test_batch_norm_equals_that_of_flax(shape, masked, train):
    x, variables, cotangent, mask = data(shape, masked)
    own = BatchNorm(MOMENTUM, jnp.float32)
    flax = nn.BatchNorm(not train, momentum=MOMENTUM, epsilon=EPSILON)
    wide = None if mask is None else mask.reshape(-1, *(1,) * (x.ndim - 1))

    def apply_own(variables, x):
        return own.apply(variables, x, train=train, mask=mask, mutable=["batch_stats"])

    def apply_flax(variables, x):
        return flax.apply(variables, x, mask=wide, mutable=["batch_stats"])

    found = outputs_of(apply_own, x, variables, cotangent)
    expected = outputs_of(apply_flax, x, variables, cotangent)
    if mask is not None:
        found["y"], expected["y"] = found["y"][mask], expected["y"][mask]
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        scale = float(jnp.abs(leaf).max())
        np.testing.assert_allclose(found[name], leaf, rtol=0, atol=2e-6 * scale + 1e-9)


def test_batch_norm_has_the_variables_of_flax():
    x = jnp.ones((2, 4, 4, 3))
    key = jax.random.key(0)
    own = BatchNorm(MOMENTUM, jnp.float32).init(key, x, train=False, mask=None)
    expected = flatten(nn.BatchNorm(True).init(key, x))
    assert flatten(own).keys() == expected.keys()
    for name, leaf in flatten(own).items():
        np.testing.assert_array_equal(leaf, expected[name])


def test_what_masked_examples_hold_does_not_matter():
    x, variables, _, mask = data((12, 5, 4, 3), masked=True)
    assert mask is not None
    layer = BatchNorm(MOMENTUM, jnp.float32)

    def statistics(x):
        _, state = layer.apply(
            variables, x, train=True, mask=mask, mutable=["batch_stats"]
        )
        return flatten(state)

    spoilt = jnp.where(mask[:, None, None, None], x, jnp.nan)
    for name, leaf in statistics(spoilt).items():
        np.testing.assert_array_equal(leaf, statistics(x)[name])


def test_a_batch_of_masked_examples_alone_leaves_everything_finite():
    x, variables, _, _ = data((12, 5, 4, 3), masked=True)
    y, state = BatchNorm(MOMENTUM, jnp.float32).apply(
        variables, x, train=True, mask=jnp.zeros(12, bool), mutable=["batch_stats"]
    )
    assert all(jnp.isfinite(leaf).all() for leaf in flatten((y, state)).values())


def test_statistics_are_float32_where_the_result_is_bfloat16():
    x, variables, _, _ = data((12, 5, 4, 3), masked=False)
    x = x.astype(jnp.bfloat16)
    y, state = BatchNorm(MOMENTUM, jnp.bfloat16).apply(
        variables, x, train=True, mask=None, mutable=["batch_stats"]
    )
    assert jnp.asarray(y).dtype == jnp.bfloat16
    mean = MOMENTUM * variables["batch_stats"]["mean"]
    mean += (1 - MOMENTUM) * x.astype(jnp.float32).mean((0, 1, 2))
    np.testing.assert_allclose(flatten(state)["batch_stats/mean"], mean, rtol=1e-5)
