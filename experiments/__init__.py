"""Programs for `python -m experiments.NAME`, which do what `dimat NAME` does."""

import sys

from dimat_jax import _signals

# Python sets this argument while it looks for the program. A signal within the seconds
# in which the program imports JAX then ends it without a traceback.
if sys.argv[0] == "-m":
    _signals.end_at_once()
