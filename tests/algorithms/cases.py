"""Cases to test: every algorithm with its own optimizer and with Adam, and variants.

A built algorithm is kept, so that its programs compile once for all tests that use it.
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
    Task,
    algorithm_record,
)
from dimat_jax.algorithms.base import State
from dimat_jax.algorithms.server import SERVER_OPTIMIZERS
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
# The algorithms with a server.
SERVED = {"fedavg", "fedprox", "scaffold"}


class Case(NamedTuple):
    """An algorithm with its options.

    Attributes:
        name: the algorithm's name.
        optimizer: the local optimizer's name; "" stands for the algorithm's own.
        compressor: the compressor's name; "" stands for the algorithm's own.
        options: the algorithm's options that are not their defaults. Algorithms that
            merge keep their optimizers' state unless an option says otherwise.
        inner: the algorithm that runs between merges.
        examples: the number of each agent's examples; () if all have equally many.
        changing: whether the network may change.
        of_optimizer: the optimizer's options that are not their defaults.
        server: the name of the server's optimizer; "" stands for the average.
    """

    name: str
    optimizer: str = ""
    compressor: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    inner: str = "local"
    examples: tuple[int, ...] = ()
    changing: bool = True
    of_optimizer: tuple[tuple[str, Any], ...] = ()
    server: str = ""

    @property
    def record(self) -> AlgorithmRecord:
        return algorithm_record(self.name, self.inner)

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
        """The name of the algorithm that runs with every step."""
        if self.name == "centralized" or self.served:
            return "local"
        return self.inner if self.merging else self.name

    @property
    def communicates(self) -> bool:
        """Whether the algorithm communicates once a round if all agents are present."""
        return self.merging or self.served

    @property
    def served(self) -> bool:
        """Whether the agents have a server, and no graph."""
        return self.name in SERVED

    def accepts(self, links: Links) -> bool:
        """Whether the algorithm's theory covers the network."""
        try:
            self.record.check_network(links, **self.arguments)
        except NetworkError:
            return False
        return True


def case_of(name: str, *, optimizer: str = "", compressor: str = "", **options) -> Case:
    """Makes a case with options by keyword."""
    return Case(name, optimizer, compressor, tuple(options.items()))


CASES: dict[str, Case] = {
    **{name: Case(name) for name in ALGORITHMS},
    **{
        f"{name} with adam": Case(name, "adam")
        for name, found in ALGORITHMS.items()
        if found.other_optimizers and found.optimizer != "adam"
    },
    "cdsgd, adapt then combine": case_of("cdsgd", order="adapt_then_combine"),
    "fedavg, adagrad": Case("fedavg", server="adagrad"),
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
    """The devices on which agents live: the arguments of `place`."""

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
        step: the jitted step of the algorithm.
        aligned: the jitted `aligned` of the algorithm.
        placement: the devices on which the agents live.
        traces: a list with one entry for every trace of the step.
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
        """Returns the agents' variables, on the host."""
        return self.placement.gather(self.algorithm.variables(state))


def optimizer_name(case: Case) -> str:
    """Returns the name of a case's local optimizer."""
    return case.optimizer or case.record.optimizer


def compressor_name(case: Case) -> str:
    """Returns the name of a case's compressor."""
    return case.compressor or case.record.compressor or "none"


def make(
    case: Case,
    problem: str,
    placement: Placement,
    schedule: Any,
    topology: str = "fully_connected",
    task: Task | None = None,
) -> Algorithm:
    """Builds a case on a problem, for graphs that are parts of a topology.

    A task replaces the problem's own.
    """
    tx = OPTIMIZERS[optimizer_name(case)](schedule, **dict(case.of_optimizer))
    edges = TOPOLOGIES[topology](placement.n_agents)
    facts = {
        "compressor": COMPRESSORS[compressor_name(case)](),
        "adjacency": edges,
        "lossy_edges": edges if case.changing else None,
        # On other graphs agents give their neighbours less weight.
        "mixing_matrix": MIXINGS["uniform"](edges),
        "examples": case.examples or None,
        "server": SERVER_OPTIMIZERS[case.server or "average"](),
    }
    return case.record(
        task or PROBLEMS[problem].task,
        tx,
        placement,
        **case.arguments,
        **{name: facts[name] for name in case.record.facts},
    )


# The programs are small and run a few times, so most of the time is for compiling.
QUICKLY = {"xla_backend_optimization_level": 0}


def learning_rate(step):
    """A learning rate that falls with every second step."""
    return 0.05 * 0.9 ** (jnp.asarray(step, jnp.float32) // 2)


@functools.cache
def built(name: str, problem: str = "convex", layout: Layout = Layout()) -> Built:  # noqa: B008
    """Returns one of `CASES` with `learning_rate`, built once and kept."""
    return on_placement(CASES[name], problem, placed(layout))


def on_placement(case: Case, problem: str, placement: Placement) -> Built:
    """Builds the same as `built` anew."""
    traces = []
    # Any graph is a part of the fully connected one. An MLP's steps compile slowly, so
    # they are built for a smaller graph.
    topology = "fully_connected" if problem == "convex" else "ring"
    algorithm = make(case, problem, placement, learning_rate, topology)

    def step(state, batch, network, key):
        traces.append(None)
        return algorithm.step(state, batch, network, key)

    def quickly(function):
        return placement.jit(
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
    """Makes a network from the names of its topology and its mixing rule."""
    return Links(TOPOLOGIES[topology](n_agents, **options), MIXINGS[mixing], faults)


# Long runs ============================================================================

STEPS = 4  # in a round
LONG = 200  # steps


@functools.cache
def _runner(case: Case) -> tuple[Algorithm, Callable]:
    """Builds a case on least squares, and jitted steps of it that also return all x."""
    batch = whole_batch(placed(Layout()))

    @jax.jit
    def steps(state, nows, rate, decay):
        # Rates are arguments, so that one program serves for all of them.
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
    """Runs an algorithm on least squares; a step sees all examples of all agents.

    Args:
        case: the algorithm.
        links: the network. A round has `STEPS` steps, and begins with a communication.
        n_steps: the least number of steps. The run ends with a whole round.
        rate: the learning rate of the first step.
        decay: the number d in the learning rate rate / (1 + d t) of step t.
        start: the agents' x at the start, `[agents, dim]`.

    Returns:
        the agents' x at the start and after every step, `[steps + 1, agents, dim]`.
    """
    algorithm, steps = _runner(case)
    state = algorithm.init(placed(Layout()).put(convex_variables(start)))
    path, done, stacked = [np.asarray(start, np.float32)[None]], 0, {}
    keys = jax.random.split(KEY, (n_steps, 2))
    while done < n_steps:
        number = 1 + done // STEPS
        network = links.at_round(number, N_AGENTS)
        state, _ = algorithm.communicate(state, MergeData(), network, keys[done, 1])
        # If nothing happens between rounds, steps of many rounds are one program.
        rounds = case.communicates or case.per_step == "dsgt" and links.faults.any
        size = STEPS if rounds or n_steps < LONG else LONG
        networks = [
            links.at_step(time, 1 + time // STEPS, N_AGENTS)
            for time in range(done, done + size)
        ]
        same = tuple(map(id, networks))
        if same not in stacked:
            # The networks are kept too, so that no other network gets the same id.
            stacked[same] = networks, jax.tree.map(lambda *x: np.stack(x), *networks)
        now = stacked[same][1], keys[done : done + size, 0]
        state, x = steps(state, now, rate, decay)
        path.append(x)
        done += size
    return np.concatenate(path)
