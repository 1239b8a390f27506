"""A run's folder: what is written there, read from there, and refused."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs import quickstart
from dimat_jax import _inputs, _run_folder, _run_progress, workdir
from dimat_jax._lock import LockError, held
from dimat_jax._metrics import read_evaluations, read_rows
from dimat_jax._pretrain import SharedAgents
from dimat_jax.config import ConfigError
from dimat_jax.experiment import Experiment
from dimat_jax.ledger import Ledger
from dimat_jax.train import run
from dimat_jax.workdir import Progress, Results, Workdir, load_agents


def small(algorithm: str = "wa", **changes: Any):
    """The quickstart, made smaller. Fields are changed by dotted path."""
    config = quickstart.get_config(algorithm)
    fields = {
        "agents": 3,
        "rounds": 2,
        "data.train_size": 30,
        "data.test_size": 20,
        "pretrain.epochs": 2,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    config.update_from_flattened_dict(fields)
    return config


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return Experiment(small())


@pytest.fixture
def folder(tmp_path, experiment) -> Workdir:
    """The folder of a run that has just started."""
    folder = Workdir(tmp_path / "run")
    folder.create(experiment)
    return folder


MEASURES: dict[str, Any] = {
    "test_accuracy": np.array([0.25, 0.5, 0.75]),
    "test_accuracy_mean": 0.5,
    "test_loss": np.array([1.0, 2.0, 3.0]),
    "consensus_distance": 0.5,
}


def assert_same(tree: Any, expected: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def all_times(path: Path) -> dict[Path, int]:
    return {each: each.stat().st_mtime_ns for each in [path, *path.rglob("*")]}


# The folder


def test_a_new_run_has_a_config_and_a_partition_and_no_summary(tmp_path, experiment):
    folder = Workdir(tmp_path / "a" / "run")
    folder.check(experiment.config)
    assert not folder.is_started
    counts = folder.create(experiment)
    assert folder.is_started and folder.read_summary() is None
    assert {path.name for path in folder.path.iterdir()} == {
        "config.json",
        "digests.json",
        "inputs.json",
        "layout.json",
        "model.json",
        "partition.json",
    }
    assert folder.read_config().to_json() == experiment.config.to_json()
    partition = json.loads((folder.path / "partition.json").read_text())
    assert partition == {
        "partition": "iid",
        "classes": list("0123456789"),
        "counts": counts.tolist(),
    }
    assert counts.sum() == 30


def test_the_config_is_written_last(tmp_path, experiment, monkeypatch):
    """A folder with config.json counts as a run's, so all other files are there."""
    written = []
    write = _run_folder.write_json

    def spy(path: Path, content: Any, **options: Any) -> None:
        written.append(path.name)
        write(path, content, **options)

    for module in (_run_folder, _inputs):
        monkeypatch.setattr(module, "write_json", spy)
    Workdir(tmp_path / "run").create(experiment)
    names = ["partition.json", "layout.json", "inputs.json", "config.json"]
    assert written == names


@pytest.mark.parametrize(
    ("names", "expected"), [(None, None), (tuple("abcdefghij"), list("abcdefgh"))]
)
def test_there_are_as_many_class_names_as_columns_of_counts(
    tmp_path, monkeypatch, names, expected
):
    """The training images may lack the last classes of the data set."""
    experiment = Experiment(small(data__train_size=8))
    labels = np.arange(8, dtype=np.int32)
    train = experiment.dataset.train._replace(labels=labels)
    dataset = experiment.dataset._replace(train=train, class_names=names)
    monkeypatch.setattr(experiment, "dataset", dataset)
    Workdir(tmp_path / "run").create(experiment)
    partition = json.loads((tmp_path / "run" / "partition.json").read_text())
    assert np.shape(partition["counts"]) == (3, 8)
    assert partition["classes"] == expected


def test_a_folder_takes_the_same_config_on_other_devices_but_no_other(folder):
    folder.check(small())
    folder.check(small(placement__cpu_devices=2, checkpoint__keep=7))
    with pytest.raises(ConfigError, match=r"differ in seed \(0 there, 3 here\)"):
        folder.check(small(seed=3))


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="run cannot be a folder: "):
        Workdir(tmp_path / "run").check(small())


def test_fields_that_an_older_config_lacks_have_their_defaults(folder):
    path = folder.path / "config.json"
    fields = json.loads(path.read_text())
    path.with_name("digests.json").unlink()  # Older versions wrote no digests.
    del fields["faults"], fields["merge"]["stay"]
    path.write_text(json.dumps(fields))
    config = folder.read_config()
    assert config.faults.dropout == config.merge.stay == 0.0
    assert config.agents == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "config.json cannot be used: it is damaged, or no JSON: Expecting"),
        ("[]", "cannot be used"),
        ('{"roundz": 3}', "there are no fields roundz"),
        (
            '{"merge": {"bn_data": "own"}}',
            r"no fields merge.bn_data \(it is batch_norm.data now\)",
        ),
        ('{"rounds": "many"}', "cannot be used"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        Workdir(tmp_path).read_config()


# Progress


def test_progress_survives_json_and_its_clock_runs_on(monkeypatch):
    now = 100.0
    monkeypatch.setattr(_run_progress.time, "perf_counter", lambda: now)
    ledger = Ledger(2, exchanges=3, by_kind={"params": 2**70})
    progress = Progress(ledger, epoch=1, round=2, step=3, rows=4, seconds=5.0)
    now += 10
    record = json.loads(json.dumps(progress.record()))
    assert record["seconds"] == progress.total_seconds == 15
    now += 1000  # Another process goes on later.
    restored = Progress.of(record)
    now += 1
    assert restored.total_seconds == 16
    assert restored.record() == {**record, "seconds": 16}
    assert restored.ledger == ledger and restored.ledger is not ledger


# Results


def test_a_run_begins_at_the_beginning(folder, experiment):
    with Results(folder, experiment) as results:
        assert results.restore() is None
        fresh = results.progress.record()
    assert 0 <= fresh.pop("seconds") < 60
    expected = Progress(Ledger(3)).record()
    del expected["seconds"]
    assert fresh == expected


def test_a_run_goes_on_from_its_newest_checkpoint(folder, experiment):
    """With the progress and the rows that it had then."""
    placement = experiment.placement
    state = experiment.algorithm.init(experiment.initial_variables())
    with Results(folder, experiment) as results:
        progress = results.progress
        progress.epoch, progress.round, progress.step, progress.seconds = 2, 1, 9, 50
        progress.ledger.by_kind["params"] = 2**60
        results.write("pretrained", 0, MEASURES, {})
        results.write("merged", 1, MEASURES, {})
        results.save(state)
        results.write("trained", 1, MEASURES, {})
    # Checkpoints are numbered by what is done: two epochs and one round.
    assert [path.name for path in (folder.path / "checkpoints").iterdir()] == ["3"]
    assert len(read_rows(folder.path)) == 3
    with Results(folder, experiment) as results:
        assert [row["phase"] for row in read_rows(folder.path)] == [
            "pretrained",
            "merged",
        ]
        again = results.progress
        assert (again.epoch, again.round, again.step, again.rows) == (2, 1, 9, 2)
        assert again.ledger == progress.ledger
        assert 50 < again.total_seconds < 110
        restored = results.restore()
        assert_same(placement.gather(restored), placement.gather(state))


def test_before_the_last_epoch_a_checkpoint_is_one_of_pretraining(tmp_path):
    """It holds Adam's state, while the rounds of this run have push-sum weights."""
    experiment = Experiment(small("sgp"))
    folder = Workdir(tmp_path / "run")
    folder.create(experiment)
    variables = experiment.initial_variables()
    state = experiment.pretrain_algorithm.init(variables)
    with Results(folder, experiment) as results:
        results.progress.epoch = 1
        results.save(state)
    with Results(folder, experiment) as results:
        restored = results.restore()
    gathered = experiment.placement.gather(state)
    assert_same(experiment.placement.gather(restored), gathered)
    rounds = jax.tree.structure(experiment.algorithm.init(variables))
    assert jax.tree.structure(restored) != rounds


def test_a_row_holds_the_evaluation_and_what_was_sent(folder, experiment):
    with Results(folder, experiment) as results:
        results.progress.step = 7
        results.progress.ledger.by_kind["params"] = 2**60
        results.write("merged", 1, MEASURES, {"moved_units": 0.5})
    (row,) = read_rows(folder.path)
    assert list(row) == [
        "round",
        "step",
        "phase",
        "test_accuracy",
        "test_accuracy_mean",
        "test_loss",
        "consensus_distance",
        "bytes_sent_total",
        "bytes_sent_by_kind",
        "bytes_sent_by_agent",
        "bytes_sent_by_link",
        "comm_rounds_total",
        "present",
        "seconds_total",
        "moved_units",
    ]
    assert (row["round"], row["step"], row["phase"]) == (1, 7, "merged")
    assert row["test_accuracy"] == [0.25, 0.5, 0.75]
    assert row["test_loss"] == [1.0, 2.0, 3.0] and row["consensus_distance"] == 0.5
    assert row["bytes_sent_by_link"] == [[0] * 3] * 3
    assert row["bytes_sent_total"] == row["bytes_sent_by_kind"]["params"] == 2**60


def test_nothing_is_written_into_a_folder_that_another_process_has_taken(
    folder, experiment
):
    with held(folder.path, print), Results(folder, experiment) as results:
        path = folder.path / ".running.json"
        holder = {**json.loads(path.read_text()), "host": "far", "token": "x"}
        path.write_text(json.dumps(holder))
        with pytest.raises(LockError, match="was taken over by process"):
            results.write("trained", 1, MEASURES, {})
        with pytest.raises(LockError, match="was taken over by process"):
            results.save({"w": np.zeros(3)})
    assert not read_rows(folder.path)
    assert not list((folder.path / "checkpoints").iterdir())


def test_the_rows_of_epochs_are_no_evaluations(folder, experiment):
    seen = {"train_loss": np.ones(3), "train_loss_mean": 1.0}
    with Results(folder, experiment) as results:
        results.progress.step = 7
        results.write_epoch("pretraining", 0, 1, seen)
        results.write("pretrained", 0, MEASURES, {})
        results.write_epoch("training", 1, 1, seen)
        results.write_pretraining_rows(
            [{"phase": "pretraining", "epoch": 1}, {"phase": "pretraining", "epoch": 2}]
        )
        assert [row["epoch"] for row in results.pretraining_rows()] == [1, 2]
        summary = results.summarize()
    first, evaluated, *_ = read_rows(folder.path)
    del first["seconds_total"]
    place = {"round": 0, "step": 7, "phase": "pretraining", "epoch": 1}
    assert first == {**place, "train_loss": [1.0] * 3, "train_loss_mean": 1.0}
    assert read_evaluations(folder.path) == [evaluated]
    assert summary["phase"] == "pretrained" and "last_training" not in summary


def test_rows_leave_out_the_links_of_many_agents(folder, experiment, monkeypatch):
    monkeypatch.setattr(workdir, "_MOST_IN_ROWS", 2)
    with Results(folder, experiment) as results:
        results.write("merged", 1, MEASURES, {})
    (row,) = read_rows(folder.path)
    assert "bytes_sent_by_link" not in row
    assert row["bytes_sent_by_agent"] == [0] * 3


def test_the_summary_is_the_last_row_of_all_and_of_each_phase(folder, experiment):
    with Results(folder, experiment) as results:
        for phase, number in (("pretrained", 0), ("merged", 1), ("merged", 2)):
            results.write(phase, number, MEASURES, {})
        summary = results.summarize()
    rows = read_rows(folder.path)
    assert folder.read_summary() == summary
    assert (
        summary.items()
        >= (rows[2] | {"seconds_total": summary["seconds_total"]}).items()
    )
    assert summary["last_pretrained"] == rows[0] and summary["last_merged"] == rows[2]
    assert summary["spectral_gap"] == pytest.approx(1)
    assert summary["spectral_gap_per_step"] == pytest.approx(1)
    assert summary["period"] == 1
    assert summary["versions"]["jax"] == jax.__version__


def test_the_summary_has_the_best_round_by_the_validation_images_alone(
    folder, experiment
):
    with Results(folder, experiment) as results:
        results.write("merged", 1, MEASURES, {})
        assert "best_merged" not in results.summarize()
        for number, accuracy in ((2, 0.75), (3, 0.5)):
            validation = {"validation_accuracy_mean": accuracy}
            results.write("merged", number, MEASURES | validation, {})
        summary = results.summarize()
    assert summary["best_merged"] == read_rows(folder.path)[1]
    assert summary["last_merged"] == read_rows(folder.path)[2]


# Agents


def test_loading_agents_leaves_the_folder_as_it_is(folder, experiment):
    variables = experiment.initial_variables()
    with Results(folder, experiment) as results:
        results.progress.epoch = 2
        results.save(experiment.algorithm.init(variables))
    before = all_times(folder.path)
    loaded, agents = load_agents(folder.path)
    assert_same(agents, experiment.placement.gather(variables))
    assert loaded.config.to_json() == experiment.config.to_json()
    assert all_times(folder.path) == before


def test_a_run_without_a_checkpoint_has_no_agents(folder):
    before = all_times(folder.path)
    with pytest.raises(ConfigError, match=f"{folder.path} holds a run that has no che"):
        load_agents(folder.path)
    assert all_times(folder.path) == before


# Shared agents


def shared(tmp_path: Path, **changes: Any) -> SharedAgents:
    cache = str(tmp_path / "agents")
    return SharedAgents(Experiment(small(**{"pretrain__cache_dir": cache, **changes})))


def test_without_a_folder_no_agents_are_shared(experiment):
    nowhere = SharedAgents(experiment)
    assert nowhere.path is None and nowhere.read() is None
    nowhere.write(experiment.initial_variables(), {}, 0.0)


def test_shared_agents_come_back_with_metrics_and_seconds(tmp_path, experiment):
    agents = shared(tmp_path)
    assert agents.read() is None
    assert not (tmp_path / "agents").exists()
    variables = experiment.initial_variables()
    rows = [{"phase": "pretraining", "epoch": 1}]
    agents.write(variables, {"train_loss": np.array([0.5, 0.25, 0.125])}, 12.5, rows)
    found = agents.read()
    assert found is not None
    assert_same(
        experiment.placement.gather(found[0]), experiment.placement.gather(variables)
    )
    assert found[1:] == ({"train_loss": [0.5, 0.25, 0.125]}, 12.5, rows)


def test_the_first_of_two_runs_that_share_agents_wins(tmp_path, experiment):
    agents, variables = shared(tmp_path), experiment.initial_variables()
    agents.write(variables, {}, 1.0)
    agents.write(variables, {}, 2.0)
    found = agents.read()
    assert found is not None and found[2] == 1.0
    # Nothing partial is left.
    assert list((tmp_path / "agents").iterdir()) == [agents.path]


def test_agents_are_shared_if_their_pretraining_is_equal(tmp_path):
    path = shared(tmp_path).path
    for same in ({"rounds": 5}, {"topology": "star"}, {"checkpoint__keep": 1}):
        assert shared(tmp_path, **same).path == path
    for other in ({"seed": 1}, {"pretrain__epochs": 3}, {"agents": 2}):
        assert shared(tmp_path, **other).path != path


def test_a_run_of_an_older_version_is_still_the_same_run(tmp_path):
    """Older versions let configs set what they do not read, and had no digests."""
    config = small("wa", rounds=0)
    run(config, tmp_path, lambda line: None)
    path = tmp_path / "config.json"
    older = json.loads(path.read_text())
    (tmp_path / "digests.json").unlink()
    older["merge"] |= {"frame": "reference", "stay": 0.1, "match_samples": 0}
    del older["faults"], older["merge"]["restarts"]
    path.write_text(json.dumps(older))
    Workdir(tmp_path).check(config)
    experiment, agents = load_agents(tmp_path)
    assert experiment.config.merge.stay == 0.0
    assert jax.tree.leaves(agents)[0].shape[0] == 3
    older["seed"] = 1
    path.write_text(json.dumps(older))
    with pytest.raises(ConfigError, match=r"they differ in seed \(1 there, 0 here\)"):
        Workdir(tmp_path).check(config)


def test_the_place_of_the_data_is_set_only_where_it_is_read(tmp_path):
    config = small("wa", rounds=0)
    run(config, tmp_path, lambda line: None)
    experiment, _ = load_agents(tmp_path, data_dir="/elsewhere")
    assert experiment.config.data.dir == ""  # the digits have no folder


def test_a_config_that_sets_what_it_does_not_read_is_refused_even_if_finished(tmp_path):
    config = small("wa", rounds=0)
    run(config, tmp_path, lambda line: None)
    config.merge.stay = 0.3
    with pytest.raises(ConfigError, match="config.merge.stay is 0.3, but"):
        run(config, tmp_path, lambda line: None)
