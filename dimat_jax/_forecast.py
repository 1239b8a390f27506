"""Forecasts what a run will send, by its own ledger, before anything is computed."""

import time
from typing import NamedTuple

import jax
import numpy as np

from dimat_jax.algorithms._frames import FRAMES
from dimat_jax.algorithms._merge_times import parts_of_round
from dimat_jax.algorithms._traffic import Bytes, matching_sizes
from dimat_jax.algorithms.base import State, one_agent
from dimat_jax.experiment import Experiment
from dimat_jax.ledger import Ledger, Messages
from dimat_jax.network import Network

__all__ = ["Sent", "abstract_state", "messages_of", "what_is_sent"]

# Where links fail, every step has a network of its own. After so many seconds the rest
# of the rounds is taken to be like those before.
_MOST_SECONDS = 2.0


class Sent(NamedTuple):
    """What all agents of a run send together.

    Attributes:
        first_round: the bytes of the first round.
        total: the bytes of all rounds.
        by_kind: the bytes of all rounds by kind of content; see `Messages`.
        comm_rounds: the rounds as the paper counts them; see `Ledger.comm_rounds`.
        is_exact: whether every round has been counted, or all rounds send as much as
            the first one. Otherwise the first ones have been counted, and the rest is
            taken to be like them.
    """

    first_round: int
    total: int
    by_kind: dict[str, int]
    comm_rounds: float
    is_exact: bool


def abstract_state(experiment: Experiment) -> State:
    """The shapes and dtypes of the state of all agents, which no device holds."""
    variables = experiment.abstract_variables()
    return jax.eval_shape(experiment.algorithm.init, variables)


def messages_of(experiment: Experiment) -> Messages:
    """What an agent sends a neighbour."""
    return experiment.algorithm.messages(abstract_state(experiment))


def what_is_sent(experiment: Experiment) -> Sent:
    """Counts what a run sends in all of its rounds, faults of the network included."""
    config, messages = experiment.config, messages_of(experiment)
    ledger = Ledger(experiment.placement.n_agents)
    first, until = 0, time.monotonic() + _MOST_SECONDS
    images, done = _image_bytes(experiment), 0
    for number in range(1, config.rounds + 1):
        _book_round(ledger, experiment, messages, number)
        done = number
        if number == 1:
            first = ledger.bytes_sent + images
        if time.monotonic() > until:
            break
    scale = config.rounds / done if done else 1
    by_kind = {kind: round(scale * size) for kind, size in ledger.by_kind.items()}
    if images and done:
        by_kind["images"] = images
    return Sent(
        first_round=first,
        total=sum(by_kind.values()),
        by_kind=by_kind,
        comm_rounds=scale * ledger.comm_rounds,
        is_exact=done == config.rounds or _are_rounds_equal(experiment, messages),
    )


def _are_rounds_equal(experiment: Experiment, messages: Messages) -> bool:
    """Whether every round sends as much as the first one."""
    merge = experiment.config.merge
    is_merge_in_each = merge.unit == "steps" or merge.every == 1
    # What is sent as differences is sent whole in the first round.
    return is_merge_in_each and not (experiment.links.changes or messages.whole)


def _book_round(
    ledger: Ledger, experiment: Experiment, messages: Messages, number: int
) -> None:
    """Books what one round sends, in the order in which `Rounds` does."""
    merge, slots = experiment.config.merge, experiment.placement.slots
    steps = experiment.steps_of_round(number)
    for part in parts_of_round(merge.every, merge.unit, number, steps):
        ahead = 0
        if part.merge is not None:
            ahead = int(experiment.algorithm.ahead is not None and len(part.steps) > 0)
            links = experiment.links
            network = links.at_round(number, slots, part.merge)
            matching = _matching_bytes(experiment, network)
            senders = links.senders(number)
            ledger.record_round(messages, network, links.edges, matching, senders)
        if messages.step:
            networks = [experiment.network_at_step(s, number) for s in part.steps]
            ledger.record_steps(messages, networks[ahead:])


def _matching_bytes(experiment: Experiment, network: Network) -> Bytes | None:
    """The bytes that agents send to match their units, beyond the mixed weights."""
    spec, record = experiment.task.spec, experiment.record
    if not record.aligns or not spec.groups:
        return None
    config, frame = experiment.config, FRAMES[experiment.config.merge.frame]
    active_edges = np.asarray(network.active_edges)
    edges = frame.edges(active_edges)
    if not len(edges):
        return None
    # Pairs of agents are compared once, unless each looks at images of its own.
    by_activations = record.matches_activations
    if not by_activations or config.merge.match_data != "own":
        edges = edges[edges[:, 0] < edges[:, 1]]
    variables = one_agent(experiment.abstract_variables())
    sizes = matching_sizes(spec, variables, by_activations=by_activations)
    return frame.traffic(active_edges, edges, sizes)


def _image_bytes(experiment: Experiment) -> int:
    """The bytes of the images that all agents get because they look at the same."""
    fields = experiment.config.merge.match_data, experiment.config.batch_norm.data
    if not {"proxy", "global", "held_out"} & set(fields):
        return 0
    experiment.merge_data(1)
    return experiment.examples.image_bytes
