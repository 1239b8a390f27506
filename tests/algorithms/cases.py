"""Every algorithm, with its own optimizer and with Adam, and forms of some, to be run.

What is built is kept: an algorithm's programs compile once for all tests that use it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dimat_jax.algorithms import (
    ALGORITHMS,
    Algorithm,
    AlgorithmRecord,
    MergeData,
    record,
)
from dimat_jax.algorithms.base import State
from dimat_jax.compression import COMPRESSORS
from dimat_jax.data.pipeline import Batch
from dimat_jax.mixing import MIXINGS
from dimat_jax.network import Faults, Links, NetworkError
from dimat_jax.optimizers import OPTIMIZERS
from dimat_jax.placement import Placement, place
from dimat_jax.topology import TOPOLOGIES
from dimat_jax.tree import PyTree
from tests.algorithms.problems import (
    N_AGENTS,
    PROBLEMS,
    START,
    convex_variables,
    whole_batch,
)

KEY = jax.random.key(0)


class Case(NamedTuple):
    """An algorithm with its options.

    Attributes:
        name: the algorithm's name.
        optimizer: the local optimizer's name; "": the algorithm's own.
        compressor: the compressor's name; "": the algorithm's own.
        options: the algorithm's options that are not their defaults. Algorithms that
            merge keep their optimizers' state unless it says otherwise.
        inner: the algorithm that runs between merges.
        examples: the number of examples that each agent holds; (): all hold as many.
        changing: whether the network may change.
    """

    name: str
    optimizer: str = ""
    compressor: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    inner: str = "local"
    examples: tuple[int, ...] = ()
    changing: bool = True

    @property
    def record(self) -> AlgorithmRecord:
        return record(self.name, self.inner)

    @property
    def merging(self) -> bool:
        return self.record.merges

    @property
    def arguments(self) -> dict[str, Any]:
        """The options as keyword arguments."""
        own = {"opt_state": "keep"} if self.merging else {}
        return {**own, **dict(self.options)}

    @property
    def per_step(self) -> str:
        """What it does with every step."""
        if self.name in ("centralized", "fedavg"):
            return "local"
        return self.inner if self.merging else self.name

    @property
    def communicates(self) -> bool:
        """Whether something happens once a round, also if everybody is there."""
        return self.merging or self.name == "fedavg"

    def accepts(self, links: Links) -> bool:
        """Whether the network is what its theory asks for."""
        try:
            self.record.check_network(links, **self.arguments)
        except NetworkError:
            return False
        return True


def case_of(name: str, *, optimizer: str = "", compressor: str = "", **options) -> Case:
    """A case with options by keyword."""
    return Case(name, optimizer, compressor, tuple(options.items()))


CASES: dict[str, Case] = {
    **{name: Case(name) for name in ALGORITHMS},
    **{
        f"{name} with adam": Case(name, "adam")
        for name, found in ALGORITHMS.items()
        if found.other_optimizers and found.optimizer != "adam"
    },
    "cdsgd, adapt then combine": case_of("cdsgd", order="adapt_then_combine"),
    "choco, top_k": Case("choco", compressor="top_k"),
    "choco, reliable": Case("choco", compressor="top_k", changing=False),
    "dimat over cdsgd": Case("dimat", inner="cdsgd"),
    "dimat over sgp": Case("dimat", inner="sgp"),
    "dimat over d2": Case("dimat", inner="d2"),
    "dimat over dsgt": Case("dimat", inner="dsgt"),
    "dimat over choco": Case("dimat", compressor="top_k", inner="choco"),
    "dimat, top_k": Case("dimat", compressor="top_k"),
    "wm, float16": Case("wm", compressor="float16"),
    "wa, int8": Case("wa", compressor="int8"),
}


class Layout(NamedTuple):
    """Where agents live: the arguments of `place`, with a number of devices."""

    n_agents: int = N_AGENTS
    devices: int = 1
    batching: Any = "vmap"


@functools.cache
def placed(layout: Layout) -> Placement:
    return place(layout.n_agents, jax.devices()[: layout.devices], layout.batching)


class Built(NamedTuple):
    """An algorithm on a problem.

    Attributes:
        algorithm: the algorithm.
        step: its step, jitted.
        aligned: its `aligned`, jitted.
        placement: where its agents live.
        traces: one entry for every trace of the step.
    """

    algorithm: Algorithm
    step: Callable[..., tuple[State, Any]]
    aligned: Callable[[State, Any], State]
    placement: Placement
    traces: list[None]

    def run(
        self,
        variables: PyTree,
        data: list[Batch],
        links: Links,
        *,
        every: int = 2,
    ) -> State:
        """Communicates before every `every` steps, as a run does."""
        slots = self.placement.slots
        state = self.algorithm.init(self.placement.put(variables))
        for number, batch in enumerate(data):
            round_number = 1 + number // every
            key = jax.random.fold_in(KEY, number)
            if number % every == 0:
                network = links.at_round(round_number, slots)
                state, _ = self.algorithm.communicate(state, MergeData(), network, key)
            network = links.at_step(number, round_number, slots)
            state, _ = self.step(state, batch, network, key)
        return state

    def variables(self, state: State) -> PyTree:
        """What the agents are, on the host."""
        return self.placement.gather(self.algorithm.variables(state))


def optimizer_name(case: Case) -> str:
    """The name of a case's local optimizer."""
    return case.optimizer or case.record.optimizer


def compressor_name(case: Case) -> str:
    """The name of a case's compressor."""
    return case.compressor or case.record.compressor or "none"


def make(
    case: Case,
    problem: str,
    placement: Placement,
    schedule: Any,
    topology: str = "fully_connected",
) -> Algorithm:
    """A case on a problem, for graphs within a topology."""
    tx = OPTIMIZERS[optimizer_name(case)](schedule)
    edges = TOPOLOGIES[topology](placement.n_agents)
    facts = {
        "compressor": COMPRESSORS[compressor_name(case)](),
        "adjacency": edges,
        "lossy_edges": edges if case.changing else None,
        "examples": case.examples or None,
    }
    return case.record(
        PROBLEMS[problem].task,
        tx,
        placement,
        **case.arguments,
        **{name: facts[name] for name in case.record.facts},
    )


# Small programs that run a few times: it is compiling them that takes long.
QUICKLY = {"xla_backend_optimization_level": 0}


def learning_rate(step):
    """Falls every other step."""
    return 0.05 * 0.9 ** (jnp.asarray(step, jnp.float32) // 2)


@functools.cache
def built(name: str, problem: str = "convex", layout: Layout = Layout()) -> Built:  # noqa: B008
    """One of `CASES`, with `learning_rate`."""
    return on_placement(CASES[name], problem, placed(layout))


def on_placement(case: Case, problem: str, placement: Placement) -> Built:
    """As `built`, not kept."""
    traces = []
    # Fully connected: any graph is one of its parts. An MLP's steps compile slowly.
    topology = "fully_connected" if problem == "convex" else "ring"
    algorithm = make(case, problem, placement, learning_rate, topology)

    def step(state, batch, network, key):
        traces.append(None)
        return algorithm.step(state, batch, network, key)

    def quickly(function):
        return jax.jit(
            function, out_shardings=placement.sharding, compiler_options=QUICKLY
        )

    return Built(
        algorithm, quickly(step), quickly(algorithm.aligned), placement, traces
    )


def links(
    topology: str = "ring",
    mixing: str = "uniform",
    faults: Faults = Faults(),  # noqa: B008
    n_agents: int = N_AGENTS,
    **options: Any,
) -> Links:
    """A network by the names of its topology and its weights."""
    return Links(TOPOLOGIES[topology](n_agents, **options), MIXINGS[mixing], faults)


# Long runs ============================================================================

STEPS = 4  # in a round
LONG = 200  # steps


@functools.cache
def _runner(case: Case) -> tuple[Algorithm, Callable]:
    """A case on least squares, and jitted steps of it, which return all x, too."""
    batch = whole_batch(placed(Layout()))

    @jax.jit
    def steps(state, nows, rate, decay):
        # Rates are arguments, so that others are the same program.
        algorithm = with_schedule(
            lambda t: rate / (1 + decay * jnp.asarray(t, jnp.float32))
        )

        def step(state, now):
            network, key = now
            state, _ = algorithm.step(state, batch, network, key)
            return state, algorithm.variables(state)["params"]["x"]

        return jax.lax.scan(step, state, nows)

    def with_schedule(schedule) -> Algorithm:
        return make(case, "convex", placed(Layout()), schedule)

    return with_schedule(lambda t: 0.0), steps


def trajectory(
    case: Case,
    links: Links,
    n_steps: int,
    rate: float,
    decay: float = 0.0,
    start: np.ndarray = START,
) -> np.ndarray:
    """Runs an algorithm on least squares; every step sees everybody's examples.

    Args:
        case: the algorithm.
        links: the network; a round, of `STEPS`, begins with a communication.
        n_steps: as many rounds as it takes.
        rate: the learning rate of the first step.
        decay: d, if that of step t is rate / (1 + d t).
        start: x `[agents, dim]`.

    Returns:
        x `[steps + 1, agents, dim]`: at the start, and after every step.
    """
    algorithm, steps = _runner(case)
    state = algorithm.init(placed(Layout()).put(convex_variables(start)))
    path, done, stacked = [np.asarray(start, np.float32)[None]], 0, {}
    keys = jax.random.split(KEY, (n_steps, 2))
    while done < n_steps:
        number = 1 + done // STEPS
        network = links.at_round(number, N_AGENTS)
        state, _ = algorithm.communicate(state, MergeData(), network, keys[done, 1])
        # Where nothing happens between rounds, many of their steps are one program.
        rounds = case.communicates or case.per_step == "dsgt" and links.faults.any
        size = STEPS if rounds or n_steps < LONG else LONG
        networks = [
            links.at_step(time, 1 + time // STEPS, N_AGENTS)
            for time in range(done, done + size)
        ]
        same = tuple(map(id, networks))
        if same not in stacked:
            # With the networks, so that others do not get their ids.
            stacked[same] = networks, jax.tree.map(lambda *x: np.stack(x), *networks)
        now = stacked[same][1], keys[done : done + size, 0]
        state, x = steps(state, now, rate, decay)
        path.append(x)
        done += size
    return np.concatenate(path)
