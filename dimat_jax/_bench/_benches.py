"""The list of all benchmarks."""

from dimat_jax._bench import gpt2, merge, scale, train
from dimat_jax._bench._record import Bench

__all__ = ["BENCHES"]

BENCHES: dict[str, Bench] = {
    bench.name: bench for bench in (merge.BENCH, train.BENCH, scale.BENCH, gpt2.BENCH)
}
"""The benchmarks by name."""
