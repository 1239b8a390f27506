"""A package beside dimat_jax trains, resumes, sweeps, merges and reports.

The package `orchard` has a data set, models, an algorithm, a graph and a callback. It
is installed as pip would install it: its folder and its entry points are on the path.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

from dimat_jax import (
    ALGORITHMS,
    CALLBACKS,
    MODELS,
    SOURCES,
    TOPOLOGIES,
    plugins,
    reports,
    train,
)
from dimat_jax._inputs import from_plugins
from dimat_jax._metrics import read_evaluations, read_rows
from dimat_jax._sweeping import prepare, run_here
from dimat_jax._tuning import tune
from dimat_jax.algorithms import BETWEEN_MERGES
from dimat_jax.config import ConfigError, check, default_config, drop_unread
from dimat_jax.errors import UserError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
METADATA = "Metadata-Version: 2.1\nName: orchard\nVersion: 1.0\n"
ENTRY_POINTS = "[dimat_jax.plugins]\norchard = orchard\n"
REGISTRIES = (ALGORITHMS, BETWEEN_MERGES, CALLBACKS, MODELS, SOURCES, TOPOLOGIES)


def install(folder: Path) -> None:
    """Puts the package into a folder of the path."""
    shutil.copytree(HERE / "source" / "orchard", folder / "orchard")
    info = folder / "orchard-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINTS)


def forget() -> None:
    """Takes the package out of this process again."""
    for registry in REGISTRIES:
        for name in [name for name in registry if registry.origin(name)]:
            del registry[name]
    for name in [n for n in sys.modules if n.partition(".")[0] == "orchard"]:
        del sys.modules[name]
    plugins._installed.clear()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    install(folder)
    return folder


@pytest.fixture
def installed(site, monkeypatch) -> Iterator[None]:
    forget()
    monkeypatch.syspath_prepend(str(site))
    yield
    forget()


@pytest.fixture
def gone() -> None:
    """The package is not there, as on the machine of another person."""
    forget()


def small(**changes):
    config = default_config()
    fields = {
        "algorithm": "near_dgd",
        "agents": 3,
        "topology": "garland",
        "data.name": "fruit",
        "model.name": "pear",
        "rounds": 2,
        "local_epochs": 1,
        "batch_size": 20,
        "batch_norm.samples": 20,
        "batch_norm.batch_size": 20,
        "merge.match_samples": 20,
        "merge.batch_size": 20,
        "optimizer.learning_rate": 0.1,
        "pretrain.epochs": 2,
        "pretrain.optimizer.learning_rate": 0.02,
        "pretrain.batch_size": 20,
        "eval.batch_size": 30,
        "augmentation.flip": False,
        "augmentation.pad": 0,
        "callbacks": "diary,csv",
    }
    fields |= {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict(fields)
    return drop_unread(config)


def test_what_it_adds_is_known_with_its_options(installed):
    config = small(orchard__exchanges=3, orchard__chord=1, orchard__leaves=5)
    check(config)
    named = {each.field: each.module for each in from_plugins(config)}
    assert named == {
        "algorithm": "orchard.algorithm",
        "callbacks": "orchard.callback",
        "data.name": "orchard.data",
        "model.name": "orchard.models",
        "topology": "orchard.topology",
    }
    for field, message in {
        "orchard__chord": "config.orchard.chord is 0; it must be at least 1",
        "algorithm": "did you mean 'near_dgd'",
        "callbacks": "config.callbacks is 'dairy'; .* did you mean 'diary'",
    }.items():
        wrong = {"orchard__chord": 0, "algorithm": "near_dg", "callbacks": "dairy"}
        with pytest.raises(ConfigError, match=message):
            check(small(**{field: wrong[field]}))


@pytest.fixture(scope="module")
def runs(site, tmp_path_factory) -> Path:
    """A sweep of the package's runs: two algorithms, one of which merges."""
    folder = tmp_path_factory.mktemp("runs")
    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        configs = {
            "gossip": small(),
            "merging": small(algorithm="dimat", merge__inner="near_dgd"),
        }
        assert not run_here(prepare(configs, folder))
    forget()
    return folder


def test_it_trains_and_merges(runs):
    for name in ("gossip", "merging"):
        rows = read_rows(runs / name)
        assert [row["phase"] for row in rows][-2:] == ["merged", "trained"]
        assert rows[-1]["test_accuracy_mean"] > 0.6
        diary = (runs / name / "diary.txt").read_text().split("\n")
        assert diary[:-2] == [row["phase"] for row in rows]
        assert diary[-2] == "the end, round 2"
        table = pd.read_csv(runs / name / "metrics.csv")
        assert list(table.phase) == [row["phase"] for row in rows]
        means = [row["test_accuracy_mean"] for row in read_evaluations(runs / name)]
        np.testing.assert_allclose(table.test_accuracy_mean.dropna(), means)
    # Units of the model's two hidden layers were matched and permuted.
    assert rows[-2]["merge_seconds"].keys() >= {"assignment", "recalibration"}


def test_a_finished_run_can_be_looked_at_where_the_package_is_installed(
    runs, installed
):
    experiment, variables = train.load_agents(runs / "merging")
    assert experiment.task.spec.groups
    assert variables["params"]["Dense_0"]["kernel"].shape == (3, 16, 8)
    assert (variables["batch_stats"]["BatchNorm_0"]["var"] != 1).all()


def test_reports_need_no_package(runs, gone, tmp_path):
    assert "near_dgd" not in ALGORITHMS
    read = reports.load(runs)
    assert set(read.evaluations.algorithm) == {"near_dgd", "dimat"}
    assert len(reports.write([runs], tmp_path)) > 1
    with pytest.raises(UserError, match="no different values of rounds"):
        tune([runs], "rounds")


def test_other_programs_say_what_is_missing(runs, gone):
    with pytest.raises(
        UserError,
        match=r"gossip needs 'near_dgd' \(algorithm\): the plugin "
        r"'orchard.algorithm': ModuleNotFoundError: No module named 'orchard'",
    ):
        train.load_agents(runs / "gossip")


def test_a_callback_ends_a_run_which_then_counts_as_finished(installed, tmp_path):
    config = small(orchard__limit=1, rounds=50)
    lines = []
    summary = train.run(config, tmp_path, lines.append)
    assert summary["stopped"] == {"reason": "diary: the diary is full", "round": 1}
    assert "the run ends early: diary: the diary is full" in lines
    assert (tmp_path / "checkpoints" / "2").exists()
    assert train.run(config, tmp_path, lines.append) == summary
    assert len(reports.load(tmp_path).evaluations) == 3


@pytest.mark.slow
def test_a_sweep_in_processes_of_their_own_resumes(site, tmp_path):
    """As a user does it, with entry points alone."""
    (tmp_path / "two.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.plugin.test_package import small\n"
        "def get_runs():\n"
        "    return {'a': small(), 'b': small(model__name='plum', callbacks='')}\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]),
        "JAX_COMPILATION_CACHE_DIR": str(
            jax.config.values["jax_compilation_cache_dir"]
        ),
    }

    def sweep() -> str:
        program = "from dimat_jax.cli import main; main()"
        flags = ("--sweep=two.py", "--workdir=two", "--jobs=2")
        done = subprocess.run(
            [sys.executable, "-c", program, "sweep", *flags],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    sweep()
    run = tmp_path / "two" / "a"
    whole = without_times(read_rows(run))
    # The run goes on from the checkpoint of an earlier round.
    (run / "summary.json").unlink()
    saved = [path for path in (run / "checkpoints").iterdir() if path.is_dir()]
    shutil.rmtree(max(saved, key=lambda path: int(path.name)))
    assert "near_dgd" in sweep()
    assert "going on after local step" in (run / "run.log").read_text()
    assert without_times(read_rows(run)) == whole


def without_times(rows: list[dict]) -> list[dict]:
    times = ("seconds_total", "merge_seconds")
    return [{k: v for k, v in row.items() if k not in times} for row in rows]
