"""A package beside dimat_jax, with a data set, a model and other things of its own."""

from . import algorithm, callback, data, models, topology

__all__ = ["algorithm", "callback", "data", "models", "topology"]
