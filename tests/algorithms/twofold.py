"""Runs both implementations of an algorithm through the same scenario.

The first implementation is the package's. The second one is in tests/reference: NumPy
loops in float64, written from the papers. Both get the same examples, absent agents,
failed links and learning rates. Each run returns the agents' params as vectors, at the
start of every round after its communication, and after every step.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dimat_jax.algorithms import Algorithm, MergeData, Task
from dimat_jax.data._small_shards import WAYS
from dimat_jax.data.pipeline import Batch
from dimat_jax.mixing import MixingError
from dimat_jax.network import Links, Network, NetworkError
from dimat_jax.tree import PyTree
from tests.algorithms.cases import (
    KEY,
    QUICKLY,
    STEPS,
    Case,
    Layout,
    learning_rate,
    make,
    placed,
)
from tests.algorithms.scenarios import (
    BATCH_SIZE,
    N_STEPS,
    Scenario,
    as_seen,
    batches,
    rate,
)
from tests.reference.agents import Alone
from tests.reference.algorithms import REFERENCES

# The first implementation computes in float32. Its params may differ from the second
# one's by this share of the largest param, or of 1 if none is larger.
TOLERANCE = 1e-5


class Problem(NamedTuple):
    """What the agents learn, for both implementations.

    Attributes:
        task: the task of the first implementation. A batch that is not full counts
            with its share of a full one, unless the variant says otherwise.
        start: the agents' params at the start as vectors, float64[agents, dim].
        variables: `variables(start)` makes stacked variables of the vectors.
        inputs: the inputs of all examples, by their index.
        labels: the labels of all examples.
        gradient: `gradient(x, examples, weights)` is the gradient at the vector x of
            the weighted sum of the losses of some examples, given by their indices.
    """

    task: Task
    start: np.ndarray
    variables: Callable[[np.ndarray], PyTree]
    inputs: np.ndarray
    labels: np.ndarray
    gradient: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Variant(NamedTuple):
    """An algorithm with some options, in both implementations.

    Attributes:
        case: the first implementation.
        options: the options of the second one.
        reference: the second one, if it is not the algorithm's entry in `REFERENCES`.
        plain_mean: whether a batch that is not full counts like a full one.
        data: the examples that a merge of the first implementation looks at.
    """

    case: Case
    options: Mapping[str, Any] = {}
    reference: Callable[..., Alone] | None = None
    plain_mean: bool = False
    data: MergeData = MergeData()

    def rule_in(self, scenario: Scenario) -> str:
        """The mixing rule: some algorithms need one of their own."""
        own = {"sgp": "column_stochastic", "d2": "lazy"}
        return own.get(self.case.per_step, scenario.mixing)

    def links_in(self, scenario: Scenario) -> Links:
        return scenario.links(self.rule_in(scenario))

    def accepts(self, scenario: Scenario) -> bool:
        """Whether the algorithm is meant for such a network."""
        try:
            links = self.links_in(scenario)
        except (MixingError, NetworkError):
            return False
        may_change = self.case.changing or not links.changes
        return may_change and self.case.accepts(links)


def merging(
    name: str,
    inner: str = "local",
    optimizer: str = "",
    compressor: str = "",
    **options: Any,
) -> Case:
    """A merging algorithm that resets optimizers, if no option says otherwise."""
    given = {"opt_state": "reset", **options}
    return Case(name, optimizer, compressor, tuple(given.items()), inner)


class Networks(NamedTuple):
    """The networks of all communications and of all steps."""

    rounds: list[Network]
    steps: list[Network]


def networks_of(links: Links, slots: int) -> Networks:
    return Networks(
        [links.at_round(1 + n, slots) for n in range(N_STEPS // STEPS)],
        [links.at_step(t, 1 + t // STEPS, slots) for t in range(N_STEPS)],
    )


# The first implementation =============================================================


class First:
    """The package's algorithm. Its step is compiled once for all scenarios."""

    def __init__(self, variant: Variant, problem: Problem):
        self._problem, self._data = problem, variant.data
        loss = problem.task.loss
        if not variant.plain_mean:
            loss = WAYS["idle"].weighed(loss)
        self._placement = placed(Layout(len(problem.start)))
        self._algorithm: Algorithm = make(
            variant.case,
            "convex",
            self._placement,
            learning_rate,
            task=problem.task._replace(loss=loss),
        )
        ahead = self._algorithm.ahead
        self._ahead = ahead and jax.jit(ahead, compiler_options=QUICKLY)
        self._steps = jax.jit(
            lambda state, nows: jax.lax.scan(self._step, state, nows),
            compiler_options=QUICKLY,
        )

    def _step(self, state, now):
        batch, network, key = now
        state, _ = self._algorithm.step(state, batch, network, key)
        return state, self._algorithm.variables(state)["params"]

    def run(self, networks: Networks, indices, mask) -> np.ndarray:
        """Returns the agents' params over time, `[times, agents, dim]`."""
        problem, path = self._problem, []
        variables = self._placement.put(problem.variables(problem.start))
        state = self._algorithm.init(variables)
        drawn = problem.inputs[indices], problem.labels[indices], mask
        batch = Batch(*map(jnp.asarray, drawn))
        stacked = jax.tree.map(lambda *x: np.stack(x), *networks.steps)
        for number, network in enumerate(networks.rounds):
            first, end = number * STEPS, (number + 1) * STEPS
            if self._ahead is not None:
                now = jax.tree.map(lambda x, t=first: x[t], (batch, stacked))
                state, _ = self._ahead(state, *now, KEY)
                first += 1
            state, _ = self._algorithm.communicate(state, self._data, network, KEY)
            params = self._algorithm.variables(state)["params"]
            path.append(_vectors(jax.tree.map(lambda x: x[None], params)))
            part = slice(first, end)
            nows = jax.tree.map(lambda x, part=part: x[part], (batch, stacked))
            keys = jax.random.split(KEY, end - first)
            state, params = self._steps(state, (*nows, keys))
            path.append(_vectors(params))
        return np.concatenate(path)


def _vectors(params: PyTree) -> np.ndarray:
    """The agents' params `[times, agents, ...]` as vectors `[times, agents, dim]`."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    return np.concatenate([x.reshape(*x.shape[:2], -1) for x in leaves], axis=2)


# The second one =======================================================================


def second(
    variant: Variant,
    problem: Problem,
    networks: Networks,
    indices,
    mask,
    *,
    adjacency: np.ndarray,
    rule: str,
) -> np.ndarray:
    """Runs the second implementation in the same way as `First.run`."""
    build = variant.reference or REFERENCES[variant.case.name]
    agents, path = build(problem.start, **variant.options), []
    see = functools.partial(as_seen, adjacency, rule)

    def note() -> None:
        path.append([agents.result(i) for i in range(len(problem.start))])

    for t in range(N_STEPS):

        def gradient(i: int, x: np.ndarray, t: int = t) -> np.ndarray:
            own = indices[t, i][mask[t, i]]
            divisor = len(own) if variant.plain_mean else BATCH_SIZE
            return problem.gradient(x, own, np.full(len(own), 1 / divisor))

        now = see(
            networks.steps[t],
            t,
            gradient=gradient,
            has_examples=mask[t].any(axis=1),
            rate=rate(t),
        )
        begins_round = t % STEPS == 0
        if begins_round and agents.looks_ahead:
            agents.ahead(now)
        if begins_round:
            agents.communicate(see(networks.rounds[t // STEPS], t // STEPS))
            note()
        if not (begins_round and agents.looks_ahead):
            agents.step(now)
            note()
    return np.array(path)


def assert_agree(
    implementation: First, variant: Variant, problem: Problem, scenario: Scenario
) -> None:
    """Both implementations give the same params after all steps of a scenario."""
    networks = networks_of(variant.links_in(scenario), len(problem.start))
    examples = batches(scenario.examples)
    assert_same(
        implementation.run(networks, *examples),
        second(
            variant,
            problem,
            networks,
            *examples,
            adjacency=scenario.adjacency,
            rule=variant.rule_in(scenario),
        ),
    )


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    largest = np.abs(expected).max(initial=1.0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * largest)
    assert np.abs(expected[-1] - expected[0]).max() > 0.1
