"""Layouts: every way to run the agents of a device computes the same."""

import gc
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimat_jax._chunks import Chunked
from dimat_jax._layouts import LAYOUTS
from dimat_jax.placement import Placement, PlacementError, place, refusals_explained
from dimat_jax.tree import PyTree

N_AGENTS = 5
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
on_devices = pytest.mark.parametrize("n_devices", [1, 2, 5])
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N_AGENTS, 4, 3)).astype(np.float32)
SHARED = RNG.normal(size=(3, 2)).astype(np.float32)
W = RNG.uniform(size=(N_AGENTS, N_AGENTS)).astype(np.float32)


def placed(layout: Any, n_devices: int = 1, chunk: int = 1) -> Placement:
    return place(N_AGENTS, jax.devices()[:n_devices], layout, chunk)


def chunked(n_devices: int = 1, chunk: int = 1) -> Placement:
    return placed("chunks", n_devices, chunk)


def numbers(tree: PyTree) -> PyTree:
    """Brings the agents' rows to the host; keys as numbers."""

    def of(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x)[:N_AGENTS]

    return jax.tree.map(of, tree)


def assert_close(one: PyTree, other: PyTree) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other
    )


def program(placement: Placement):
    """A function with turns of stacked arithmetic and of what agents do alone."""

    def train(x, key, shared):
        noise = jax.random.normal(key, x.shape)
        kernel = jnp.broadcast_to(x[:3, :, None, None], (3, 3, 1, 1))
        image = jax.lax.conv_general_dilated(
            noise[None, ..., None],
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return {
            "x": x + 0.1 * image[0, ..., 0],
            "key": jax.random.fold_in(key, 1),
            "y": jnp.tanh(x @ shared),
        }

    def mixed(x):
        weights = jnp.eye(placement.slots).at[:N_AGENTS, :N_AGENTS].set(W)
        return jnp.einsum("ij,jkl->ikl", weights, x)

    def run(state, keys, shared):
        scale = shared.sum()  # traced, and closed over
        read = placement.per_agent(lambda x: x * scale)(state["x"])
        trained = placement.per_agent(train, (0, 0, None))(read, keys, shared)
        again = placement.per_agent(lambda m, x: m - x)(mixed(trained["x"]), state["x"])
        looped, _ = jax.lax.scan(
            lambda x, _: (placement.per_agent(jnp.sin)(x), None), again, None, 2
        )
        # `kept` is returned as it came, and `twice` once more.
        return {"x": again, "kept": state["kept"]}, trained, looped, {"twice": again}

    return run


def arguments(placement: Placement):
    state = placement.put({"x": X, "kept": X[:, 0]})
    keys = placement.keys(jax.random.key(3))
    return state, keys, placement.replicate(SHARED)


@pytest.fixture(scope="module")
def expected() -> PyTree:
    placement = placed("unroll")
    return numbers(jax.jit(program(placement))(*arguments(placement)))


@pytest.mark.every_nth(3)
@every_layout
@on_devices
def test_all_layouts_compute_the_same(expected, layout, n_devices):
    placement = placed(layout, n_devices)
    run = placement.jit(
        program(placement), donate_argnums=0, out_shardings=placement.sharding
    )
    assert_close(numbers(run(*arguments(placement))), expected)


@pytest.mark.every_nth(8)
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("cores", [1, 2, 3, 64])
def test_chunks_of_any_size_on_any_cores_compute_the_same(
    expected, monkeypatch, chunk, cores
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    placement = chunked(chunk=chunk)
    run = placement.jit(program(placement))
    assert_close(numbers(run(*arguments(placement))), expected)


@every_layout
def test_a_layout_gives_the_same_bits_every_time(layout):
    placement = placed(layout)
    results = [
        numbers(placement.jit(program(placement))(*arguments(placement)))
        for _ in range(2)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.every_nth(2)
@every_layout
def test_within_other_functions_a_layout_computes_the_same(expected, layout):
    placement = placed(layout)
    run = placement.jit(program(placement))
    within = jax.jit(lambda *args: run(*args))(*arguments(placement))
    assert_close(numbers(within), expected)
    shapes = jax.eval_shape(run, *arguments(placement))
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(
        lambda x: x.shape, within
    )


@every_layout
def test_lifted_functions_transform_like_any_other(layout):
    placement = placed(layout)
    x = placement.put(X)
    cube = placement.per_agent(lambda x, s: s * (x**3).sum(), (0, None))
    total = jax.jit(lambda x, s: cube(x, s).sum())
    np.testing.assert_allclose(jax.grad(total)(x, 2.0), 6 * X**2, rtol=1e-5)
    np.testing.assert_allclose(
        jax.vmap(total, (None, 0))(x, jnp.arange(3.0)),
        (X**3).sum() * np.arange(3),
        rtol=1e-5,
    )
    second = jax.jit(jax.hessian(lambda s: total(x, s**2)))(1.5)
    np.testing.assert_allclose(second, 2 * (X**3).sum(), rtol=1e-5)


@every_layout
def test_what_agents_do_alone_is_traced_once(layout):
    placement, traces = placed(layout), []

    def train(x):
        traces.append(None)
        return jnp.sin(x)

    run = placement.jit(lambda x: placement.per_agent(train)(x))
    for _ in range(3):
        run(placement.put(X))
    assert len(traces) == 1


# Chunks ===============================================================================


def programs_of(run: Any) -> list[bool]:
    """For each program of a chunked function whether it is what agents do alone."""
    assert isinstance(run, Chunked)
    (programs,) = run._programs.values()
    return [part.alone for part, _ in programs._steps]


def test_what_agents_do_alone_in_turn_is_one_program():
    placement = chunked()
    run = placement.jit(program(placement))
    run(*arguments(placement))
    # The two lifted functions before the mixing share a program, and what is returned
    # unchanged or twice is copied at the end.
    assert programs_of(run) == [False, True, False, True, False]


def test_a_program_for_a_chunk_serves_all_chunks(caplog):
    placement = chunked()
    run = placement.jit(lambda x: placement.per_agent(jnp.sin)(x))
    with jax.log_compiles():
        run(placement.put(X))
    chunks = [m for m in caplog.messages if "Compiling" in m and "_on_all_devices" in m]
    assert len(chunks) == 1
    with jax.log_compiles():
        caplog.clear()
        run(placement.put(X))
    assert not [m for m in caplog.messages if "Compiling" in m]


def test_donated_arguments_are_gone_and_no_others():
    placement = chunked()
    given, kept = placement.put(X), placement.put(X)
    run = placement.jit(
        lambda x, y: placement.per_agent(lambda x, y: x + y)(x, y), donate_argnums=0
    )
    total = run(given, kept)
    assert given.is_deleted() and not kept.is_deleted()
    np.testing.assert_array_equal(total, 2 * X)
    np.testing.assert_array_equal(kept, X)


def test_donated_arguments_are_freed_even_if_nothing_can_overwrite_them():
    placement = chunked()
    given = placement.put(X)
    run = placement.jit(
        lambda x: placement.per_agent(lambda x: x.sum())(x), donate_argnums=0
    )
    np.testing.assert_allclose(run(given), X.sum((1, 2)), rtol=1e-5)
    assert given.is_deleted()


def test_arguments_that_are_returned_are_copies_of_what_was_given():
    placement = chunked()
    x = placement.put(X)
    run = placement.jit(lambda x: (x, placement.per_agent(jnp.sin)(x), x))
    first, _, second = run(x)
    pointers = {a.unsafe_buffer_pointer() for a in (x, first, second)}
    assert len(pointers) == 3
    np.testing.assert_array_equal(first, second)


@on_devices
def test_results_have_the_sharding_of_stacked_arrays(n_devices):
    placement = chunked(n_devices)
    run = placement.jit(program(placement), out_shardings=placement.sharding)
    for leaf in jax.tree.leaves(run(*arguments(placement))):
        assert leaf.sharding == placement.sharding


def test_host_arrays_are_arguments_too():
    placement = chunked()
    given = X.copy()
    run = placement.jit(
        lambda x, n: placement.per_agent(lambda x, n: x * n, (0, None))(x, n),
        donate_argnums=0,
    )
    np.testing.assert_array_equal(run(given, np.float32(3)), 3 * X)
    np.testing.assert_array_equal(given, X)


def test_functions_that_lift_nothing_are_one_program():
    placement = chunked()
    np.testing.assert_array_equal(placement.jit(lambda x: x + 1)(X), X + 1)


def test_another_placements_agents_are_a_part_of_the_arithmetic():
    placement, other = chunked(), placed("vmap")

    def run(x):
        return placement.per_agent(jnp.sin)(other.per_agent(jnp.cos)(x))

    np.testing.assert_allclose(placement.jit(run)(X), np.sin(np.cos(X)), rtol=1e-5)


def test_the_programs_of_a_function_that_is_gone_are_freed():
    placement = chunked()
    run = placement.jit(lambda x: placement.per_agent(jnp.sin)(x))
    run(X)
    gc.collect()  # Programs of other tests may wait to be freed.
    before = sum(type(x) is Chunked for x in gc.get_objects())
    del run
    gc.collect()
    assert sum(type(x) is Chunked for x in gc.get_objects()) == before - 1


# Bad input ============================================================================


@every_layout
def test_stacked_arrays_have_a_row_for_each_slot(layout):
    placement = placed(layout)
    for wrong in (X[:4], np.float32(1)):
        with pytest.raises(PlacementError, match="a leading axis of 5 slots, got"):
            placement.per_agent(jnp.sin)(wrong)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batching": "scan"}, "batching is 'scan'; allowed: auto"),
        ({"batching": "chunks", "chunk": 0}, "chunk is 0; it must be at least 1"),
    ],
)
def test_a_layout_is_one_of_the_known_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        place(2, **arguments)


def test_a_layout_that_a_device_refuses_is_named_with_the_others():
    placement = placed("grouped")
    message = (
        "the layout grouped does not run on cpu: UNIMPLEMENTED: no such kernel. "
        "placement.batching can also be vmap, unroll, chunks, im2col"
    )
    with pytest.raises(PlacementError, match=message):
        with refusals_explained(placement):
            raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no such kernel\ndetails")
