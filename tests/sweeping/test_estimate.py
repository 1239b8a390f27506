"""A dry run lists what each run would do and how long, and writes nothing."""

import json
import re

import pytest

from dimat_jax import train
from dimat_jax._forecast import what_is_sent
from dimat_jax._sweeping import describe
from dimat_jax._sweeping._estimate import _makespan, _Plan
from dimat_jax._sweeping._plan import pretraining_key
from dimat_jax._sweeping._shares import Share
from dimat_jax.experiment import Experiment
from tests.sweeping.small import jobs, small

WHOLE = Share(None, {}, {})


def cells(text: str) -> dict[str, list[str]]:
    """The cells of the table's rows, by the run's name."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.split("\n")[2:]]
    return {row[0]: row[1:] for row in rows if len(row) == 6}


def hours_in(text: str) -> list[float]:
    """The hours of all runs together, and of jobs side by side."""
    found = re.search(r"Together (\S+) hours; with --jobs=\d+ about (\S+) hours", text)
    assert found is not None
    return [float(hours) for hours in found.groups()]


@pytest.mark.slow
def test_a_dry_run_times_a_few_steps_and_writes_nothing(tmp_path):
    made = jobs(
        tmp_path,
        dimat=small("dimat"),
        wa=small("wa", rounds=4),
        none=small("wa", pretrain__epochs=0),
        wide=small("wa", agents=4),
    )
    text = describe(made, WHOLE, 2)
    assert not list(tmp_path.iterdir())
    rows = cells(text)
    # 100 examples are 4 batches of 32.
    assert rows["dimat"][:4] == ["new", "3", "8 steps", "2 x 4"]
    assert rows["wa"][:4] == ["new", "3", "shared with dimat", "4 x 4"]
    assert rows["none"][:4] == ["new", "3", "none", "2 x 4"]
    assert rows["wide"][:4] == ["new", "4", "6 steps", "2 x 3"]
    # Runs of one size are timed once.
    assert "5 local steps were timed: dimat, wide." in text
    assert "with the layout that is chosen without a race" in text
    together, side_by_side = hours_in(text)
    assert 0 < side_by_side <= together


def test_runs_that_have_been_timed_are_the_measure(tmp_path):
    made = jobs(
        tmp_path,
        finished=small("wa"),
        begun=small("wa", rounds=200),
        new=small("wa", rounds=100),
        other=small("local"),
        alone=small("wa", seed=1, rounds=50),
    )
    config = made[0].config
    summary = train.run(config, made[0].workdir, lambda line: None)
    # This run is here anyway; tests/test_forecast.py has those of other algorithms.
    assert what_is_sent(Experiment(config)).total == summary["bytes_sent_total"]
    # As if a step of the rounds took 90 seconds, and 18 in pre-training.
    rows = [
        {"round": 0, "phase": "pretrained", "step": 8, "seconds_total": 8 * 18.0},
        {"round": 1, "phase": "trained", "step": 12, "seconds_total": 8 * 18 + 360.0},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (made[0].workdir / "metrics.jsonl").write_text(text)
    (made[0].workdir / "metrics.digests").unlink()
    made[1].workdir.mkdir()
    (made[1].workdir / "metrics.jsonl").write_text(text)
    # The epochs of pre-training have been as fast, and half of them are done.
    epoch = {"round": 0, "phase": "pretraining", "epoch": 1, "step": 4}
    made[4].workdir.mkdir()
    (made[4].workdir / "metrics.jsonl").write_text(
        json.dumps({**epoch, "seconds_total": 4 * 18.0}) + "\n"
    )
    before = sorted(tmp_path.rglob("*"))

    text = describe(made, WHOLE, 1)
    assert sorted(tmp_path.rglob("*")) == before
    shown = cells(text)
    assert shown["finished"] == ["finished", "3", "done", "2 x 4", "0"]
    # 199 rounds of 4 steps are left.
    assert shown["begun"] == ["in round 1", "3", "done", "200 x 4", "19.9"]
    assert shown["new"] == ["new", "3", "agents are there", "100 x 4", "10.0"]
    assert shown["alone"] == [
        *("pre-trained for 1 epochs", "3", "4 steps", "50 x 4"),
        f"{(4 * 18 + 50 * 4 * 90) / 3600:.1f}",
    ]
    # No run of `local` has been timed, but runs of this model and size have.
    assert float(shown["other"][-1]) > 0
    assert "were timed" not in text
    assert hours_in(text)[0] == hours_in(text)[1]


def plan(job, steps_alone: int, waits_for: str | None) -> _Plan:
    return _Plan(job, "new", 3, "", steps_alone, 10, "", waits_for)


def test_a_run_that_shares_agents_cannot_start_before_they_are_trained(tmp_path):
    first, second, third = jobs(
        tmp_path, a=small(), b=small("local"), c=small(pretrain__epochs=0)
    )
    key = pretraining_key(first.config)
    plans = [plan(first, 5, None), plan(second, 0, key), plan(third, 0, None)]
    seconds = [(100.0, 10.0), (0.0, 20.0), (0.0, 30.0)]
    # The second job waits for 100 seconds, and then the third run takes 30 more.
    assert _makespan(plans, seconds, 2) == pytest.approx(140.0)
    assert _makespan(plans, seconds, 1) == pytest.approx(160.0)
