import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from dimat_jax import _restored
from dimat_jax._checkpoint import CheckpointError, Checkpoints
from dimat_jax._slots import refill, with_sharding
from dimat_jax.experiment import Experiment
from dimat_jax.placement import place

ROOT = Path(__file__).parents[1]


def optimizer_state(seed: int, n_agents: int = 3) -> Any:
    """Makes stacked params and a state of nested NamedTuples, as NumPy arrays."""
    rng = np.random.default_rng(seed)
    params = {
        "Conv_0": {"kernel": rng.normal(size=(n_agents, 3, 3, 1, 2))},
        "head": {"bias": rng.normal(size=(n_agents, 4))},
    }
    params = jax.tree.map(np.float32, params)
    tx = optax.chain(
        optax.add_decayed_weights(0.1), optax.adam(optax.constant_schedule(1.0))
    )
    state = tx.init(params)
    counted = jax.tree.map(lambda x: np.array(x) + np.array(seed, x.dtype), state)
    return {"params": params, "opt_state": counted}


def shapes_of(tree: Any) -> Callable[[dict], Any]:
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    return lambda record: abstract


def assert_same(tree: Any, expected: Any) -> None:
    def check(leaf, expected_leaf):
        assert isinstance(leaf, np.ndarray)
        assert leaf.dtype == expected_leaf.dtype
        np.testing.assert_array_equal(leaf, expected_leaf)

    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(check, tree, expected)


@pytest.fixture
def opened(tmp_path) -> Iterator[Callable[..., Checkpoints]]:
    """Opens the same directory each time that it is called."""
    all_opened = []

    def opens(keep: int = 2) -> Checkpoints:
        all_opened.append(Checkpoints(tmp_path / "checkpoints", keep))
        return all_opened[-1]

    yield opens
    for checkpoints in all_opened:
        checkpoints.close()


def test_an_empty_directory_holds_no_checkpoint(opened, tmp_path):
    def like(record):
        raise AssertionError("nothing is expected of what is not there")

    assert opened().restore(like) is None
    assert (tmp_path / "checkpoints").is_dir()


def test_optimizer_states_and_records_come_back_as_they_were(opened):
    tree = optimizer_state(1)
    record = {"round": 3, "seconds": 1.5, "ledger": {"bytes_sent": 2**70}, "done": []}
    first = opened()
    first.save(3, tree, record)
    first.close()
    restored = opened().restore(shapes_of(tree))
    assert restored is not None
    assert_same(restored[0], tree)
    assert restored[1] == record
    assert type(restored[1]["ledger"]["bytes_sent"]) is int


@pytest.mark.parametrize("n_devices", [None, 1, 2])
def test_arrays_without_elements_come_back(opened, n_devices):
    """RelaySGD has no messages in a graph without edges, for example."""
    empty = np.zeros((2, 0, 3), np.int32)
    tree = {"a": empty, "b": np.arange(2.0), "c": (None, empty.astype(np.float16))}
    like: Any = shapes_of(tree)({})
    if n_devices:
        placement = place(2, jax.devices()[:n_devices])
        tree = placement.put(tree)
        like = with_sharding(placement, jax.eval_shape(lambda: tree))
    checkpoints = opened()
    checkpoints.save(1, tree, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(lambda record: like)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    for leaf, other in zip(*map(jax.tree.leaves, (restored, tree)), strict=True):
        assert type(leaf) is type(other)
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other)
        if n_devices:
            assert leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim)


def test_what_is_expected_may_depend_on_the_record(opened):
    checkpoints = opened()
    checkpoints.save(1, optimizer_state(1, n_agents=2), {"n_agents": 2})
    checkpoints.wait()
    restored = checkpoints.restore(
        lambda record: shapes_of(optimizer_state(0, **record))(record)
    )
    assert_same(restored[0], optimizer_state(1, n_agents=2))


def test_a_record_is_read_without_the_arrays(opened):
    checkpoints = opened()
    assert checkpoints.read_record() is None
    for number in (1, 2):
        checkpoints.save(number, {"w": np.zeros(3)}, {"number": number})
    checkpoints.wait()
    assert checkpoints.read_record() == {"number": 2}


def test_a_directory_that_is_only_read_stays_as_it_is(opened, tmp_path):
    checkpoints, tree = opened(), {"w": np.zeros(3)}
    checkpoints.save(1, tree, {})
    checkpoints.close()
    paths = [tmp_path, *tmp_path.rglob("*")]
    before = [path.stat().st_mtime_ns for path in paths]
    reader = Checkpoints(tmp_path / "checkpoints", create=False)
    restored = reader.restore(shapes_of(tree))
    reader.close()
    assert restored is not None
    assert_same(restored[0], tree)
    assert [tmp_path, *tmp_path.rglob("*")] == paths
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_a_reader_looks_again_if_the_run_has_removed_what_it_reads(
    opened, tmp_path, monkeypatch
):
    writer = opened(keep=1)
    writer.save(1, {"w": np.zeros(3)}, {"number": 1})
    writer.wait()

    read: list[Any] = []

    def restore(experiment: Any, checkpoints: Checkpoints) -> None:
        if checkpoints.newest() == 1:
            writer.save(2, {"w": np.zeros(3)}, {"number": 2})
            writer.wait()
        read.append(checkpoints.read_record())

    monkeypatch.setattr(_restored, "restore", restore)
    experiment = object.__new__(Experiment)  # Nothing of it is read here.
    directory = tmp_path / "checkpoints"
    _restored.restore_from(experiment, directory)
    assert read == [{"number": 2}]

    def fail(experiment: Any, checkpoints: Checkpoints) -> None:
        raise CheckpointError("for another reason")

    monkeypatch.setattr(_restored, "restore", fail)
    with pytest.raises(CheckpointError, match="for another reason"):
        _restored.restore_from(experiment, directory)


def test_a_missing_directory_that_is_only_read_stays_missing(tmp_path):
    reader = Checkpoints(tmp_path / "missing", create=False)
    assert reader.read_record() is None
    reader.close()
    assert list(tmp_path.iterdir()) == []


def test_a_saved_tree_may_be_changed_at_once(opened):
    checkpoints, tree = opened(), {"w": np.zeros(1_000_000, np.float32)}
    checkpoints.save(1, tree, {})
    tree["w"] += 1
    checkpoints.wait()
    assert not checkpoints.restore(shapes_of(tree))[0]["w"].any()


def test_only_the_newest_are_kept(opened, tmp_path):
    checkpoints = opened(keep=2)
    for number in (1, 2, 5, 11):
        checkpoints.save(number, optimizer_state(number), {"number": number})
    checkpoints.wait()
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"5", "11"}
    tree, record = checkpoints.restore(shapes_of(optimizer_state(0)))
    assert_same(tree, optimizer_state(11))
    assert record == {"number": 11}


@pytest.mark.parametrize("changed", [(4, 3), (2, 4), (3,), (2, 3, 1)])
def test_a_shape_that_disagrees_is_an_error_that_names_the_leaf(opened, changed):
    checkpoints = opened()
    tree = {"a": np.zeros(2), "layers": [{"w": np.zeros((2, 3), np.float32)}]}
    checkpoints.save(7, tree, {})
    checkpoints.wait()
    expected = {**tree, "layers": [{"w": np.zeros(changed, np.float32)}]}
    message = r"checkpoint 7 in .*checkpoints: layers/0/w is of shape \(2, 3\), expect"
    with pytest.raises(CheckpointError, match=message):
        checkpoints.restore(shapes_of(expected))


@pytest.mark.parametrize("expected", [{"v": np.zeros(2)}, {}, {"w": [np.zeros(2)]}])
def test_a_structure_that_disagrees_is_an_error(opened, expected):
    checkpoints = opened()
    checkpoints.save(1, {"w": np.zeros(2)}, {})
    checkpoints.wait()
    with pytest.raises(ValueError):
        checkpoints.restore(shapes_of(expected))


CRASH = """
import os, sys
import numpy as np
from dimat_jax._checkpoint import Checkpoints

checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"w": np.full(3, 1.0)}, {"number": 1})
checkpoints.wait()
renames, rename = [], os.rename

def crash_at_last(source, target):
    renames.append(target)
    if len(renames) == int(sys.argv[2]):
        os._exit(9)
    rename(source, target)

os.rename = crash_at_last
checkpoints.save(2, {"w": np.full(3, 2.0)}, {"number": 2})
checkpoints.wait()
print(len(renames))
"""


@pytest.mark.parametrize("at_rename", [1, 3])
def test_a_crash_while_saving_leaves_the_checkpoint_before(opened, tmp_path, at_rename):
    """Orbax moves both items into place, then the checkpoint that holds them."""
    directory = tmp_path / "checkpoints"
    command = [sys.executable, "-c", CRASH, str(directory), str(at_rename)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 9, (done.stdout, done.stderr)
    (half,) = {path.name for path in directory.iterdir()} - {"1"}
    assert half.startswith("2.")
    like = shapes_of({"w": np.zeros(3)})
    checkpoints = opened()
    tree, record = checkpoints.restore(like)
    assert_same(tree, {"w": np.full(3, 1.0)})
    assert record == {"number": 1}
    # The same checkpoint can be saved again.
    checkpoints.save(2, {"w": np.full(3, 3.0)}, {"number": 2})
    checkpoints.wait()
    assert_same(checkpoints.restore(like)[0], {"w": np.full(3, 3.0)})


def test_a_leftover_of_another_crash_is_no_checkpoint(opened, tmp_path):
    checkpoints = opened()
    checkpoints.save(1, {"w": np.zeros(3)}, {"number": 1})
    checkpoints.close()
    leftover = tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp-1700000000"
    (leftover / "tree").mkdir(parents=True)
    assert opened().restore(shapes_of({"w": np.zeros(3)}))[1] == {"number": 1}


SAVED = {
    "w": np.arange(15, dtype=np.float32).reshape(5, 3),
    "count": np.arange(5, dtype=np.int32),
}


@pytest.mark.parametrize("from_devices", [0, 1, 2, 5])
@pytest.mark.parametrize("to_devices", [1, 3, 4])
def test_agents_move_between_numbers_of_devices(opened, from_devices, to_devices):
    """0 devices: the arrays of the agents alone, as older versions saved them."""
    saved: Any = SAVED
    if from_devices:
        saved = place(5, jax.devices()[:from_devices]).put(SAVED)
    checkpoints = opened()
    checkpoints.save(1, saved, {})
    checkpoints.wait()

    placement = place(5, jax.devices()[:to_devices])
    stacked = jax.eval_shape(lambda: placement.put(SAVED))
    like = with_sharding(placement, stacked)
    restored = checkpoints.restore(lambda record: like, rows=5)
    assert restored is not None
    tree = refill(placement, restored[0])
    expected = placement.put(SAVED)
    for leaf, other in zip(*map(jax.tree.leaves, (tree, expected)), strict=True):
        assert leaf.sharding.is_equivalent_to(placement.sharding, leaf.ndim)
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other)


def test_a_checkpoint_of_fewer_agents_is_an_error(opened):
    checkpoints = opened()
    checkpoints.save(1, SAVED, {})
    checkpoints.wait()
    placement = place(6, jax.devices()[:1])
    six = {"w": np.zeros((6, 3), np.float32), "count": np.zeros(6, np.int32)}
    like = with_sharding(placement, jax.eval_shape(lambda: placement.put(six)))
    with pytest.raises(CheckpointError, match=r"of shape \(5,\), expected \(6,\)"):
        checkpoints.restore(lambda record: like, rows=6)


def test_saved_arrays_may_be_donated_at_once(opened):
    checkpoints, placement = opened(), place(2, jax.devices()[:2])
    like = {"w": np.ones((2, 1_000_000), np.float32)}
    tree = placement.put(like)
    overwrite = jax.jit(lambda tree: {"w": tree["w"] + 1}, donate_argnums=0)
    checkpoints.save(1, tree, {})
    for _ in range(5):
        tree = overwrite(tree)
    checkpoints.wait()
    abstract = with_sharding(placement, jax.eval_shape(lambda: placement.put(like)))
    restored = checkpoints.restore(lambda record: abstract, rows=2)
    assert restored is not None
    assert (np.asarray(restored[0]["w"]) == 1).all()
