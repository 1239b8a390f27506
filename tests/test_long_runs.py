"""Long runs stay small: in memory, in files, in compiled programs, in checkpoints."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from configs import quickstart
from dimat_jax import train
from dimat_jax._metrics import read_rows
from dimat_jax.config import drop_unread


class Sizes(NamedTuple):
    """What a run takes at some time."""

    memory: int
    files: int
    compiled: int
    checkpoints: int


def tiny(rounds: int, **changes: Any):
    config = quickstart.get_config("wa")
    fields = {
        "agents": 2,
        "rounds": rounds,
        "local_epochs": 0,
        "local_steps": 1,
        "batch_size": 10,
        "data.train_size": 20,
        "data.test_size": 20,
        "pretrain.epochs": 0,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    config.update_from_flattened_dict(fields)
    return drop_unread(config)


class Watch:
    """Measures a run at its evaluations, as the function that logs them."""

    def __init__(self, folder: Path):
        self.sizes: list[Sizes] = []
        self._folder, self._compiled = folder, 0

    def on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        self._compiled += event == "/jax/core/compile/backend_compile_duration"

    def __call__(self, line: str) -> None:
        if not line.startswith("round "):
            return
        # Another thread writes and removes files meanwhile, which `os.walk` ignores.
        files = [
            Path(folder, name)
            for folder, _, names in os.walk(self._folder)
            for name in names
        ]
        checkpoints = [path for path in files if "checkpoints" in path.parts]
        self.sizes.append(
            Sizes(
                memory=resident_bytes(),
                files=len(files) - len(checkpoints),
                compiled=self._compiled,
                checkpoints=len(
                    {p.parts[len(self._folder.parts) + 1] for p in checkpoints}
                ),
            )
        )


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def slope(values: list[int]) -> float:
    """The growth per evaluation, by a line through the values of the second half."""
    half = np.array(values[len(values) // 2 :], np.float64)
    return float(np.polyfit(np.arange(len(half)), half, 1)[0])


# TensorStore 0.1.86 keeps 262 bytes for each array of each checkpoint: its function
# KvStore.Spec.to_json, which Orbax calls, loses them. So the run that measures memory
# saves few checkpoints.
@pytest.mark.parametrize(
    ("rounds", "every"), [(20, 1), pytest.param(2000, 50, marks=pytest.mark.slow)]
)
def test_many_rounds_take_no_more_than_a_few(tmp_path, rounds, every):
    watch = Watch(tmp_path / "run")
    jax.monitoring.register_event_duration_secs_listener(watch.on_event)
    try:
        train.run(tiny(rounds, checkpoint__every=every), tmp_path / "run", watch)
    finally:
        jax.monitoring.unregister_event_duration_listener(watch.on_event)
    assert len(watch.sizes) == 2 * rounds + 1
    memory, files, compiled, checkpoints = zip(*watch.sizes, strict=True)
    assert len(set(files[2:])) == 1
    assert compiled[-1] == compiled[6]
    # Two are kept, and one more may be in the making.
    assert max(checkpoints) <= 3
    # A few rounds are too short to tell a slope from the noise.
    assert rounds < 100 or slope(list(memory)) < 4_000
    # All that grows in the folder are the rows: in metrics.jsonl with their digests, as
    # events, and compressed in the checkpoints.
    files_of_rows = [p for p in (tmp_path / "run").iterdir() if p.is_file()]
    total = sum(path.stat().st_size for path in files_of_rows)
    assert total / len(watch.sizes) < 6_000


def test_some_checkpoints_are_kept_for_good(tmp_path):
    config = tiny(9, checkpoint__keep=1, checkpoint__keep_every=4, eval__every=9)
    train.run(config, tmp_path / "run", lambda line: None)
    names = {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {4, 8, 9}
    # A run that goes on keeps them too.
    config.rounds = 9
    assert len(read_rows(tmp_path / "run")) == 3
