import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dimat_jax._schedules import warmed_up
from dimat_jax.optimizers import MOMENTUM as MOMENTUM_OPTION
from dimat_jax.optimizers import OPTIMIZERS, SCHEDULES, clipped, with_clocks_of
from dimat_jax.options import OptionError

N_STEPS = 5
RATE, MOMENTUM, DECAY = 0.1, 0.8, 0.05
PARAMS = {"w": jnp.array([1.0, -2.0, 0.5]), "b": [jnp.array(3.0)]}


def gradients(step: int) -> Any:
    """Makes gradients that differ at every step and do not depend on the params."""
    return jax.tree.map(lambda p: jnp.cos(p + step), PARAMS)


def descend(tx: optax.GradientTransformation, state: Any = None) -> tuple[Any, Any]:
    """Takes some steps from PARAMS, and returns the params and the state."""
    params = PARAMS
    state = tx.init(params) if state is None else state
    for step in range(N_STEPS):
        updates, state = tx.update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def made(name: str, schedule: Any = RATE, weight_decay: float = 0.0, **options: Any):
    record = OPTIMIZERS[name]
    momentum = {"momentum": MOMENTUM} if MOMENTUM_OPTION in record.options else {}
    return record(schedule, weight_decay=weight_decay, **momentum, **options)


def assert_close(tree: Any, expected: Any) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), tree, expected
    )


OPTAX = {
    "sgd": lambda rate: optax.sgd(rate),
    "momentum": lambda rate: optax.sgd(rate, momentum=MOMENTUM),
    "nesterov": lambda rate: optax.sgd(rate, momentum=MOMENTUM, nesterov=True),
    "adam": lambda rate: optax.adam(rate),
    "adamw": lambda rate: optax.adamw(rate, weight_decay=0.0),
}

all_optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


@pytest.mark.parametrize("name", OPTAX)
@pytest.mark.parametrize("rate", [RATE, optax.exponential_decay(RATE, 2, 0.5)])
def test_an_optimizer_is_the_one_of_optax_that_it_names(name, rate):
    assert_close(descend(made(name, rate))[0], descend(OPTAX[name](rate))[0])


def test_a_heavy_ball_keeps_the_rate_at_which_it_learnt():
    """The rule is v <- beta v - alpha g (Polyak 1964); optax scales all of v."""

    def rate(step):
        return RATE * 0.5 ** jnp.asarray(step, jnp.float32)

    params, velocity = PARAMS, jax.tree.map(jnp.zeros_like, PARAMS)
    for step in range(N_STEPS):
        pull = functools.partial(jnp.multiply, -rate(step))
        velocity = jax.tree.map(
            lambda v, m: MOMENTUM * v + m, velocity, jax.tree.map(pull, gradients(step))
        )
        params = jax.tree.map(jnp.add, params, velocity)
    assert_close(descend(made("heavy_ball", rate))[0], params)
    assert_close(descend(made("heavy_ball"))[0], descend(made("momentum"))[0])
    # With a constant rate the form that looks ahead is optax's.
    ahead = made("heavy_ball", form="nesterov")
    assert_close(descend(ahead)[0], descend(made("nesterov"))[0])


def test_optimizers_differ():
    ends = {name: float(descend(made(name))[0]["w"][0]) for name in OPTIMIZERS}
    del ends["adamw"]  # Without weight decay it is adam.
    del ends["heavy_ball"]  # With a constant rate it is momentum.
    assert len(set(ends.values())) == len(ends)


@all_optimizers
def test_momentum_matters_where_it_is_an_option_and_is_refused_elsewhere(name):
    if MOMENTUM_OPTION in OPTIMIZERS[name].options:
        a, b = (
            descend(OPTIMIZERS[name](RATE, momentum=momentum))[0]["w"]
            for momentum in (0.1, 0.9)
        )
        assert bool(jnp.any(a != b))
    else:
        with pytest.raises(TypeError, match="momentum"):
            OPTIMIZERS[name](RATE, momentum=0.1)


def test_these_have_a_momentum():
    found = {n for n, r in OPTIMIZERS.items() if MOMENTUM_OPTION in r.options}
    assert found == {"momentum", "nesterov", "heavy_ball"}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"adamw"}))
def test_weight_decay_is_an_l2_term_of_the_gradient(name):
    tx, params = made(name), PARAMS
    state = tx.init(params)
    for step in range(N_STEPS):
        # This is the gradient of loss + DECAY / 2 |params|^2.
        grads = jax.tree.map(lambda g, p: g + DECAY * p, gradients(step), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert_close(descend(made(name, weight_decay=DECAY))[0], params)


def test_weight_decay_of_adamw_bypasses_the_moments():
    assert_close(
        descend(made("adamw", weight_decay=DECAY))[0],
        descend(optax.adamw(RATE, weight_decay=DECAY))[0],
    )
    # One step without any gradient shrinks the params, and does nothing else to them.
    tx = made("adamw", weight_decay=DECAY)
    nothing = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(nothing, tx.init(PARAMS), PARAMS)
    assert_close(updates, jax.tree.map(lambda p: -RATE * DECAY * p, PARAMS))


# Schedules


def rates(name: str, steps: range, **changes: Any) -> list[float]:
    options: dict[str, Any] = {"steps_per_epoch": 4, "total_steps": 20}
    if name == "exponential":
        options["decay"] = 0.5
    schedule: Any = SCHEDULES[name](RATE, **{**options, **changes})
    at = schedule if callable(schedule) else lambda step: schedule
    values: list[Any] = [at(step) for step in steps]
    return [float(value) for value in values]


def test_a_constant_rate_is_constant():
    assert rates("constant", range(0, 100, 10)) == [pytest.approx(RATE)] * 10


def test_an_exponential_rate_falls_after_every_epoch_and_not_within():
    expected = [RATE * 0.5 ** (step // 4) for step in range(20)]
    np.testing.assert_allclose(rates("exponential", range(20)), expected, rtol=1e-5)


def test_the_papers_rate_decays_by_981_thousandths_an_epoch():
    (rate,) = rates("exponential", range(800, 801), decay=0.981)
    assert rate == pytest.approx(RATE * 0.981**200, rel=1e-4)


def test_a_cosine_rate_falls_to_zero_over_all_steps_and_stays_there():
    expected = [RATE * (1 + np.cos(np.pi * step / 20)) / 2 for step in range(21)]
    np.testing.assert_allclose(rates("cosine", range(21)), expected, atol=1e-7)
    assert rates("cosine", range(21, 30, 4)) == [0.0] * 3


ROUND = 5  # steps


@pytest.mark.parametrize(("unit", "size"), [("steps", 1), ("epochs", 4), ("rounds", 5)])
def test_a_schedule_may_change_the_rate_after_every_step_epoch_or_round(unit, size):
    changes = {"unit": unit, "steps_per_round": ROUND}
    first = np.arange(20) // size * size
    found = rates("cosine", range(20), **changes)
    expected = RATE * (1 + np.cos(np.pi * first / 20)) / 2
    np.testing.assert_allclose(found, expected, atol=1e-7)
    found = rates("exponential", range(20), **changes)
    expected = RATE * 0.5 ** (np.arange(20) // size)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def warming_up(schedule: Any, warmup: int, unit: str) -> list[float]:
    rising: Any = warmed_up(
        schedule, steps_per_epoch=4, steps_per_round=5, warmup=warmup, warmup_unit=unit
    )
    return np.asarray(jax.vmap(rising)(jnp.arange(20))).tolist()


@pytest.mark.parametrize(("unit", "size"), [("steps", 1), ("epochs", 4), ("rounds", 5)])
def test_warm_up_reaches_the_rate_of_the_schedule_in_equal_parts(unit, size):
    share = np.minimum((np.arange(20) // size + 1) / 3, 1)
    np.testing.assert_allclose(warming_up(RATE, 3, unit), share * RATE, rtol=1e-6)
    falling = SCHEDULES["cosine"](RATE, steps_per_epoch=4, total_steps=20)
    expected = share * rates("cosine", range(20))
    np.testing.assert_allclose(warming_up(falling, 3, unit), expected, atol=1e-7)


def test_without_warm_up_a_schedule_stays_what_it_is():
    assert warmed_up(RATE, steps_per_epoch=4) == RATE
    wrong: Any
    for wrong in ({"warmup": -1}, {"warmup": 1, "warmup_unit": "years"}):
        with pytest.raises(OptionError, match="warmup"):
            warmed_up(RATE, steps_per_epoch=4, **wrong)


def test_a_reset_does_not_warm_up_again():
    tx = OPTIMIZERS["adam"](warmed_up(RATE, steps_per_epoch=1, warmup=4))
    _, old = descend(tx)
    state = with_clocks_of(tx.init(PARAMS), old)
    assert clocks(state) == [N_STEPS]
    updates, _ = tx.update(gradients(0), state, PARAMS)
    # Adam's first step is one learning rate long.
    expected = jax.tree.map(lambda g: -RATE * jnp.sign(g), gradients(0))
    jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, 1e-4), updates, expected)


def test_a_long_gradient_is_clipped_to_the_norm_over_all_params():
    tree = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    assert_close(clipped(tree, 2.0), jax.tree.map(lambda x: x * 2 / 5, tree))
    for norm in (0.0, 5.1):
        assert_close(clipped(tree, norm), tree)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_of_no_steps_can_be_made(name):
    assert rates(name, range(1), total_steps=0) == [pytest.approx(RATE)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_run_within_jit_on_counters(name):
    decay = {"decay": 0.5} if name == "exponential" else {}
    schedule: Any = SCHEDULES[name](RATE, steps_per_epoch=4, total_steps=20, **decay)
    if not callable(schedule):
        pytest.skip("is a number")
    steps = jnp.arange(20, dtype=jnp.int32)
    compiled = jax.jit(jax.vmap(schedule))(steps)
    np.testing.assert_allclose(compiled, rates(name, range(20)), rtol=1e-5, atol=1e-8)


# Resetting


HALVING = optax.exponential_decay(RATE, 1, 0.5)


def is_clock(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def clocks(state: Any) -> list[int]:
    """Returns the counts of the schedules within a state."""
    nodes: list[Any] = jax.tree.leaves(state, is_leaf=is_clock)
    return [int(node.count) for node in nodes if is_clock(node)]


@all_optimizers
@pytest.mark.parametrize("weight_decay", [0.0, DECAY])
def test_a_reset_keeps_the_clock_and_nothing_else(name, weight_decay):
    tx = made(name, HALVING, weight_decay)
    fresh = tx.init(PARAMS)
    _, old = descend(tx)
    again = with_clocks_of(fresh, old)
    assert jax.tree.structure(again) == jax.tree.structure(old)
    assert clocks(again) == clocks(old) == [N_STEPS]
    # Moments, and with them the count that corrects Adam's bias, are fresh.
    stopped = jax.tree.map(
        lambda node: node._replace(count=0) if is_clock(node) else node,
        again,
        is_leaf=is_clock,
    )
    jax.tree.map(np.testing.assert_array_equal, stopped, fresh)


def test_after_a_reset_momentum_starts_anew_at_the_old_pace():
    tx = made("momentum", HALVING)
    _, old = descend(tx)
    state = with_clocks_of(tx.init(PARAMS), old)
    updates, _ = tx.update(gradients(0), state, PARAMS)
    expected = jax.tree.map(lambda g: -RATE * 0.5**N_STEPS * g, gradients(0))
    assert_close(updates, expected)


def test_a_reset_without_a_schedule_is_a_fresh_state():
    tx = made("adam")
    fresh = tx.init(PARAMS)
    jax.tree.map(
        np.testing.assert_array_equal, with_clocks_of(fresh, descend(tx)[1]), fresh
    )


def test_a_reset_reaches_states_within_other_trees_and_within_jit():
    tx = made("momentum", HALVING)
    stacked: Any = jax.vmap(tx.init)(jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS))
    old = jax.tree.map(lambda x: x + 3, stacked)
    fresh, again = {"opt_state": stacked}, {"opt_state": old}
    result = jax.jit(with_clocks_of)(fresh, again)["opt_state"]
    momenta, clock = result
    np.testing.assert_array_equal(clock.count, [3, 3])
    jax.tree.map(np.testing.assert_array_equal, momenta, stacked[0])
