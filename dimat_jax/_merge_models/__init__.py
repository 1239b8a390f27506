"""Merges models that were trained apart, and looks along the lines between them."""

from dimat_jax._merge_models._options import Options, option_of
from dimat_jax._merge_models._run import run

__all__ = ["Options", "option_of", "run"]
