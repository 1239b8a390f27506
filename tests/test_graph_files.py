"""Graphs from lists of edges and from GraphML."""

import networkx as nx
import numpy as np
import pytest

from dimat_jax.mixing import from_file, metropolis_hastings
from dimat_jax.topology import TOPOLOGIES, TopologyError, from_graph

PATH = from_graph(nx.path_graph(4))


def read(file, n_agents: int = 4) -> np.ndarray:
    (adjacency,) = TOPOLOGIES["file"](n_agents, file=file)
    return adjacency


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("numbers.txt", "# a path\n0 1\n1 2\n\n2 3  # the last one\n"),
        ("from_one.edges", "1 2\n3 4\n3 2\n"),
        ("both_ways.edgelist", "0 1\n1 0\n1 2\n2 1\n2 3\n3 2\n"),
        ("as_networkx_writes.edgelist", "0 1 {}\n1 2 {}\n2 3 {}\n"),
        ("titles.csv", "Source,Target,Weight\n0,1,0.5\n2,1,0.25\n2,3,0.5\n"),
        ("words.csv", "north,east\neast,south\nsouth,west\n"),
        ("marked.csv", "\ufeffb;a\na;d\nd;c\n"),
        ("tens.txt", "10 20\n20 30\n100 30\n"),
    ],
)
def test_a_list_of_edges_is_an_undirected_graph(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    np.testing.assert_array_equal(read(tmp_path / name), PATH)


def test_an_agent_without_an_edge_may_be_missing_if_names_are_numbers(tmp_path):
    (tmp_path / "pair.txt").write_text("0 2\n")
    assert np.argwhere(read(tmp_path / "pair.txt")).tolist() == [[0, 2], [2, 0]]


@pytest.mark.parametrize("create_using", [nx.Graph, nx.DiGraph])
def test_graphml_is_what_networkx_has_written(tmp_path, create_using):
    graph = nx.gnp_random_graph(7, 0.4, seed=1, directed=create_using is nx.DiGraph)
    names = {node: f"city {node}" for node in graph}
    for number, (start, end) in enumerate(graph.edges):
        graph.edges[start, end]["length"] = number
    nx.write_graphml(nx.relabel_nodes(graph, names), tmp_path / "g.graphml")
    np.testing.assert_array_equal(read(tmp_path / "g.graphml", 7), from_graph(graph))


def test_numbers_in_graphml_are_the_agents_numbers(tmp_path):
    graph = nx.Graph([(2, 0), (0, 3), (3, 1)])
    nx.write_graphml(graph, tmp_path / "g.graphml")
    expected = from_graph(nx.relabel_nodes(nx.path_graph(4), dict(enumerate("2031"))))
    order = [list("2031").index(str(agent)) for agent in range(4)]
    np.testing.assert_array_equal(
        read(tmp_path / "g.graphml"), expected[np.ix_(order, order)]
    )


def test_weights_make_a_mixing_matrix(tmp_path):
    adjacency = from_graph(nx.star_graph(4))
    W = metropolis_hastings(adjacency)
    lines = [f"{i},{j},{W[i, j]}" for i, j in zip(*np.nonzero(adjacency), strict=True)]
    (tmp_path / "star.csv").write_text("\n".join(lines))
    graph = nx.Graph()
    edges = nx.star_graph(4).edges
    graph.add_weighted_edges_from((i, j, float(W[i, j])) for i, j in edges)
    nx.write_graphml(graph, tmp_path / "star.graphml")
    for name in ("star.csv", "star.graphml"):
        np.testing.assert_array_equal(read(tmp_path / name, 5), adjacency)
        found = from_file(adjacency, file=str(tmp_path / name))
        np.testing.assert_allclose(found, W, rtol=1e-12)
    (tmp_path / "bare.txt").write_text("0 1\n1 2\n2 3\n")
    with pytest.raises(TopologyError, match="has no weight for the edge 0 - 1; a mixi"):
        from_file(PATH, file=str(tmp_path / "bare.txt"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("g.txt", "0 1\n2\n", "line 2 is '2'; expected two agents and maybe a weight"),
        ("g.txt", "0 1 2 3\n", "line 1 is '0 1 2 3'; expected two agents"),
        ("g.txt", "0 1 heavy\n", "line 1 has the weight 'heavy'"),
        ("g.txt", "0 1 nan\n", "the edge 0 - 1 has the weight nan"),
        ("g.txt", "0 1 0\n", "the edge 0 - 1 has the weight 0"),
        ("g.txt", "0 1 0.5\n1 0 0.4\n", "has two different weights"),
        ("g.txt", "0 0\n", "the edge 0 - 0 leads from an agent to itself"),
        ("g.txt", "0 1\n1 7\n", "holds a graph of 3 agents; expected 4"),
        ("g.csv", "a,b\nb,c\nc,d\nd,e\n", "holds a graph of 5 agents; expected 4"),
        ("g.csv", "a,b\n01,1\n", "holds a graph of 4 agents; expected 3"),
        ("g.txt", "\x00\xff", "g.txt cannot be used"),
        ("g.graphml", "<graphml", "g.graphml cannot be used"),
        ("g.graphml", "<html/>", "g.graphml cannot be used"),
    ],
)
def test_a_file_that_holds_no_such_graph_says_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(TopologyError, match=message):
        read(tmp_path / name, 3 if "01" in content else 4)


def test_a_missing_file_says_so(tmp_path):
    for name in ("g.txt", "g.graphml"):
        with pytest.raises(TopologyError, match="there is no file"):
            read(tmp_path / name)
