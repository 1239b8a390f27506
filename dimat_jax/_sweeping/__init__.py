"""Runs the configs of a sweep: one after the other, side by side, or on Slurm."""

from dimat_jax._sweeping._estimate import describe
from dimat_jax._sweeping._local import run_here, run_side_by_side
from dimat_jax._sweeping._plan import Job, check_here, prepare
from dimat_jax._sweeping._shares import Share, share_out
from dimat_jax._sweeping._slurm import make_executor, parse_options, run_on_slurm
from dimat_jax._sweeping._timing import CALIBRATION_STEPS, StepTime, Timing, seconds_of

__all__ = [
    "CALIBRATION_STEPS",
    "Job",
    "Share",
    "StepTime",
    "Timing",
    "check_here",
    "describe",
    "make_executor",
    "parse_options",
    "prepare",
    "run_here",
    "run_on_slurm",
    "run_side_by_side",
    "seconds_of",
    "share_out",
]
