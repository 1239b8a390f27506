"""Equal numbers, as docs/how-to/determinism.md promises them."""

import re
from pathlib import Path

import pytest

from dimat_jax import _randomness, train
from dimat_jax._metrics import read_evaluations
from experiments.soak._same import differences, final_state
from tests.sweeping.small import small

DOCUMENT = Path(__file__).parents[1] / "docs" / "how-to" / "determinism.md"


def done(workdir: Path, **changes: object) -> Path:
    train.run(small("wa", **changes), workdir, lambda line: None)
    return workdir


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    return done(folder / "run", pretrain__cache_dir=str(folder / "agents"))


def test_a_second_run_has_the_same_rows_and_arrays(first, tmp_path):
    assert not differences(done(tmp_path / "second"), first)
    assert len(read_evaluations(first)) == 5 and len(final_state(first)) > 5


def test_shared_agents_give_the_bits_of_own_ones(first, tmp_path):
    """The first run has trained them."""
    shared = str(first.with_name("agents"))
    second = done(tmp_path / "second", pretrain__cache_dir=shared)
    assert not differences(second, first)
    # The second one went on from them: it has no checkpoint of pre-training.
    assert len(list(Path(shared).glob("[!.]*"))) == 1


def test_what_a_run_measures_and_keeps_changes_no_agent(first, tmp_path):
    other = {"eval__every": 2, "checkpoint__every": 2, "checkpoint__keep": 1}
    ours, theirs = final_state(done(tmp_path / "other", **other)), final_state(first)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        assert array.tobytes() == theirs[path].tobytes(), path
    assert len(read_evaluations(tmp_path / "other")) == 3


def test_the_random_streams_are_those_of_the_document():
    found = re.findall(r"^\| `(\w+)` \| (\d+) \| ", DOCUMENT.read_text(), re.MULTILINE)
    assert found == [(name, str(n)) for n, name in enumerate(_randomness._PURPOSES)]
