"""Benchmarks that compare things within one run, so that only ratios are reported.

Every file but those that begin with an underscore holds one benchmark, which ends with
its `Bench` record. `BENCHES` lists the records.
"""

from dimat_jax._bench import merge, scale, train
from dimat_jax._bench._record import Bench

__all__ = ["BENCHES"]

BENCHES: dict[str, Bench] = {
    bench.name: bench for bench in (merge.BENCH, train.BENCH, scale.BENCH)
}
"""The benchmarks by name."""
