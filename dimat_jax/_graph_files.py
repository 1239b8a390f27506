"""Graphs in files: matrices (.json, .npy), lists of edges, and GraphML."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import networkx as nx
import numpy as np

from dimat_jax._connectivity import Adjacency, Schedule
from dimat_jax._folders import map_array, parse_json
from dimat_jax.errors import UserError, reading

__all__ = ["TopologyError", "read_edges", "read_matrix"]

# Files with a matrix, with a list of edges, and all others that can be read.
_MATRICES = (".json", ".npy")
_LISTS = (".txt", ".edges", ".edgelist", ".csv")
_ALL = (*_MATRICES, *_LISTS, ".graphml")
# The words of a first line that names the columns of a list.
_TITLES = {"source", "target", "from", "to", "weight"}


class TopologyError(UserError):
    """A graph cannot be built, or it does not fit its use. The message says why."""


class _Edge(NamedTuple):
    """An edge of a file: `sender` sends to `receiver`. The weight may be missing."""

    sender: str
    receiver: str
    weight: float | None


def read_edges(file: str | os.PathLike[str], n_agents: int) -> Adjacency | Schedule:
    """Reads a graph's edges: bool `[agents, agents]`, or a stack of them.

    In a matrix every entry off the diagonal that is not 0 is an edge.

    A list of edges (.txt, .edges, .edgelist, .csv) has two names in a line, with spaces
    or a comma between them, and maybe a weight. Each edge leads in both directions. A
    line that begins with # is a comment, and a first line of titles is left out. The
    edges of GraphML (.graphml) are directed if it says so.

    If all names are whole numbers below the number of agents, they are the agents'
    numbers, and an agent without an edge may be missing. Other whole numbers stand for
    the agents in ascending order, and other names in the order in which the file has
    them first.

    Args:
        file: the file.
        n_agents: the number of agents.

    Raises:
        TopologyError: the file cannot be read, or has another number of agents.
    """
    path = _known(file)
    if path.suffix in _MATRICES:
        edges = read_matrix(path, n_agents) != 0
        return edges & ~np.eye(n_agents, dtype=bool)
    agent_of, found = _graph(path, n_agents)
    edges = np.zeros((n_agents, n_agents), bool)
    for edge in found:
        edges[agent_of[edge.receiver], agent_of[edge.sender]] = True
    return edges


def read_matrix(file: str | os.PathLike[str], n_agents: int) -> np.ndarray:
    """Reads a matrix `[agents, agents]`, or a stack of them.

    If the file holds edges, their weights are the entries off the diagonal, and the
    diagonal is what is left to the sum 1 of each row. Agents are as in `read_edges`.

    Raises:
        TopologyError: the file cannot be read, holds something else, or its matrix has
            another number of agents.
    """
    path = _known(file)
    if path.suffix not in _MATRICES:
        return _weights(path, n_agents)
    # Of an .npy file only the header is read, until the shape is known to be right.
    is_json = path.suffix == ".json"
    matrix = _parse(path) if is_json else map_array(path, TopologyError)
    fits = matrix.ndim in (2, 3) and matrix.shape[-2:] == (n_agents, n_agents)
    if not fits or not matrix.size:
        raise TopologyError(
            f"{path} holds an array of shape {list(matrix.shape)}; expected "
            f"[{n_agents}, {n_agents}], or a stack of such"
        )
    matrix = np.array(matrix)
    if matrix.dtype.kind not in "biuf" or not np.isfinite(matrix).all():
        raise TopologyError(f"{path} holds entries that are no finite numbers")
    return matrix


def _known(file: str | os.PathLike[str]) -> Path:
    path = Path(file)
    if path.suffix not in _ALL:
        raise TopologyError(
            f"expected a file of one of the kinds {', '.join(_ALL)}, got {str(path)!r}"
        )
    return path


def _parse(file: Path) -> np.ndarray:
    """Reads a matrix, or a stack of matrices, from a JSON file."""
    with reading(file, TopologyError):
        content = parse_json(_existing(file).read_bytes())
        try:
            return np.array(content, np.float64)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(
                "it holds no matrix of numbers, all rows of one length"
            ) from error


def _weights(path: Path, n_agents: int) -> np.ndarray:
    """Makes the mixing matrix of a file with weighted edges, float64."""
    agent_of, found = _graph(path, n_agents)
    W = np.zeros((n_agents, n_agents))
    for sender, receiver, weight in found:
        if weight is None:
            raise TopologyError(
                f"{path} has no weight for the edge {sender} - {receiver}; a mixing "
                "matrix needs a weight for each edge. Choose a mixing rule for a file "
                "without weights"
            )
        W[agent_of[receiver], agent_of[sender]] = weight
    np.fill_diagonal(W, 1 - W.sum(axis=1))
    return W


def _graph(path: Path, n_agents: int) -> tuple[dict[str, int], list[_Edge]]:
    """Reads a file with edges.

    Returns:
        the agents' numbers by their names, and all edges, each direction by itself.
    """
    with reading(path, TopologyError):
        _existing(path)
        names: dict[str, None] = {}
        if path.suffix == ".graphml":
            graph = nx.read_graphml(path)
            names |= dict.fromkeys(map(str, graph.nodes))
            edges = list(_of_graph(graph))
        else:
            edges = list(_of_list(path.read_text("utf-8-sig").splitlines()))
        names |= dict.fromkeys(name for edge in edges for name in edge[:2])
        _check(edges)
    return _agents(path, list(names), n_agents), edges


def _of_graph(graph: nx.Graph) -> Iterator[_Edge]:
    for sender, receiver, weight in graph.edges(data="weight"):
        weight = None if weight is None else float(weight)
        yield _Edge(str(sender), str(receiver), weight)
        if not graph.is_directed():
            yield _Edge(str(receiver), str(sender), weight)


def _of_list(lines: Iterable[str]) -> Iterator[_Edge]:
    is_first = True
    for number, line in enumerate(lines, 1):
        parts = line.partition("#")[0].replace(",", " ").replace(";", " ").split()
        # networkx writes an empty dict for an edge without attributes.
        parts = parts[:2] if parts[2:] == ["{}"] else parts
        if not parts or is_first and {part.lower() for part in parts} <= _TITLES:
            continue
        is_first = False
        if len(parts) not in (2, 3):
            raise ValueError(
                f"line {number} is {line!r}; expected two agents and maybe a weight"
            )
        try:
            weight = float(parts[2]) if len(parts) == 3 else None
        except ValueError:
            raise ValueError(f"line {number} has the weight {parts[2]!r}") from None
        yield _Edge(parts[0], parts[1], weight)
        yield _Edge(parts[1], parts[0], weight)


def _check(edges: Iterable[_Edge]) -> None:
    """Refuses edges that mean nothing, or two different things."""
    seen: dict[tuple[str, str], float | None] = {}
    for sender, receiver, weight in edges:
        where = f"the edge {sender} - {receiver}"
        if sender == receiver:
            raise ValueError(f"{where} leads from an agent to itself")
        if weight is not None and (weight == 0 or not np.isfinite(weight)):
            raise ValueError(f"{where} has the weight {weight:g}")
        if seen.setdefault((sender, receiver), weight) != weight:
            raise ValueError(f"{where} has two different weights")


def _agents(path: Path, names: list[str], n_agents: int) -> dict[str, int]:
    """Returns the agents' numbers by their names."""
    numbers = {name: int(name) for name in names if name.isdecimal()}
    are_numbers = len(set(numbers.values())) == len(names)
    if are_numbers and all(number < n_agents for number in numbers.values()):
        return numbers
    if len(names) != n_agents:
        raise TopologyError(
            f"{path} holds a graph of {len(names)} agents; expected {n_agents}"
        )
    ordered = sorted(names, key=numbers.__getitem__) if are_numbers else names
    return {name: agent for agent, name in enumerate(ordered)}


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    return file
