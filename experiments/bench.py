"""Measures how long things take, in relation to each other.

    python -m experiments.bench {train,merge,scale} --out=FILE.json

This is `dimat bench`; `--help` says more.
"""

from dimat_jax.cli import _bench, _program

if __name__ == "__main__":
    _program.run(_bench.COMMAND, "python -m experiments.bench")
