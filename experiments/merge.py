"""Merges models that were trained apart, and looks along the lines between them.

    python -m experiments.merge A B [C ...] --out=DIR

This is `dimat merge`; `--help` says more.
"""

from dimat_jax.cli import _merge, _program

if __name__ == "__main__":
    _program.run(_merge.COMMAND, "python -m experiments.merge")
