"""Merges models that were trained apart, and looks along the lines between them."""

from dimat_jax._merge_models._options import OPTIONS, Options
from dimat_jax._merge_models._run import run

__all__ = ["OPTIONS", "Options", "run"]
