"""Runs the configs of a sweep: one after the other, side by side, or on Slurm."""

from dimat_jax._sweeping._estimate import describe
from dimat_jax._sweeping._local import run_here, run_side_by_side
from dimat_jax._sweeping._plan import Job, check_here, prepare
from dimat_jax._sweeping._shares import share_out
from dimat_jax._sweeping._slurm import make_executor, parse_options, run_on_slurm

__all__ = [
    "Job",
    "check_here",
    "describe",
    "make_executor",
    "parse_options",
    "prepare",
    "run_here",
    "run_on_slurm",
    "run_side_by_side",
    "share_out",
]
