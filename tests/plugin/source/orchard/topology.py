"""A graph: a ring with chords."""

import numpy as np

from dimat_jax.options import Option, Record
from dimat_jax.topology import TOPOLOGIES, ring

CHORD = Option("orchard.chord", 2, "How far a chord reaches.", at_least=1)


def garland(n_agents: int, chord: int = CHORD.default):
    """A ring, and edges to the agents that are `chord` further along it."""
    agents = np.arange(n_agents)
    edges = ring(n_agents)
    for to in (agents + chord, agents - chord):
        edges[agents, to % n_agents] |= to % n_agents != agents
    return edges


TOPOLOGIES.add(Record("garland", garland, (CHORD,)))
