"""Finding the permutations that align one network with another, or several."""

from dimat_jax._lazy import public_names
from dimat_jax.matching._activation import activation_matching
from dimat_jax.matching._assignment import solve_assignment
from dimat_jax.matching._errors import MatchingError
from dimat_jax.matching._joint import joint_activation_matching, joint_weight_matching
from dimat_jax.matching._weight import weight_matching, weight_similarity

__all__ = [
    "MatchingError",
    "activation_matching",
    "joint_activation_matching",
    "joint_weight_matching",
    "solve_assignment",
    "weight_matching",
    "weight_similarity",
]


def __dir__() -> list[str]:
    return public_names(__name__)
