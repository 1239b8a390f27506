"""Communication graphs, as adjacency matrices.

`adjacency[i, j]` says that agent i receives from agent j. There are no self-loops: an
agent always has its own weights. A topology that changes over time is a stack
`[period, agents, agents]`, whose graphs are used in turn, again and again.

`TOPOLOGIES[name](n_agents)` builds a graph. The records at the foot of this file say
which options each builder reads.
"""

import math
import os
from collections.abc import Callable

import networkx as nx
import numpy as np

from dimat_jax._connectivity import (
    Adjacency,
    Schedule,
    Tree,
    components,
    is_connected,
    is_undirected,
    schedule,
    spanning_trees,
    union,
)
from dimat_jax._graph_files import TopologyError, read_edges, read_matrix
from dimat_jax._peer_graphs import (
    PEERS,
    PERIOD,
    finite_time_weights,
    random_receivers,
)
from dimat_jax.options import SEED, Option, Record, Registry, registry

__all__ = [
    "MATRIX_FILE",
    "TOPOLOGIES",
    "TOPOLOGY",
    "Adjacency",
    "Schedule",
    "TopologyError",
    "Tree",
    "components",
    "from_graph",
    "is_connected",
    "is_undirected",
    "read_matrix",
    "schedule",
    "spanning_trees",
    "union",
]

# A random graph is drawn this many times before the search for a connected one ends.
_DRAWS = 1000

DEGREE = Option(
    "graph.degree",
    0,
    "The number of neighbours that every agent has.",
    at_least=0,
    unit="neighbours",
    empty="the least degree above the ring's: 3, or 4 for an odd number of agents",
)
EDGE_PROBABILITY = Option(
    "graph.edge_probability",
    0.5,
    "The probability that a pair of agents is connected.",
    at_least=0,
    at_most=1,
)
MATRIX_FILE = Option(
    "graph.file",
    "",
    "A file with a matrix [agents, agents] or a stack of them (.json, .npy), with a "
    "list of edges (.txt, .edges, .edgelist, .csv), or GraphML (.graphml). The "
    "topology takes its edges from it, the mixing rule its weights, or both do. Agents "
    "with other names than their numbers are in ascending order if all names are whole "
    "numbers, or else in the order in which the file has them first.",
    names_file=True,
)


def from_graph(graph: nx.Graph) -> Adjacency:
    """Returns the adjacency matrix of any networkx graph, in the order of its nodes.

    In a directed graph the edge u -> v means that u sends to v: `adjacency[v, u]`.
    """
    # NaN marks the pairs without an edge. 0 could not, since an edge may weigh 0.
    matrix = ~np.isnan(nx.to_numpy_array(graph, nonedge=np.nan)).T
    np.fill_diagonal(matrix, False)
    return matrix


def fully_connected(n_agents: int) -> Adjacency:
    """Every agent is connected with every other agent."""
    # networkx would make an object for each of the millions of edges of many agents.
    return ~np.eye(_at_least_one(n_agents), dtype=bool)


def ring(n_agents: int) -> Adjacency:
    """The agents form a circle, in which each of them has two neighbours."""
    # networkx gives a cycle of one node a self-loop, which `from_graph` drops.
    return from_graph(nx.cycle_graph(_at_least_one(n_agents)))


def path(n_agents: int) -> Adjacency:
    """The agents form a line: a ring that is cut open in one place."""
    return from_graph(nx.path_graph(_at_least_one(n_agents)))


def star(n_agents: int) -> Adjacency:
    """Every agent is connected with agent 0, the hub, and with no other agent."""
    return from_graph(nx.star_graph(_at_least_one(n_agents) - 1))


def binary_tree(n_agents: int) -> Adjacency:
    """Agent i is connected with agents 2 i + 1 and 2 i + 2, its children."""
    return from_graph(nx.full_rary_tree(2, _at_least_one(n_agents)))


def bipartite(n_agents: int) -> Adjacency:
    """Every agent is connected with two hubs, 0 and 1; the hubs are not connected."""
    hubs = min(2, _at_least_one(n_agents) - 1)
    return from_graph(nx.complete_bipartite_graph(hubs, n_agents - hubs))


def torus(n_agents: int) -> Adjacency:
    """The agents form a grid whose opposite sides are connected.

    The grid is as square as possible. For a prime number of agents it is a ring.
    """
    rows = next(
        rows
        for rows in range(math.isqrt(_at_least_one(n_agents)), 0, -1)
        if n_agents % rows == 0
    )
    return from_graph(nx.grid_2d_graph(rows, n_agents // rows, periodic=True))


def hypercube(n_agents: int) -> Adjacency:
    """Two agents are connected if their numbers differ in exactly one bit.

    Raises:
        TopologyError: the number of agents is not a power of two.
    """
    dimensions = _at_least_one(n_agents).bit_length() - 1
    if n_agents != 2**dimensions:
        raise TopologyError(
            f"a hypercube has 1, 2, 4, 8, ... agents, but there are {n_agents}"
        )
    agents = np.arange(n_agents)
    differing = agents[:, None] ^ agents
    return np.isin(differing, 2 ** np.arange(dimensions))


def exponential(n_agents: int) -> Adjacency:
    """Agent j sends to the agents j + 1, j + 2, j + 4, ... (modulo n).

    The graph is directed. Each agent has about log2(n) neighbours, and the spectral gap
    hardly shrinks as n grows (Assran et al. 2019; Ying et al. 2021, arXiv 2110.13363).
    """
    return union(one_peer_exponential(n_agents))


def one_peer_exponential(n_agents: int) -> Schedule:
    """Agent j sends to agent j + 1 first, then to j + 2, then to j + 4, ... (modulo n).

    The graph is directed and changes over time. Each agent has one neighbour at a time.
    If n is a power of two, agents that average along it reach exact consensus after one
    period of log2(n) exchanges (Ying et al. 2021).
    """
    agents = np.arange(_at_least_one(n_agents))
    hops = [2**k for k in range(max((n_agents - 1).bit_length(), 1))]
    offset = (agents[:, None] - agents) % n_agents
    return np.stack([(offset == hop % n_agents) & (offset > 0) for hop in hops])


def random_peers(
    n_agents: int,
    *,
    peers: int = PEERS.default,
    period: int = PERIOD.default,
    seed: int = SEED.default,
) -> Schedule:
    """Every agent sends to a few agents at a time, which it draws at random.

    The graph is directed, and drawn anew for every time of the period. An agent sends
    to `peers` agents, all different, but may receive from more, fewer or none. So no
    weights are doubly stochastic: row_stochastic weights are for algorithms that merge,
    and are doubly stochastic in expectation; column_stochastic ones are for sgp. (This
    is EL-Local of epidemic learning, de Vos et al. 2023, arXiv 2310.01972.)

    Raises:
        OptionError: `peers` or `period` is below 1.
    """
    PEERS.check(peers)
    PERIOD.check(period)
    return random_receivers(_at_least_one(n_agents), peers, period, seed)


def base_k_plus_1(n_agents: int, *, peers: int = PEERS.default) -> Schedule:
    """Agents that average along one period of this graph reach exact consensus.

    Each agent has at most k = `peers` neighbours at a time, and the period is at most
    about 2 log_(k+1)(n) + 2 (the Base-(k+1) Graph, Takezawa et al. 2023, arXiv
    2305.11420). It takes the weights `mixing=finite_time`. The graph is undirected.

    Raises:
        OptionError: `peers` is below 1.
    """
    PEERS.check(peers)
    weights = finite_time_weights(_at_least_one(n_agents), peers)
    return (weights > 0) & ~np.eye(n_agents, dtype=bool)


def random_regular(
    n_agents: int, *, degree: int = DEGREE.default, seed: int = SEED.default
) -> Adjacency:
    """A random connected graph, in which every agent has `degree` neighbours.

    A degree of 0 stands for the least degree above the ring's: 3, or 4 for an odd
    number of agents. If there are fewer other agents, all of them are neighbours.

    Raises:
        TopologyError: no connected graph has this degree.
    """
    _at_least_one(n_agents)
    if degree == 0:
        degree = min(3 + n_agents % 2, n_agents - 1)
    possible = 0 <= degree < n_agents and degree * n_agents % 2 == 0
    # A graph of degree 0 is connected for one agent only, and one of degree 1 for two.
    if not possible or degree < min(2, n_agents - 1):
        raise TopologyError(
            f"there is no connected graph of {n_agents} agents with {degree} "
            "neighbours each; the degree must be at least 2, below the number of "
            "agents, and even if that is odd"
        )
    return _connected(lambda s: nx.random_regular_graph(degree, n_agents, s), seed)


def erdos_renyi(
    n_agents: int,
    *,
    edge_probability: float = EDGE_PROBABILITY.default,
    seed: int = SEED.default,
) -> Adjacency:
    """A random connected graph, in which all edges have the same probability.

    Graphs are drawn until one of them is connected.

    Raises:
        OptionError: `edge_probability` is not between 0 and 1.
        TopologyError: the probability is too small to find a connected graph.
    """
    EDGE_PROBABILITY.check(edge_probability)
    _at_least_one(n_agents)
    return _connected(
        lambda s: nx.gnp_random_graph(n_agents, edge_probability, s), seed
    )


def disconnected(n_agents: int) -> Adjacency:
    """No agent is connected with any other agent."""
    return from_graph(nx.empty_graph(_at_least_one(n_agents)))


def from_file(
    n_agents: int, *, file: str | os.PathLike[str] = MATRIX_FILE.default
) -> Schedule:
    """Any graph, read from a file with a matrix, a list of edges, or GraphML.

    In a matrix every entry off the diagonal that is not 0 is an edge. A stack of
    matrices is a graph that changes over time. In a list of edges every line is a pair
    of agents, which send to each other.

    Raises:
        TopologyError: the file cannot be read, or has another number of agents.
    """
    return schedule(read_edges(file, n_agents))


def _at_least_one(n_agents: int) -> int:
    if n_agents < 1:
        raise TopologyError(f"expected at least 1 agent, got {n_agents}")
    return n_agents


def _connected(draw: Callable[[int], nx.Graph], seed: int) -> Adjacency:
    rng = np.random.default_rng(seed)
    for _ in range(_DRAWS):
        adjacency = from_graph(draw(int(rng.integers(2**31))))
        if is_connected(adjacency):
            return adjacency
    raise TopologyError(
        f"{_DRAWS} random graphs in a row were not connected; ask for more edges"
    )


TOPOLOGIES: Registry[Record[Adjacency | Schedule]] = registry(
    Record("fully_connected", fully_connected),
    Record("ring", ring),
    Record("path", path),
    Record("star", star),
    Record("binary_tree", binary_tree),
    Record("bipartite", bipartite),
    Record("torus", torus),
    Record("hypercube", hypercube),
    Record("exponential", exponential),
    Record("one_peer_exponential", one_peer_exponential),
    Record("base_k_plus_1", base_k_plus_1, (PEERS,)),
    Record("random_peers", random_peers, (PEERS, PERIOD, SEED)),
    Record("random_regular", random_regular, (DEGREE, SEED)),
    Record("erdos_renyi", erdos_renyi, (EDGE_PROBABILITY, SEED)),
    Record("disconnected", disconnected),
    Record("file", from_file, (MATRIX_FILE,)),
)
"""`TOPOLOGIES[name](n_agents, **options)` builds an adjacency matrix, or a schedule."""

TOPOLOGY = Option(
    "topology", "ring", "The graph along which agents send.", choices=TOPOLOGIES
)
