"""Graphs that change over time, in which an agent has few neighbours at a time."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float

from dimat_jax.options import Option

__all__ = ["PEERS", "PERIOD", "finite_time_weights", "random_receivers"]

Weights = Float[np.ndarray, "period agents agents"]

PEERS = Option(
    "graph.peers",
    1,
    "The number of agents that an agent sends to at a time, or at most sends to "
    "(base_k_plus_1). If there are fewer others, it sends to all of them.",
    at_least=1,
    unit="agents",
)
PERIOD = Option(
    "graph.period",
    16,
    "The number of times for which random peers are drawn. Then the same peers come "
    "again, in the same order.",
    at_least=1,
)


def random_receivers(
    n_agents: int, peers: int, period: int, seed: int
) -> Bool[np.ndarray, "period agents agents"]:
    """Draws for every time and every sender the agents that receive from it."""
    rng, peers = np.random.default_rng(seed), min(peers, n_agents - 1)
    receives = np.zeros((period, n_agents, n_agents), bool)
    for graph in receives:
        for sender in range(n_agents):
            # The sender itself is left out: the numbers above its own move up by one.
            chosen = rng.choice(n_agents - 1, peers, replace=False) if peers else []
            receivers = np.asarray(chosen, int)
            graph[receivers + (receivers >= sender), sender] = True
    return receives


# Finite-time consensus ================================================================


def finite_time_weights(n_agents: int, peers: int) -> Weights:
    """Returns weights whose product over the period is 1/n everywhere, float64.

    They are symmetric and doubly stochastic at all times, and no agent has more than
    k = `peers` neighbours at a time: the Base-(k+1) Graph (Takezawa et al. 2023, arXiv
    2305.11420, Algorithm 3), which is the shorter one of two.

    - The Simple Base-(k+1) Graph of all agents; see `_simple`.
    - n is a product p q, where q has no prime factor up to k + 1. The simple graphs of
      p groups of q agents run side by side. Then agents of the same place in all groups
      average, along the graph of `_averages`.
    """
    agents = np.arange(n_agents)
    simple = _simple(agents, peers)
    groups = int(np.prod(_factors(n_agents, peers + 1) or [1]))
    if 1 < groups:
        of_group = [_simple(group, peers) for group in np.split(agents, groups)]
        places = agents.reshape(groups, -1).T
        across = [_averages(place, peers) for place in places]
        combined = [*_beside(of_group), *_beside(across)]
        simple = min(combined, simple, key=len)
    weights = np.tile(np.eye(n_agents), (max(len(simple), 1), 1, 1))
    for matrix, links in zip(weights, simple, strict=False):
        for one, other, weight in links:
            matrix[one, other] = matrix[other, one] = weight
        np.fill_diagonal(matrix, 1 - (matrix.sum(axis=1) - np.diag(matrix)))
    return weights


Link = tuple[int, int, float]
"""Two agents, and the weight that each gives the other."""


def _factors(n: int, largest: int) -> list[int]:
    """Returns the prime factors of n that are not above `largest`, as often as in n."""
    found = []
    for factor in range(2, largest + 1):
        while n % factor == 0:
            found.append(factor)
            n //= factor
    return found


def _radices(n: int, peers: int) -> list[int] | None:
    """Writes n as the shortest product of numbers up to k + 1; None if none exists."""
    if n == 1:
        return []
    best = None
    for radix in range(min(peers + 1, n), 1, -1):
        rest = _radices(n // radix, peers) if n % radix == 0 else None
        if rest is not None and (best is None or len(rest) + 1 < len(best)):
            best = [radix, *rest]
    return best


def _averages(agents: np.ndarray, peers: int) -> list[list[Link]]:
    """The k-peer HyperHypercube Graph: agents average digit by digit (Algorithm 1).

    The numbers of the agents have a digit for each factor of their count. All agents
    whose numbers differ in one digit only average, then the same for the next digit.
    The count has no prime factor above k + 1.
    """
    radices = _radices(len(agents), peers)
    assert radices is not None
    grid, steps = agents.reshape(radices), []
    for axis, radix in enumerate(radices):
        lines = np.moveaxis(grid, axis, -1).reshape(-1, radix)
        steps.append(
            [
                (int(line[i]), int(line[j]), 1 / radix)
                for line in lines
                for i in range(radix)
                for j in range(i)
            ]
        )
    return steps


def _simple(agents: np.ndarray, peers: int) -> list[list[Link]]:
    """The Simple Base-(k+1) Graph (Algorithm 2).

    The number of agents, written in base k + 1, gives blocks V_1, V_2, ... of a_l
    (k+1)^(p_l) agents, from the largest on.

    1. Every block averages.
    2. Block l gives its average to each agent of the smaller blocks, one block after
       the other. Such an agent takes it from a_l agents of V_l, one in each part of
       (k+1)^(p_l) agents, so that all parts have the mean of all agents in the end.
    3. The parts of block l average, while smaller blocks are in the second step.
    """
    if _radices(len(agents), peers) is not None:
        return _averages(agents, peers)
    blocks = list(_blocks(agents, peers))
    sizes = [block.size for block in blocks]
    first = [_averages(block.ravel(), peers) for block in blocks]
    steps = _beside(first)
    later: list[list[list[Link]]] = []
    for number, block in enumerate(blocks[:-1]):
        smaller = np.concatenate([other.ravel() for other in blocks[number + 1 :]])
        weight = sizes[number] / sum(sizes[number:]) / len(block)
        # Column v of the block gives one agent of each part to the v-th smaller agent.
        given = [
            (int(agent), int(giver), weight)
            for agent, givers in zip(smaller, block.T, strict=False)
            for giver in givers
        ]
        parts = _beside([_averages(part, peers) for part in block])
        later.append([*[[]] * number, given, *parts])
    return [*steps, *_beside(later)]


def _blocks(agents: np.ndarray, peers: int) -> Iterator[np.ndarray]:
    """Yields blocks of agents `[a_l, (k+1)^(p_l)]`, from the largest on."""
    power = 1
    while power * (peers + 1) <= len(agents):
        power *= peers + 1
    while len(agents):
        digit = len(agents) // power
        if digit:
            block, agents = np.split(agents, [digit * power])
            yield block.reshape(digit, power)
        power //= peers + 1


def _beside(graphs: list[list[list[Link]]]) -> list[list[Link]]:
    """Lets graphs of different agents run side by side; the shorter ones end sooner."""
    length = max(map(len, graphs), default=0)
    return [
        [link for graph in graphs if time < len(graph) for link in graph[time]]
        for time in range(length)
    ]
