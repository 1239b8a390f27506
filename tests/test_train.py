"""Tests whole runs in this process: small ones on digits, a tiny one on CIFAR-100."""

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest

from configs import cifar100_resnet20, quickstart
from dimat_jax import _race, models, reports, train
from dimat_jax._measuring import Measuring
from dimat_jax._metrics import read_evaluations, read_rows
from dimat_jax._pretrain import SharedAgents
from dimat_jax._trainer import Trainer
from dimat_jax.config import ConfigError, default_config, drop_unread
from dimat_jax.errors import NonFiniteError, UserError
from dimat_jax.experiment import Experiment
from dimat_jax.ledger import Ledger
from dimat_jax.models import classifier, mlp
from dimat_jax.permutation import Concat, PermutationSpec, PermutationSpecError
from dimat_jax.permutation._verify import InconclusiveError, Verification
from dimat_jax.workdir import Results, Workdir


def small(algorithm: str = "dimat", **changes):
    """Makes a smaller quickstart config. Fields are changed by dotted path."""
    config = quickstart.get_config(algorithm)
    fields = {
        "agents": 3,
        "rounds": 2,
        "local_epochs": 1,
        "data.train_size": 300,
        "data.test_size": 100,
        "pretrain.epochs": 3,
        "pretrain.checkpoint_every": 1,
    }
    config.update_from_flattened_dict(fields)
    drop_unread(config)
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


def quiet(line: str) -> None:
    del line


def without_times(rows: list[dict]) -> list[dict]:
    times = ("seconds_total", "merge_seconds")
    return [{k: v for k, v in row.items() if k not in times} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The workdir of a small run that was never interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train.run(small(), workdir, quiet)
    return workdir


def test_a_run_writes_a_row_for_every_evaluation(finished):
    rows = read_evaluations(finished)
    assert [(row["round"], row["phase"]) for row in rows] == [
        (0, "pretrained"),
        (1, "merged"),
        (1, "trained"),
        (2, "merged"),
        (2, "trained"),
    ]
    # Each agent has 100 examples, which are 4 batches of 32 an epoch, and 3 epochs
    # alone.
    assert [row["step"] for row in rows] == [12, 12, 16, 16, 20]
    for row in rows:
        assert len(row["test_accuracy"]) == 3
        assert row["test_accuracy_mean"] == pytest.approx(np.mean(row["test_accuracy"]))
        deviation = statistics.stdev(row["test_accuracy"])
        assert row["test_accuracy_std"] == pytest.approx(deviation)
        assert 0 <= min(row["test_accuracy"]) <= max(row["test_accuracy"]) <= 1
        assert row["consensus_distance"] > 0
    # On a ring of three each agent has two neighbours.
    assert [row["comm_rounds_total"] for row in rows] == [0, 2, 2, 4, 4]
    n_params = 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10
    merge = {
        "params": 6 * 4 * n_params,
        "optimizer": 6 * (2 * 4 * n_params + 4),  # Adam's moments, and its counter
        # Permutations into the root's frame go down two edges, and then along all.
        "matching": (2 + 6) * 4 * (128 + 128),
    }
    for row, merges in zip(rows, (0, 1, 1, 2, 2), strict=True):
        expected = {kind: merges * size for kind, size in merge.items() if merges}
        assert row["bytes_sent_by_kind"] == expected
        assert row["bytes_sent_total"] == sum(expected.values())
        assert np.sum(row["bytes_sent_by_link"]) == row["bytes_sent_total"]
        assert row["present"] == [True] * 3


def test_a_run_leaves_its_config_summary_events_and_checkpoints(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["rounds"] == 2 and config["merge"]["frame"] == "reference"
    summary = json.loads((finished / "summary.json").read_text())
    rows = read_evaluations(finished)
    assert summary["test_accuracy"] == rows[-1]["test_accuracy"]
    assert summary["last_merged"] == rows[-2]
    assert list(finished.glob("events.out.tfevents.*"))
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["4", "5"]


def test_a_finished_run_is_left_alone(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    lines = []
    summary = train.run(small(), finished, lines.append)
    assert "finished" in lines[0]
    assert summary == json.loads((finished / "summary.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_every_epoch_alone_has_a_row_and_a_line(tmp_path, finished):
    rows, lines = read_rows(finished), []
    alone = [row for row in rows if row["phase"] == "pretraining"]
    assert rows[:3] == alone and rows[3:] == read_evaluations(finished)
    assert [(r["round"], r["epoch"], r["step"]) for r in alone] == [
        (0, 1, 4),
        (0, 2, 8),
        (0, 3, 12),
    ]
    for row in rows:
        if "train_loss" in row:
            for name in ("train_loss", "train_accuracy"):
                assert row[f"{name}_mean"] == pytest.approx(np.mean(row[name]))
    losses = [row["train_loss_mean"] for row in alone]
    assert losses == sorted(losses, reverse=True)
    # The evaluation after pre-training has the training loss of the last epoch.
    assert rows[3]["train_loss"] == alone[-1]["train_loss"]
    assert not [name for row in alone for name in row if "test" in name]

    # Evaluations on the way, and epochs in rounds.
    config = small(pretrain__eval_every=2, local_epochs=2, rounds=1)
    train.run(config, tmp_path, lines.append)
    ours = read_rows(tmp_path)
    times = ("seconds_total",)
    for row, other in zip(ours[:3:2], alone[::2], strict=True):
        assert {k: row[k] for k in row if k not in times} == {
            k: other[k] for k in other if k not in times
        }
    evaluated = ours[1]
    assert evaluated.keys() - alone[1].keys() == {
        "test_accuracy",
        "test_accuracy_mean",
        "test_accuracy_std",
        "test_loss",
        "test_loss_mean",
    }
    assert evaluated["test_accuracy_mean"] == np.mean(evaluated["test_accuracy"])
    assert [
        (row["phase"], row["round"], row.get("epoch"), row["step"]) for row in ours[3:]
    ] == [
        ("pretrained", 0, None, 12),
        ("merged", 1, None, 12),
        ("training", 1, 1, 16),
        ("training", 1, 2, 20),
        ("trained", 1, None, 20),
    ]
    first, second, whole = ours[5], ours[6], ours[7]
    for name in ("train_loss", "train_accuracy"):
        both = np.mean([first[name], second[name]], axis=0)
        np.testing.assert_allclose(both, whole[name], rtol=1e-5)
    assert whole["train_loss"] != second["train_loss"]
    assert lines[3].startswith("pre-training, epoch   2 of 3: training accuracy 0.")
    assert f", test accuracy {evaluated['test_accuracy_mean']:.4f}" in lines[3]
    assert lines[7].startswith("round   1, epoch 1 of 2: training accuracy 0.")
    # Nobody's results change by what is reported.
    expected = read_evaluations(finished)[:2]
    assert without_times(ours[3:5]) == without_times(expected)


class _Killed(Exception):
    pass


@pytest.mark.every_nth(4)
@pytest.mark.parametrize("n_rows", range(8))
def test_an_interrupted_run_resumes_with_the_same_results(
    tmp_path, finished, monkeypatch, n_rows
):
    """The run is killed in pre-training (0), or right after writing the n-th row.

    The first three rows are those of the epochs of pre-training.
    """
    if n_rows == 0:
        original, calls = Trainer.train, []

        def die_in_the_third_epoch(*args):
            calls.append(args)
            if len(calls) == 3:
                raise _Killed
            return original(*args)

        monkeypatch.setattr(Trainer, "train", die_in_the_third_epoch)
    lines = []

    def die(line: str) -> None:
        lines.append(line)
        # The first lines say which layout the run has, and how data are divided.
        if n_rows and len(lines) == 2 + n_rows:
            raise _Killed

    with pytest.raises(_Killed):
        train.run(small(), tmp_path, die)
    monkeypatch.undo()
    lines.clear()
    train.run(small(), tmp_path, lines.append)
    assert without_times(read_rows(tmp_path)) == without_times(read_rows(finished))
    # The run continued, and did not start from the beginning.
    assert "going on after local step" in lines[1] or n_rows == 1


class _Watched(Experiment):
    """An experiment that notes when its agents communicate, and are evaluated."""

    events: list[str] = []

    def __init__(self, config, layout=None):
        super().__init__(config, layout)
        self.algorithm = self.algorithm._replace(
            communicate=noting(self.events, "communicate", self.algorithm.communicate)
        )
        self.__dict__["evaluator"] = noting(self.events, "evaluate", self.evaluator)


def noting(events: list[str], name: str, function: Any) -> Any:
    """Wraps a function, so that a call appends its name to a list of events."""

    def wrapped(*args, **kwargs):
        events.append(name)
        return function(*args, **kwargs)

    return wrapped


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """Runs a config, and returns its events in order."""
    events = _Watched.events = []
    monkeypatch.setattr(_race, "Experiment", _Watched)
    for owner, name in (
        (Trainer, "steps"),
        (Ledger, "record_round"),
        (Ledger, "record_steps"),
        (Results, "write"),
        (Results, "save"),
    ):
        monkeypatch.setattr(owner, name, noting(events, name, getattr(owner, name)))
    return events


def test_a_round_communicates_trains_books_both_and_is_saved(tmp_path, events):
    train.run(small("wa"), tmp_path, quiet)
    alone = ["steps", "save", "steps", "save", "steps", "evaluate", "write", "save"]
    one_round = [
        "communicate",
        "record_round",
        "evaluate",
        "write",
        "steps",
        "record_steps",
        "evaluate",
        "write",
        "save",
    ]
    assert events == alone + 2 * one_round


def test_rounds_in_between_are_neither_evaluated_nor_saved(tmp_path, events):
    config = small("wa", rounds=3, eval__every=2, checkpoint__every=2)
    config.pretrain.epochs = 0
    train.run(drop_unread(config), tmp_path, quiet)
    rounds = " ".join(events).split("communicate")
    evaluated = "record_round evaluate write steps record_steps evaluate write save"
    assert [" ".join(part.split()) for part in rounds] == [
        "evaluate write save",
        "record_round steps record_steps",
        evaluated,
        evaluated,  # The last round always is.
    ]


def test_agents_that_do_not_communicate_are_evaluated_once_between_trainings(
    tmp_path, events
):
    """They are never judged by an evaluation that is older than their last steps."""
    train.run(small("local", rounds=4, eval__every=3), tmp_path, quiet)
    rows = read_evaluations(tmp_path)
    assert [row["round"] for row in rows] == [0, 3, 3, 4, 4]
    # The row "merged" of round 4 has the values of the row "trained" of round 3.
    assert events.count("evaluate") == 4 and events.count("write") == 5
    losses = [row["test_loss"] for row in rows]
    assert losses[0] != losses[1] != losses[2] == losses[3] != losses[4]


@pytest.mark.slow
def test_the_number_of_devices_changes_nothing(tmp_path, finished):
    expected = read_evaluations(finished)
    for devices in (2, 3):
        workdir = tmp_path / str(devices)
        train.run(small(placement__cpu_devices=devices), workdir, quiet)
        for row, other in zip(read_evaluations(workdir), expected, strict=True):
            np.testing.assert_allclose(
                row["test_loss"], other["test_loss"], rtol=1e-4, atol=1e-5
            )
            np.testing.assert_allclose(
                row["test_accuracy"], other["test_accuracy"], atol=0.011
            )


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_devices(tmp_path, finished):
    def die(line: str) -> None:
        if "round   1    trained" in line:
            raise _Killed

    with pytest.raises(_Killed):
        train.run(small(rounds=2), tmp_path, die)
    # There are two devices for three agents, so one slot only fills up a device.
    train.run(small(placement__cpu_devices=2), tmp_path, quiet)
    ours, theirs = read_evaluations(tmp_path)[-1], read_evaluations(finished)[-1]
    np.testing.assert_allclose(ours["test_loss"], theirs["test_loss"], rtol=1e-4)


@pytest.mark.slow
def test_runs_share_pretrained_agents(tmp_path):
    cache = str(tmp_path / "agents")
    lines = []
    changes = {"pretrain__cache_dir": cache, "rounds": 1}
    train.run(small("dimat", **changes), tmp_path / "a", quiet)
    train.run(small("wa", **changes), tmp_path / "b", lines.append)
    train.run(small("wa", seed=1, **changes), tmp_path / "c", quiet)
    assert any("pre-trained agents come from" in line for line in lines)
    first, second, third = (read_evaluations(tmp_path / run)[0] for run in "abc")
    assert first["test_loss"] == second["test_loss"] != third["test_loss"]
    # The rows of the epochs come with the agents, and so do their times.
    epochs = [read_rows(tmp_path / run)[:3] for run in "ab"]
    assert epochs[0] == epochs[1] and epochs[0][2]["epoch"] == 3


def test_a_run_waits_for_another_one_that_pretrains_the_same_agents(tmp_path):
    config = small("wa", pretrain__cache_dir=str(tmp_path / "agents"), rounds=0)
    path = SharedAgents(Experiment(config)).path
    assert path is not None
    path.parent.mkdir()
    lines = []

    def log(line: str) -> None:
        lines.append(line)
        if "waiting for the run" in line:
            # The other run dies, and this one has to train.
            process.kill()

    # The lock is released as soon as nothing refers to it any more.
    code = "import filelock, sys, time; x = filelock.FileLock(sys.argv[1]); x.acquire()"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}; print(flush=True); time.sleep(600)"]
        + [str(path.with_name(f".{path.name}.lock"))],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline()
    train.run(config, tmp_path / "run", log)
    process.communicate()
    assert f"waiting for the run that pre-trains the same agents, {path}" in lines
    assert not any("agents come from" in line for line in lines)
    assert path.exists()


@pytest.mark.slow
def test_a_run_that_goes_on_uses_agents_that_another_one_has_trained_since(
    tmp_path, monkeypatch
):
    changes = {"pretrain__cache_dir": str(tmp_path / "agents"), "rounds": 1}
    original, calls = Trainer.train, []

    def die_in_the_third_epoch(*args):
        calls.append(args)
        if len(calls) == 3:
            raise _Killed
        return original(*args)

    monkeypatch.setattr(Trainer, "train", die_in_the_third_epoch)
    with pytest.raises(_Killed):
        train.run(small("wa", **changes), tmp_path / "a", quiet)
    monkeypatch.undo()
    train.run(small("wa", **changes), tmp_path / "b", quiet)
    lines = []
    train.run(small("wa", **changes), tmp_path / "a", lines.append)
    assert lines[1].startswith("going on after local step")
    assert lines[2].startswith("pre-trained agents come from")
    a, b = read_rows(tmp_path / "a"), read_rows(tmp_path / "b")
    assert without_times(a) == without_times(b)
    assert a[0]["seconds_total"] == pytest.approx(b[0]["seconds_total"], abs=30)


@pytest.mark.parametrize("algorithm", ["wa", "local", "centralized"])
def test_every_algorithm_runs(tmp_path, algorithm):
    summary = train.run(small(algorithm, rounds=1), tmp_path, quiet)
    assert summary["test_accuracy_mean"] > 0.3
    agents = 1 if algorithm == "centralized" else 3
    assert len(summary["test_accuracy"]) == agents
    if algorithm != "wa":
        assert summary["bytes_sent_total"] == 0


def test_the_ceiling_sees_all_data():
    experiment = Experiment(small("centralized"))
    (shard,) = experiment.shards
    assert shard.tolist() == list(range(300))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["own", "proxy", "global"])
def test_matching_works_on_every_policy_of_data(tmp_path, policy):
    changes = {"merge__match_data": policy, "merge__match_samples": 50}
    config = drop_unread(small(rounds=1, agents=4, **changes))
    summary = train.run(config, tmp_path, quiet)
    assert 0 < summary["last_merged"]["moved_units"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["own", "proxy"])
def test_a_run_matches_on_as_many_images_as_it_takes(tmp_path, policy):
    changes = {
        "merge__match_data": policy,
        "merge__match_samples": "enough",
        "merge__batch_size": 20,
        "merge__frame": "own",
        "merge__stay": 2.0,
    }
    config = drop_unread(small(**changes))
    train.run(config, tmp_path / "whole", quiet)
    merged = [r for r in read_evaluations(tmp_path / "whole") if r["phase"] == "merged"]
    # No unit moves, so a second batch gains nothing. There are 5 or 15.
    assert [row["match_samples_used"] for row in merged] == [40, 40]

    # A run that is killed after the first merge comes to the same numbers.
    def die(line: str) -> None:
        if " merged:" in line:
            raise _Killed

    with pytest.raises(_Killed):
        train.run(config, tmp_path / "killed", die)
    assert read_evaluations(tmp_path / "killed")[-1]["phase"] == "merged"
    train.run(config, tmp_path / "killed", quiet)
    ours, theirs = (read_rows(tmp_path / name) for name in ("killed", "whole"))
    assert without_times(ours) == without_times(theirs)


def test_the_number_of_images_to_match_on_is_reported(finished):
    rows = read_evaluations(finished)
    assert [row.get("match_samples_used") for row in rows] == [None, 100, None] + [
        100,
        None,
    ]


def test_matching_by_weights_reads_no_examples():
    experiment = Experiment(small("wm"))
    assert experiment.merge_data(1).match is None


def test_a_round_can_be_counted_in_steps(tmp_path):
    config = small(local_epochs=0, local_steps=3)
    train.run(config, tmp_path, quiet)
    assert [row["step"] for row in read_evaluations(tmp_path)] == [12, 12, 15, 15, 18]


@pytest.mark.slow
def test_bfloat16_trains_to_about_the_same(tmp_path, finished):
    train.run(small(model__dtype="bfloat16"), tmp_path, quiet)
    ours, theirs = read_evaluations(tmp_path)[-1], read_evaluations(finished)[-1]
    assert ours["test_loss"] != theirs["test_loss"]
    assert ours["test_accuracy_mean"] == pytest.approx(
        theirs["test_accuracy_mean"], abs=0.05
    )


def test_without_pretraining_and_with_equal_inits_agents_start_as_one(tmp_path):
    config = drop_unread(small("local", init="same", pretrain__epochs=0, rounds=1))
    train.run(config, tmp_path, quiet)
    rows = read_evaluations(tmp_path)
    assert rows[0]["consensus_distance"] < 1e-5 < rows[-1]["consensus_distance"]


def test_after_the_first_merge_matching_beats_plain_averaging(tmp_path):
    """This is the paper's main case: different initial weights, IID data, a ring."""
    merged = {}
    for algorithm in ("dimat", "wa"):
        config = quickstart.get_config(algorithm)
        config.rounds = 1
        config.merge.frame, config.merge.stay = "own", 0.0
        config.pretrain.cache_dir = str(tmp_path / "agents")
        summary = train.run(config, tmp_path / algorithm, quiet)
        merged[algorithm] = summary["last_merged"]["test_accuracy_mean"]
    assert merged["dimat"] > 0.85
    assert merged["dimat"] > merged["wa"] + 0.15


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    config = small(pretrain__optimizer__name="sgd", rounds=1)
    config.pretrain.optimizer.learning_rate = 1e30
    with pytest.raises(
        NonFiniteError, match=r"training loss of agent\(s\) \[0, 1, 2\]"
    ):
        train.run(config, tmp_path, quiet)
    # Reports read the reason here. A run that goes on has not failed yet.
    failure = tmp_path / "failure.json"
    assert "training loss" in json.loads(failure.read_text())["message"]
    with Results(Workdir(tmp_path), Experiment(config)):
        assert not failure.exists()


def test_a_workdir_with_another_run_is_refused_and_untouched(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(ConfigError, match=r"seed \(0 there, 1 here\)"):
        train.run(small(seed=1), finished, quiet)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "dimatt"}, r"config.algorithm is 'dimatt'.*mean 'dimat'"),
        ({"topology": "rings"}, "config.topology .* allowed: .*ring"),
        ({"mixing": "metropolis"}, "mean 'metropolis_hastings'"),
        ({"model__name": "resnet21"}, "config.model.name .* 'resnet20'"),
        ({"model__dtype": "float16"}, "allowed: bfloat16, float32"),
        ({"data__name": "digit"}, "config.data.name .* 'digits'"),
        ({"data__partition": "class"}, "config.data.partition"),
        ({"optimizer__name": "sdg"}, "config.optimizer.name .* 'sgd'"),
        ({"merge__frame": "ours"}, "config.merge.frame"),
        ({"merge__stay": float("inf")}, "config.merge.stay is inf"),
        ({"merge__stay": -1.0}, "config.merge.stay is -1.0; it must be at least 0"),
        ({"agents": 0}, "config.agents is 0; it must be at least 1"),
        ({"agents": 301}, "301"),
        ({"batch_size": 0}, "config.batch_size"),
        ({"local_steps": 5}, "local_epochs or for local_steps"),
        ({"data__train_size": 10_000}, "1433"),
        (
            {"algorithm": "wm", "merge__restarts": 0},
            "config.merge.restarts is 0; it must be at least 1",
        ),
        (
            {"merge__match_data": "proxy", "merge__match_samples": 301},
            "config.merge.match_samples is 301",
        ),
        ({"eval__samples": 101}, "config.eval.samples is 101"),
        ({"data__name": "cifar100", "data__dir": "/nowhere"}, "/nowhere/cifar100"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, changes, message):
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match=message):
        train.run(small(**changes), workdir, quiet)
    assert not workdir.exists()


@pytest.mark.slow
def test_resnet20_runs_on_real_cifar100(tmp_path, data_dir, data_cache):
    """The run is small, with BatchNorm, recalibration, augmentation and own data."""
    config = cifar100_resnet20.get_config("small")
    config.update_from_flattened_dict(
        {
            "agents": 2,
            # One agent's programs compile in half the time of two agents' programs.
            "placement.batching": "vmap",
            "rounds": 1,
            "local_epochs": 0,
            "local_steps": 1,
            "batch_size": 10,
            "data.dir": str(data_dir / "tfds"),
            "data.cache_dir": data_cache,
            "data.train_size": 100,
            "data.test_size": 50,
            "pretrain.epochs": 1,
            "pretrain.batch_size": 10,
            "merge.match_data": "own",
            "batch_norm.data": "own",
            "merge.batch_size": 25,
            "eval.batch_size": 50,
            "merge.match_samples": 0,
            "batch_norm.samples": 0,
        }
    )
    summary = train.run(config, tmp_path, quiet)
    assert np.isfinite(summary["test_loss_mean"])
    phases = {"activations", "correlations", "assignment", "mix", "recalibration"}
    assert summary["last_merged"]["merge_seconds"].keys() == phases


def test_the_training_step_compiles_once():
    """This holds also for the state that a merge returns."""
    experiment = Experiment(small("dimat"))
    algorithm = experiment.algorithm
    trainer = Trainer(
        experiment, algorithm, experiment.sampler, experiment.key("rounds")
    )
    state = algorithm.init(experiment.initial_variables())

    networks = [experiment.network_at_step(step, 1) for step in range(3)]
    state, _ = trainer.train(state, 0, networks)
    for number in (1, 2):
        state, _ = algorithm.communicate(
            state,
            experiment.merge_data(number),
            experiment.network_at_round(number),
            experiment.key("communicate"),
        )
        state, _ = trainer.train(state, 3 * number, networks)
    step: Any = trainer._step
    assert step._cache_size() == 1


def test_agents_with_small_shards_follow_the_schedule_of_all(tmp_path):
    """Split by class, four agents have 3, 3, 2 and 2 of the ten digits."""
    experiment = Experiment(
        small(
            "local",
            agents=4,
            data__partition="by_class",
            data__small_shards="idle",
            optimizer__schedule="exponential",
        )
    )
    sizes = {len(shard) for shard in experiment.shards}
    assert len(sizes) > 1
    trainer = Trainer(
        experiment, experiment.algorithm, experiment.sampler, experiment.key("rounds")
    )
    state = experiment.algorithm.init(experiment.initial_variables())
    steps = experiment.sampler.steps_per_epoch
    networks = [experiment.network_at_step(step, 1) for step in range(steps)]
    state, _ = trainer.train(state, 0, networks)
    clocks = optax.tree.get(
        state, "count", filtering=lambda path, _: "ScaleBySchedule" in str(path)
    )
    assert clocks.tolist() == [steps] * 4


def untrained(algorithm: str, **changes):
    """Makes a small config of SGD without pre-training, with 7 steps in a round."""
    fields = {"local_epochs": 0, "local_steps": 7, "init": "same"}
    config = small(algorithm, **fields)
    config.pretrain.epochs, config.optimizer.name = 0, "sgd"
    config.optimizer.learning_rate = 0.1
    drop_unread(config)
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict(changes)
    return config


EVERY_STEP = {"merge__unit": "steps", "merge__gradient": "before_merge"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "changes"), [("wa", {}), ("dimat", {"merge__stay": 3.0})]
)
def test_algorithm_1_of_the_paper_without_permutations_is_cdsgd(
    tmp_path, algorithm, changes
):
    """DIMAT moves no unit if staying is worth more than any correlation."""
    changes = {**EVERY_STEP, **changes, "data__partition": "by_class"}
    train.run(untrained(algorithm, **changes), tmp_path / "a", quiet)
    gossip = untrained("cdsgd", data__partition="by_class")
    train.run(gossip, tmp_path / "b", quiet)
    ours, theirs = (
        [row for row in read_evaluations(tmp_path / name) if row["phase"] == "trained"]
        for name in ("a", "b")
    )
    for row, other in zip(ours, theirs, strict=True):
        for field in ("test_loss", "train_loss", "consensus_distance"):
            np.testing.assert_allclose(row[field], other[field], rtol=1e-4)
        for field in ("step", "comm_rounds_total"):
            assert row[field] == other[field]
    # With one step in a round, the gradient is that of the merged weights.
    published = untrained("wa", data__partition="by_class", local_steps=1, rounds=14)
    train.run(published, tmp_path / "c", quiet)
    after = read_evaluations(tmp_path / "c")[-1]
    assert after["step"] == ours[-1]["step"]
    assert not np.allclose(after["test_loss"], ours[-1]["test_loss"], rtol=1e-3)


@pytest.mark.parametrize("gradient", ["after_merge", "before_merge"])
def test_agents_may_merge_within_a_round(tmp_path, gradient):
    changes = {"merge__every": 3, "merge__unit": "steps", "merge__gradient": gradient}
    train.run(untrained("wa", **changes), tmp_path, quiet)
    rows = read_evaluations(tmp_path)
    phases = [(row["round"], row["phase"]) for row in rows[1:]]
    assert phases == [(1, "merged"), (1, "trained"), (2, "merged"), (2, "trained")]
    # Merges come before the first, the fourth and the seventh step of seven. An agent
    # on a ring of three has two neighbours.
    assert [row["comm_rounds_total"] for row in rows] == [0, 2, 6, 8, 12]
    first = int(gradient == "before_merge")
    assert [row["step"] for row in rows] == [0, first, 7, 7 + first, 14]
    assert [row["communicated"] for row in rows[1:]] == [True, False, True, False]


def test_agents_may_merge_every_few_rounds(tmp_path):
    train.run(untrained("wa", merge__every=2, rounds=4), tmp_path / "a", quiet)
    rows = read_evaluations(tmp_path / "a")
    assert [(row["round"], row["phase"]) for row in rows[1:]] == [
        (1, "merged"),
        (1, "trained"),
        (2, "trained"),
        (3, "merged"),
        (3, "trained"),
        (4, "trained"),
    ]
    assert [row["comm_rounds_total"] for row in rows] == [0, 2, 2, 2, 4, 4, 4]
    assert reports.load(tmp_path / "a").left_out.empty
    # Two rounds without a merge in between are one round of twice as many steps.
    train.run(untrained("wa", local_steps=14, rounds=2), tmp_path / "b", quiet)
    longer = read_evaluations(tmp_path / "b")
    for row, other in ((rows[3], longer[2]), (rows[4], longer[3])):
        np.testing.assert_allclose(row["test_loss"], other["test_loss"], rtol=1e-5)


def test_agents_stay_aligned_in_rounds_without_a_merge(tmp_path, monkeypatch):
    given, original = [], Measuring.__call__

    def measure(self, state, frames, *args):
        given.append(frames)
        return original(self, state, frames, *args)

    monkeypatch.setattr(Measuring, "__call__", measure)
    train.run(untrained("dimat", merge__every=2, rounds=2), tmp_path, quiet)
    before, merged, *trained = given
    assert before is None and merged is not None and len(trained) == 2
    assert all(frames is merged for frames in trained)


def test_a_misspelt_field_in_a_config_file_is_an_error():
    config = default_config()
    with pytest.raises(AttributeError, match="rounds"):
        config.roundz = 3
    with pytest.raises(AttributeError, match="frame"):
        config.merge.fram = "own"


def test_a_wrong_spec_is_found_before_any_training(tmp_path, monkeypatch):
    def wrong(model):
        spec = mlp.permutation_spec(model)
        axes = {**spec.axes, "params/head/kernel": (None, None)}
        return dataclasses.replace(spec, axes=axes)

    record = dataclasses.replace(models.MODELS["mlp"], spec=wrong)
    monkeypatch.setitem(models.MODELS, "mlp", record)
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match="params/head/kernel"):
        train.run(small(), workdir, quiet)
    assert not workdir.exists()


def _wrong_for_trained_weights(monkeypatch) -> None:
    """Lets new biases be 0 or 1, and declares that units with equal ones may move."""

    def init(model, key, inputs):
        variables = classifier_init(model, key, inputs)
        bias = variables["params"]["hidden0"]["bias"]
        variables["params"]["hidden0"]["bias"] = bias.at[:64].set(1)
        return variables

    def wrong(model):
        halves = Concat(("first", 64), ("second", 64))
        axes = dict(mlp.permutation_spec(model).axes)
        axes["params/hidden0/kernel"] = (None, halves)
        axes["params/hidden0/bias"] = (None,)
        axes["params/hidden1/kernel"] = (halves, "hidden1")
        return PermutationSpec(axes)

    classifier_init = classifier.init
    monkeypatch.setattr(classifier, "init", init)
    record = dataclasses.replace(models.MODELS["mlp"], spec=wrong)
    monkeypatch.setitem(models.MODELS, "mlp", record)


@pytest.mark.every_nth(2)
@pytest.mark.parametrize(
    ("epochs", "when", "phases"),
    [
        (1, "before the first merge", ["pretrained"]),
        (0, "at the end of the run", ["pretrained", "merged", "trained"]),
    ],
)
def test_a_spec_that_is_wrong_for_trained_weights_alone_is_found(
    tmp_path, monkeypatch, epochs, when, phases
):
    _wrong_for_trained_weights(monkeypatch)
    config = drop_unread(small("wm", agents=2, rounds=1, pretrain__epochs=epochs))
    message = rf"agent 0's weights {when}: .* groups 'first'.*'params/hidden0/kernel'"
    with pytest.raises(PermutationSpecError, match=message):
        train.run(config, tmp_path, quiet)
    assert [row["phase"] for row in read_evaluations(tmp_path)] == phases
    assert not (tmp_path / "summary.json").exists()
    # The same command finds it again, and computes nothing before that.
    with pytest.raises(PermutationSpecError, match=when):
        train.run(config, tmp_path, quiet)


def test_a_run_verifies_three_times_and_goes_on_if_rounding_hides_the_symmetry(
    tmp_path, monkeypatch
):
    calls, lines = [], []
    original = Verification.__call__

    def verify(self, variables, key):
        original(self, variables, key)
        calls.append((self, variables["params"]["head"]["kernel"]))
        if len(calls) > 1:
            raise InconclusiveError("which leaves rounding")

    monkeypatch.setattr(Verification, "__call__", verify)
    train.run(
        small("wm", agents=2, rounds=1, pretrain__epochs=1), tmp_path, lines.append
    )
    compiled, kernels = zip(*calls, strict=True)
    # One compiled program does it on new weights, before the merge, and at the end.
    assert len(compiled) == 3 and len(set(map(id, compiled))) == 1
    assert all((kernels[n] != kernels[n + 1]).all() for n in range(2))
    notes = [
        line for line in lines if "which leaves rounding (the run goes on)" in line
    ]
    assert ["the first merge" in note for note in notes] == [True, False]
    assert (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "checkpoints"])
def test_a_workdir_with_somebody_elses_files_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match="no fresh folder"):
        train.run(small(), tmp_path, quiet)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json cannot be used: "):
        train.run(small(), tmp_path, quiet)
