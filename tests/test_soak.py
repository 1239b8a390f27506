"""The soak of experiments/soak, in a short form."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from dimat_jax.config import check, fields_of
from dimat_jax.options import OptionError
from experiments.soak import _figures, _mistakes
from experiments.soak._cases import Case, Failure, do
from experiments.soak._children import Ended
from experiments.soak._draws import OPTIONS, draw

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("runs", "mistakes"), [(1, 3), pytest.param(8, 60, marks=pytest.mark.slow)]
)
def test_a_short_soak_finds_nothing(tmp_path, runs, mistakes):
    command = [sys.executable, "-m", "experiments.soak", f"--out={tmp_path}"]
    environment = {k: v for k, v in os.environ.items() if k != "PJRT_NPROC"}
    environment["JAX_COMPILATION_CACHE_DIR"] = os.environ["DIMAT_TEST_COMPILED"]
    ended = subprocess.run(
        # The first run of this seed is one of `cdsgd`, which is killed.
        [*command, "--seed=46", f"--runs={runs}", f"--mistakes={mistakes}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["cases"] == runs + mistakes and not any(found["failures"].values())
    assert found["counts"]["configs"] == runs
    # A run may end before the signal that is meant to kill it.
    disturbances = ("kills", "damages", "signals that came too late")
    assert sum(found["counts"].get(name, 0) for name in disturbances) > 0
    assert found["counts"]["bad inputs"] > mistakes / 2


def test_drawn_configs_differ_pass_the_checks_and_can_be_drawn_again(tmp_path):
    drawn = [draw(str(seed), tmp_path) for seed in range(5)]
    for config in drawn:
        check(config)
    assert len({config.algorithm for config in drawn}) > 2
    assert fields_of(draw("3", tmp_path)) == fields_of(drawn[3])


def test_every_wrong_value_of_an_option_is_refused_by_it():
    """Texts are read by the command line first, which refuses some of them."""
    n_refused = 0
    for option in OPTIONS.values():
        values = list(_mistakes.wrong_values(option))
        assert len(values) > 2
        for text in values:
            kind = type(option.default)
            try:
                value = {int: int, float: float}.get(kind, str)(text)
            except ValueError:
                n_refused += 1
                continue
            if not (option.choices is None and kind in (str, bool)):
                with pytest.raises(OptionError):
                    option.check(value)
                n_refused += 1
    assert n_refused > 400


def test_a_case_notes_what_is_wrong_and_keeps_its_files(tmp_path):
    def work(case: Case) -> None:
        (case.folder / "file").touch()
        case.count("kills", 2)
        case.expect_message("an input", Ended(2, "error: one\nerror: two", 0.1), 1.0)

    def broken(case: Case) -> None:
        raise ZeroDivisionError

    for number, function in enumerate((work, broken, lambda case: case.count("kills"))):
        path = tmp_path / f"{number}.json"
        do(Case("runs", number, 5, tmp_path / str(number)), function, path)
    records = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(3)]
    assert [f["kind"] for r in records for f in r["failures"]] == ["messages", "soak"]
    found = _figures.figures(records)
    assert found["counts"]["kills"] == 3 and found["failures"]["messages"] == 1
    assert "| kills | 3 |" in _figures.table(found)
    assert (tmp_path / "0" / "file").exists() and not (tmp_path / "2").exists()


@pytest.mark.parametrize(
    ("ended", "kind"),
    [
        (Ended(1, "Traceback (most recent call last):", 0.1), "traceback"),
        (Ended(0, "", 0.1), "exit code"),
        (Ended(2, "", 0.1), "messages"),
        (Ended(2, "error: slow", 9.0), "slow"),
    ],
)
def test_what_is_no_message_is_a_failure(tmp_path, ended, kind):
    case = Case("mistakes", 0, 0, tmp_path)
    with pytest.raises(Failure):
        case.expect_message("an input", ended, 1.0)
    assert case.failures[0]["kind"] == kind


def test_numbers_of_a_case_depend_on_its_name_and_the_seed_alone(tmp_path):
    cases = [Case("runs", n, s, tmp_path) for n, s in ((1, 0), (1, 0), (2, 0), (1, 1))]
    drawn = [case.rng.random() for case in cases]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    assert drawn[0] == random.Random("0 runs:1").random()
