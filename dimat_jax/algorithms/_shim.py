from dimat_jax.algorithms._frames import FRAMES
from dimat_jax.options import Option

FRAME = Option(
    "merge.frame", "own", "In whose frame agents meet.", choices=tuple(FRAMES)
)
OPT_STATE = Option(
    "merge.opt_state",
    "reset",
    "What becomes of the optimizer at a merge.",
    choices=("reset", "keep", "merge"),
)
STAY = Option("merge.stay", 0.0, "What a unit must gain to move.", at_least=0)
RESTARTS = Option("merge.restarts", 1, "Starts of weight matching.", at_least=1)
