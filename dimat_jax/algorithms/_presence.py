"""Absent agents do not train, receive nothing, and keep their state."""

import jax
import jax.numpy as jnp
import numpy as np

from dimat_jax.algorithms.base import Algorithm, State
from dimat_jax.network import Network
from dimat_jax.optimizers import with_clocks_of
from dimat_jax.placement import Placement

__all__ = ["with_absences"]


def with_absences(algorithm: Algorithm, placement: Placement) -> Algorithm:
    """Makes an algorithm in which an absent agent keeps its whole state.

    `network.present` says which agents are present. W and active_edges must leave out
    the absent agents already, as those of `Links` do. Learning-rate clocks go on also
    for absent agents, because schedules count the steps of the whole run.
    """

    def keep_absent(network: Network, new: State, old: State) -> State:
        def choose(n, o):
            return jnp.where(network.present.reshape(-1, *[1] * (n.ndim - 1)), n, o)

        return jax.tree.map(choose, new, with_clocks_of(old, new))

    keep_absent_jitted = jax.jit(keep_absent, out_shardings=placement.sharding)

    def among_present(step):
        def step_of_present(state, batch, network, key):
            batch = batch._replace(mask=batch.mask & network.present[:, None])
            new, metrics = step(state, batch, network, key)
            return keep_absent(network, new, state), metrics

        return step_of_present

    def communicate(state, data, network, key):
        new, metrics = algorithm.communicate(state, data, network, key)
        if not np.asarray(network.present)[: placement.n_agents].all():
            new = keep_absent_jitted(network, new, state)
        return new, metrics

    return algorithm._replace(
        step=among_present(algorithm.step),
        communicate=communicate,
        ahead=algorithm.ahead and among_present(algorithm.ahead),
    )
