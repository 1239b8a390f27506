"""Times how a GPT-2 of 124 million parameters is aligned by its weights.

The spec is derived from the model and verified. Random permutations are planted in a
copy of random weights, and `weight_matching` has to find them.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dimat_jax import permutation
from dimat_jax._bench._gpt2 import GPT2, forward, shapes, weights
from dimat_jax._bench._record import Bench, Settings, table
from dimat_jax._bench._timing import Side, race
from dimat_jax._bench._worker import Program, jax_program
from dimat_jax.config import Config
from dimat_jax.matching import weight_matching

__all__ = ["BENCH", "alignment"]

_SIDE = "GPT-2"
_PHASES = ("derive", "verify", "match")


def run(config: Config, settings: Settings) -> dict[str, Any]:
    """Measures seconds, peak memory, and the share of units that matching recovers.

    Raises:
        UserError: the machine has too little memory.
    """
    del config  # The benchmark has a model of its own.
    side = Side(_SIDE, "dimat_jax._bench.gpt2:alignment", {"sizes": GPT2()._asdict()})
    timing = race([side], settings.repeats)[_SIDE].required()
    facts = timing.facts
    medians = {
        f"{phase}_seconds": float(np.median([f[f"{phase}_seconds"] for f in facts]))
        for phase in _PHASES
    }
    known = {name: facts[0][name] for name in ("parameters", "groups", "units")}
    return {
        "sides": {_SIDE: timing.record()},
        **known,
        **medians,
        "recovered": min(f["recovered"] for f in facts),
        "peak_bytes": timing.peak_bytes,
    }


def alignment(sizes: dict[str, int]) -> Program:
    """Makes a program that derives a spec, verifies it, and matches by weights.

    Args:
        sizes: the fields of a `GPT2`.
    """
    model = GPT2(**sizes)
    compute = forward(model)
    reference = weights(model, seed=0)
    abstract = {
        name: jax.ShapeDtypeStruct(shape, np.float32)
        for name, shape in shapes(model).items()
    }
    text = jax.ShapeDtypeStruct((2, model.places), np.int32)
    few = np.random.default_rng(1).integers(0, model.vocabulary, (2, 8), np.int32)
    spec = permutation.derive(compute, abstract, text, strict=True)
    planted = permutation.random(spec, abstract, jax.random.key(0))
    permutee = permutation.apply(spec, planted, reference)
    expected = permutation.invert(planted)
    n_units = sum(perm.size for perm in expected.values())

    def call() -> dict[str, Any]:
        key = jax.random.key(1)
        seconds: dict[str, float] = {}
        again = _timed(
            seconds,
            "derive",
            lambda: permutation.derive(compute, abstract, text, strict=True),
        )
        _timed(
            seconds,
            "verify",
            lambda: permutation.verify(again, compute, reference, few, key),
        )
        found = _timed(
            seconds,
            "match",
            lambda: weight_matching(again, reference, permutee, key=key),
        )
        right = sum(int((found[g] == expected[g]).sum()) for g in expected)
        return {
            **seconds,
            "parameters": sum(leaf.size for leaf in reference.values()),
            "groups": len(expected),
            "units": n_units,
            "recovered": right / n_units,
        }

    return jax_program(call)


def _timed(seconds: dict[str, float], phase: str, work: Callable[[], Any]) -> Any:
    """Does some work, and notes how long it took."""
    start = time.perf_counter()
    result = jax.block_until_ready(work())
    seconds[f"{phase}_seconds"] = time.perf_counter() - start
    return result


def show(result: dict[str, Any]) -> str:
    """Writes a table of what was measured."""
    rows = [
        ["parameters", result["parameters"]],
        ["groups", result["groups"]],
        ["units", result["units"]],
        *([f"{p}, s", result[f"{p}_seconds"]] for p in _PHASES),
        ["first call (with compilation), s", _first_call(result)],
        ["peak memory, GB", result["peak_bytes"] / 1e9],
        ["units recovered", f"{result['recovered']:.4%}"],
    ]
    return table(["a GPT-2 aligned by its weights", ""], rows)


def _first_call(result: dict[str, Any]) -> float:
    return result["sides"][_SIDE]["first_call_seconds"]


BENCH = Bench("gpt2", run, show, times_a_config=False)
