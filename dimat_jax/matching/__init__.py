"""Finding the permutations that align one network with another."""

from dimat_jax.matching.activation import activation_matching
from dimat_jax.matching.assignment import solve_assignment

__all__ = ["activation_matching", "solve_assignment"]
