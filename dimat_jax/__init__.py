"""Decentralized iterative merging and training of neural networks, in JAX.

Agents live side by side on a leading "agents" axis of every array. They train on their
own data; every few epochs each receives its neighbours' weights, permutes their hidden
units onto its own, and averages (DIMAT, CVPR 2024, arXiv 2404.08079).

The permutation tools (`dimat_jax.permutation`, `dimat_jax.matching`) stand alone: they
take any pytree of weights and know nothing of agents, configs or data sets.
"""

__version__ = "0.1.0"
