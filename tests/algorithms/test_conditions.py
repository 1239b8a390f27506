"""Every algorithm takes the networks that its theory covers, and no others."""

import networkx as nx
import numpy as np
import pytest

from dimat_jax.algorithms import ALGORITHMS, BETWEEN_MERGES, MERGING, algorithm_record
from dimat_jax.algorithms._frames import FRAMES
from dimat_jax.mixing import MIXINGS, MixingError, uniform
from dimat_jax.network import Absence, Faults, Links, NetworkError
from dimat_jax.topology import TOPOLOGIES, from_graph
from tests.algorithms.cases import SERVED, links

ANYWHERE = {"local", "centralized", *SERVED}
BALANCED = {"cdsgd", "cdmsgd", "cdadam", "dsgt", "qgm"}
BOTH_WAYS = {"cga", "compcga"}
SYMMETRIC = {"choco", "d2"}
ON_TREES = {"relaysgd"}
FAULTY = Faults(dropout=0.3, edge_loss=0.3)

CONNECTED = "a connected network, in which information from every agent reaches"
SUMS = "rows and columns sum to 1"
COLUMNS = "without negative weights whose columns sum to 1"
TWO_WAY = "an undirected network: every receiver must be able to answer its sender"
TREE = "a tree: path, star, binary_tree, or another connected graph"
THE_SAME = "the same network at every step"


def test_there_is_a_condition_for_every_algorithm():
    covered = ANYWHERE | BALANCED | BOTH_WAYS | SYMMETRIC | ON_TREES
    assert covered | {"sgp", *MERGING} == set(ALGORITHMS)


def refusal(name: str, network: Links, inner: str = "local", **options) -> str:
    """Returns why an algorithm refuses a network; "" if it takes the network."""
    try:
        algorithm_record(name, inner).check_network(network, **options)
    except NetworkError as error:
        return str(error)
    return ""


def expected(name: str, network: Links) -> str:
    """Finds from a network's matrices alone which condition of the theory fails."""
    matrices, edges = network.mixing_matrix, network.edges
    graph = nx.from_numpy_array(edges.T, create_using=nx.DiGraph)
    columns = np.allclose(matrices.sum(axis=1), 1)
    rows = np.allclose(matrices.sum(axis=2), 1)
    if name in ANYWHERE or name in MERGING:
        return ""
    if name == "d2" and len(matrices) > 1:
        return THE_SAME
    if edges.any() and not nx.is_strongly_connected(graph):
        return CONNECTED
    if name == "sgp":
        return "" if columns and (matrices >= 0).all() else COLUMNS
    one_way = any((W != 0).tolist() != (W != 0).T.tolist() for W in matrices)
    if name in ON_TREES:
        tree = not edges.any() or nx.is_tree(graph.to_undirected())
        return TWO_WAY if one_way else "" if tree else TREE
    if not (rows and columns):
        return SUMS
    if name in BALANCED:
        return ""
    if one_way:
        return TWO_WAY
    if name in BOTH_WAYS:
        return ""
    if not np.allclose(matrices, matrices.swapaxes(1, 2)):
        return "a symmetric mixing matrix"
    least = np.linalg.eigvalsh(matrices[0]).min()
    return "" if name == "choco" or least > -1 / 3 + 1e-6 else "eigenvalues are above"


GRAPHS = {topology: 6 for topology in TOPOLOGIES} | {"hypercube": 4}
del GRAPHS["file"]


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("topology", GRAPHS)
def test_networks_are_taken_or_refused_with_the_reason(topology, mixing):
    try:
        network = links(topology, mixing, n_agents=GRAPHS[topology])
    except MixingError as error:  # no such weights, or no solver for them
        assert mixing in str(error)
        return
    for name in ALGORITHMS:
        found, reason = refusal(name, network), expected(name, network)
        assert bool(found) == bool(reason), (name, found, reason)
        assert reason in found
        assert not found or found.startswith(f"{name} needs")


@pytest.mark.parametrize(
    ("topology", "mixing", "refused"),
    [
        # Under faults, weights of an undirected graph remain doubly stochastic, ...
        ("ring", "uniform", {"d2": THE_SAME, "relaysgd": TREE}),
        ("star", "metropolis_hastings", {"d2": THE_SAME}),
        # ... the columns of a directed one remain at the sum 1, ...
        (
            "exponential",
            "uniform",
            {name: SUMS for name in BALANCED | BOTH_WAYS | {"choco"}}
            | {"d2": THE_SAME, "relaysgd": TWO_WAY},
        ),
        # ... and if only rows sum to 1, only merging algorithms can use the weights.
        (
            "ring",
            "row_stochastic",
            {name: SUMS for name in BALANCED | BOTH_WAYS | {"choco"}}
            | {"d2": THE_SAME, "sgp": COLUMNS, "relaysgd": TREE},
        ),
    ],
)
@pytest.mark.parametrize(
    "faults", [FAULTY, Faults(dropout=0.1), Faults(absences=(Absence(1, 4),))]
)
def test_networks_that_misbehave_have_to_stay_what_they_are(
    topology, mixing, refused, faults
):
    network = links(topology, mixing, faults, n_agents=6)
    for name in ALGORITHMS:
        found = refusal(name, network)
        assert bool(found) == (name in refused), (name, found)
        assert refused.get(name, "") in found


def test_networks_in_parts_are_for_those_who_merge():
    parts = Links(
        from_graph(nx.disjoint_union(nx.path_graph(3), nx.path_graph(2))), uniform
    )
    for name in ALGORITHMS:
        if name in ANYWHERE or name in MERGING:
            assert not refusal(name, parts)
        else:
            assert CONNECTED in refusal(name, parts)
    # It is enough that the edges of all times together are strongly connected. One
    # direction is not enough.
    one_way = from_graph(nx.DiGraph([(0, 1), (1, 2)]))
    assert CONNECTED in refusal("sgp", Links(one_way, MIXINGS["column_stochastic"]))
    parts_in_turn = np.stack([TOPOLOGIES["disconnected"](3), TOPOLOGIES["ring"](3)])
    assert not refusal("cdsgd", Links(parts_in_turn, uniform))


def test_d2_refuses_what_its_theory_does_not_cover():
    ring = "ring", "uniform", Faults(), 4
    assert "but the least is -0.3333; mixing='lazy'" in refusal("d2", links(*ring))
    assert not refusal("d2", links("ring", "lazy", n_agents=4))
    assert THE_SAME in refusal("d2", links("ring", "lazy", Faults(edge_loss=0.1), 4))
    assert THE_SAME in refusal("d2", links("one_peer_exponential", "lazy"))


@pytest.mark.parametrize(
    ("name", "W", "message"),
    [
        ("sgp", [[1.2, -0.2, 0], [-0.2, 0.8, 0.4], [0, 0.4, 0.6]], COLUMNS),
        ("sgp", [[0, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5]], r"but W\[0, 0\] is 0"),
        (
            "choco",
            [[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.3, 0.2, 0.5]],
            "choco needs a symmetric mixing matrix",
        ),
        (
            "wa",
            [[-0.5, 0.0, 0.5], [1.0, 0.5, 0.0], [0.5, 0.5, 0.5]],
            "wa averages what an agent receives, but the weights of agent 0 sum to 0",
        ),
    ],
)
def test_matrices_that_an_algorithm_cannot_use_are_refused(name, W, message):
    W = np.array(W)
    edges = (W != 0) & ~np.eye(3, dtype=bool)
    with pytest.raises(NetworkError, match=message):
        algorithm_record(name).check_network(Links(edges, W))
    algorithm_record(name).check_network(Links(edges | edges.T, uniform))


def test_plain_averaging_is_in_no_frame():
    assert not refusal("wa", links("exponential", n_agents=6))


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("name", [name for name in MERGING if MERGING[name].aligns])
def test_frames_that_agents_share_need_answers(name, frame):
    directed = links("exponential", n_agents=6)
    refused = frame != "own"
    found = refusal(name, directed, frame=frame)
    assert (TWO_WAY in found) == bool(found) == refused
    assert not refused or found.startswith(f"{name} with frame={frame!r}")
    assert not refusal(name, links("ring", faults=FAULTY), frame=frame)


@pytest.mark.parametrize("inner", sorted(BETWEEN_MERGES))
def test_what_agents_do_between_merges_has_its_own_conditions(inner):
    for network in (
        links("ring"),
        links("exponential"),
        links("star", "row_stochastic"),
        links("ring", faults=FAULTY),
    ):
        assert refusal("dimat", network, inner=inner) == refusal(inner, network)


def test_optimizers_are_not_merged_with_negative_weights():
    W = np.array([[1.2, -0.2, 0], [-0.2, 0.8, 0.4], [0, 0.4, 0.6]])
    network = Links((W != 0) & ~np.eye(3, dtype=bool), W)
    message = refusal("dimat", network, opt_state="merge")
    assert message.startswith("dimat with opt_state='merge' needs")
    assert not refusal("dimat", network, opt_state="keep")
