"""`dimat show CONFIG` says what a config will do, and writes nothing."""

import re
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from dimat_jax._forecast import what_is_sent
from dimat_jax._sweeping import Share, StepTime, Timing
from dimat_jax.cli import _outlook
from dimat_jax.cli._outlook import _bytes, _duration, outlook
from dimat_jax.config import default_config
from dimat_jax.data.sources import DataError, Dataset, Split
from dimat_jax.errors import SweepError
from dimat_jax.experiment import Experiment
from dimat_jax.mixing import spectral_gap
from tests.sweeping.small import small


def topics(text: str) -> dict[str, str]:
    """What is said about each topic, in one line."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        assert len(line) <= 88
        label = line[:13].strip()
        found.setdefault(label or list(found)[-1], []).append(line[13:].strip())
    return {label: " ".join(lines) for label, lines in found.items()}


def test_it_says_who_does_what_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small("dimat", agents=4, data__validation=0.1, eval__every=2)
    experiment = Experiment(config)
    said = topics(outlook(config, 0))
    assert said["data"] == (
        "digits: 300 training and 100 test samples of 8 x 8 x 1, in 10 classes "
        f"{sum(map(len, experiment.division.validation))} of the training samples are "
        "for validation"
    )
    assert said["agents"].startswith("4 x mlp: 26,122 params, 104 kB each; they start ")
    for agent, shard in enumerate(experiment.shards):
        assert re.search(rf" {agent} +{len(shard)} ", said["agents"])
    gap = spectral_gap(experiment.links.mixing_matrix)
    assert f"gap {gap:.3g}, rho {(1 - gap) ** 2:.3g}" in said["network"]
    assert "0 hears 1, 3; 1 hears 0, 2; 2 hears 1, 3; 3 hears 0, 2" in said["network"]
    assert "absent" not in said["network"]
    alone, per_round = experiment.pretrain_steps, experiment.local_steps
    assert said["training"] == (
        f"dimat, with adam at a learning rate of 0.001 (constant) alone: 2 epochs, "
        f"{alone} steps together: 2 rounds of {per_round} steps, {2 * per_round} steps "
        "with batches of 32"
    )
    assert said["exchange"] == "a merge at the beginning of every round"
    assert said["evaluation"] == "all test samples in one round of 2, and at the end"
    sent = what_is_sent(experiment)
    assert said["sent"] == (
        f"{_bytes(sent.first_round)} in the first round, {_bytes(sent.total)} in all, "
        f"in 4 communication rounds of each agent params "
        f"{_bytes(sent.by_kind['params'])}, optimizer "
        f"{_bytes(sent.by_kind['optimizer'])}, matching "
        f"{_bytes(sent.by_kind['matching'])}"
    )
    assert said["time"] == "unknown: --seconds=0 times no local step"
    # Adam keeps two moments beside the weights, and a counter or two.
    assert said["memory"].startswith(f"{_bytes(4 * 3 * 4 * 26_122)} for the state ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("algorithm", "changes", "topic", "text"),
    [
        ("fedavg", {}, "network", "agents send to a server"),
        ("fedavg", {"server__sampled": 2}, "network", "2 agents, drawn anew in each"),
        ("fedavg", {}, "exchange", "at the beginning of every round"),
        ("local", {}, "network", "no agent sends anything"),
        ("local", {}, "exchange", "never"),
        ("local", {}, "sent", "0 B in the first round, 0 B in all"),
        ("centralized", {}, "agents", "1 x mlp"),
        ("sgp", {"topology": "one_peer_exponential"}, "network", "a period of 2: eve"),
        ("cga", {}, "exchange", "with every local step"),
        ("wa", {"merge__every": 3}, "exchange", "beginning of one round of 3"),
        (
            "wa",
            {"merge__every": 3, "merge__unit": "steps"},
            "exchange",
            "a merge in every round, before its first step and every 3",
        ),
        (
            "wa",
            {"faults__edge_loss": 0.25, "faults__absences": "2:1-"},
            "network",
            "a link fails with probability 0.25; absences: 2:1-",
        ),
        ("wa", {"topology": "star", "agents": 4}, "network", "hears 1 to 3 others"),
        ("wa", {"agents": 30}, "agents", "10 to 10 samples each, with a median of 10"),
        ("wa", {"topology": "fully_connected"}, "network", "gap 1, rho 0"),
        (
            "wa",
            {"checkpoint__every": 5, "checkpoint__every_minutes": 0.0},
            "saved",
            "a checkpoint after one round of 5; the last 2 are kept",
        ),
    ],
)
def test_it_describes_every_kind_of_run(algorithm, changes, topic, text):
    assert text in topics(outlook(small(algorithm, **changes), 0))[topic]


def test_without_the_data_it_says_what_it_can(tmp_path):
    changes = {"data__name": "cifar100", "data__dir": str(tmp_path)}
    said = topics(outlook(small("wa", data__train_size=0, **changes), 0))
    assert said["data"].startswith("cifar100, which cannot be read here: cifar100: no ")
    assert said["data"].endswith("So the numbers of images and of steps are unknown.")
    assert said["training"].endswith("2 epochs alone, then 2 rounds")
    assert said["network"] == (
        "ring: every agent hears 2 others weights uniform: spectral gap 1, rho 0"
    )
    # The weights, and two moments of them with a counter.
    assert re.match(r"[\d.]+ MB with a communication, to each neighbour", said["sent"])
    assert said["time"] == "unknown without the data"
    said = topics(outlook(small("fedavg", data__train_size=0, **changes), 0))
    assert re.fullmatch(r"[\d.]+ MB to the server", said["sent"])


def test_missing_data_that_alone_tell_the_form_of_their_inputs_are_named(tmp_path):
    changes = {"data__name": "npz", "data__dir": str(tmp_path / "none.npz")}
    with pytest.raises(DataError, match="none.npz"):
        outlook(small("wa", data__train_size=0, **changes), 0)


@pytest.mark.parametrize(
    ("labels", "n_outputs", "words"),
    [
        (np.array([0, 1, 9]), 10, "in 10 classes"),
        (np.ones((3, 1), np.float32), 1, "with labels of 1 number"),
        (np.ones((3, 2), np.float32), 2, "with labels of 2 numbers"),
        (np.ones((3, 64), np.int32), 84, "of 84 different tokens"),
    ],
)
def test_it_says_what_the_labels_are(labels, n_outputs, words):
    split = Split(np.ones((3, 64), np.float32), labels)
    experiment = SimpleNamespace(
        config=default_config(),
        dataset=Dataset("own", split, split, n_outputs, np.zeros(1), np.ones(1)),
        input_shape=(64,),
        n_classes=n_outputs,
        division=SimpleNamespace(validation=[], held_out=[]),
    )
    subject = _outlook._Subject(cast(Experiment, experiment), "", "")
    (said,) = _outlook._data(subject)
    assert said.endswith(f": 3 training and 3 test samples of 64, {words}")


class FakeTiming(Timing):
    """Stands for the process that times local steps."""

    found: StepTime | Exception | None = None

    def __init__(self, config, share):
        del config, share

    def wait(self, seconds=None):
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def test_the_time_is_that_of_all_steps_by_those_that_were_timed(monkeypatch):
    monkeypatch.setattr(_outlook, "Timing", FakeTiming)
    config = small("wa", pretrain__batch_size=64, rounds=100)
    experiment = Experiment(config)
    monkeypatch.setattr(FakeTiming, "found", StepTime(2.0, 3_000_000_000, "abacus"))
    said = topics(outlook(config, 10))
    # A step of pre-training has batches that are twice as large.
    seconds = 2 * (2 * experiment.pretrain_steps + 100 * experiment.local_steps)
    assert said["time"].startswith(
        f"about {_duration(seconds)} for local steps, of which 5 took 2.0 s each on "
        "this machine (abacus); "
    )
    assert said["memory"].endswith("the timed steps used up to 3.0 GB in all")
    monkeypatch.setattr(FakeTiming, "found", None)
    assert "not compiled and taken within 10 seconds" in outlook(config, 10)
    monkeypatch.setattr(FakeTiming, "found", SweepError("it has ended"))
    assert topics(outlook(config, 10))["time"] == "unknown: it has ended"


def test_a_failed_process_does_not_hide_what_is_wrong_with_the_config(monkeypatch):
    monkeypatch.setattr(_outlook, "Timing", FakeTiming)
    monkeypatch.setattr(FakeTiming, "found", SweepError("it has ended"))
    config = small("wa", data__train_size=1434)
    with pytest.raises(DataError, match="expected 1 to 1433 samples"):
        outlook(config, 10)


def test_a_process_that_takes_too_long_is_ended():
    timing = Timing(small("wa"), Share(None, {}, {}))
    assert timing.wait(0) is None
    assert not timing._process.is_alive()


def test_numbers_have_as_many_digits_as_they_are_worth():
    assert [_bytes(n) for n in (0, 999, 1000, 104_488, 10_000_000)] == [
        *("0 B", "999 B", "1.0 kB", "104 kB", "10 MB"),
    ]
    times = [0.00098, 0.5, 59.6, 600.0, 86400.0 * 10]
    assert [_duration(seconds) for seconds in times] == [
        *("0.98 ms", "0.50 s", "60 s", "10 minutes", "240 hours"),
    ]
