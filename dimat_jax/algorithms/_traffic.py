"""What matching sends beyond the weights that are mixed, in bytes for every link.

Nothing in agents' own frames: a receiver has the weights, and examples to run them on.
Frames that several agents share have to be agreed upon. (With compressed messages, who
has missed some would have to be told how frames have changed, too. That is left out.)
"""

import networkx as nx
import numpy as np
from jaxtyping import Int

from dimat_jax.algorithms._edges import Edges
from dimat_jax.algorithms._frames import spanning_forest
from dimat_jax.topology import Adjacency

__all__ = ["matching_bytes"]


def matching_bytes(
    frame: str,
    active_edges: Adjacency,
    *,
    pairs: Edges,
    perms: int,
    scores: int,
    weights: int,
) -> Int[np.ndarray, "agents agents"]:
    """Bytes of one merge's matching, `[receiver, sender]`.

    "reference": a parent in the spanning tree tells its child how to permute into the
    root's frame; everyone passes that on to its neighbours, who hold its weights as
    they were. "joint": what the permutations are found from goes up the tree to its
    root, hop by hop, and the permutations come back, and go to the neighbours.

    Args:
        frame: a key of `MEETINGS`.
        active_edges: who hears whom, undirected.
        pairs: (receiver, sender)s that are matched.
        perms: bytes of one agent's permutations.
        scores: bytes of the scores of one pair, which its receiver has; 0 where the
            weights are what is matched.
        weights: bytes of one agent's params.
    """
    traffic = np.zeros(active_edges.shape, np.int64)
    if frame == "own":
        return traffic
    tree = spanning_forest(active_edges)
    for parent, child in tree:
        traffic[child, parent] += perms
    traffic += perms * active_edges.astype(np.int64)
    if frame == "reference":
        return traffic
    up = {child: parent for parent, child in tree}
    evidence = np.zeros(len(active_edges), np.int64)
    if scores:
        np.add.at(evidence, pairs[:, 0], scores)
    else:
        evidence[list(nx.from_edgelist(tree).nodes)] = weights
    for agent, sent in enumerate(evidence):
        hop, first = agent, True
        while hop in up:
            # A parent has its child's weights already: to merge with.
            if scores or not first:
                traffic[up[hop], hop] += sent
            # Its permutations come back; the last hop of them is counted above.
            if not first:
                traffic[hop, up[hop]] += perms
            hop, first = up[hop], False
    return traffic
