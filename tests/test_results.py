"""Runs and sweeps from Python: what their results offer, and their folders."""

import gc
import inspect
import json

import jax
import pytest
from tqdm import auto

import dimat_jax
from dimat_jax import _compile_cache, train
from dimat_jax._metrics import read_rows
from dimat_jax.errors import SweepError, UserError
from dimat_jax.results import RunResult, run, sweep
from tests.sweeping.small import small


def quiet(line: str) -> None:
    del line


def test_a_run_without_a_folder_has_a_result_that_can_be_looked_into():
    result = run(small("wa", rounds=1), log=quiet)
    assert isinstance(result, RunResult) and isinstance(result, dict)
    folder = result.workdir
    assert result == json.loads((folder / "summary.json").read_text())
    assert len(result.rows) == len(read_rows(folder)) == 5
    assert result.rows.phase.tolist()[:2] == ["pretraining"] * 2
    assert list(result.agents) == ["params"]
    assert jax.tree.leaves(result.agents)[0].shape[0] == 3
    assert result.experiment.placement.n_agents == 3
    assert result.figure("loss").axes and len(result.runs.evaluations) == 3
    # A notebook shows a figure by this, without pyplot.
    assert result.figure()._repr_png_().startswith(b"\x89PNG")
    assert "round 1, test accuracy " in repr(result) and len(repr(result)) < 200
    del result
    gc.collect()
    assert not folder.exists()


def test_a_sweep_has_the_results_of_its_runs_by_name_and_its_tables(tmp_path, capsys):
    configs = {"wa": small("wa", rounds=1, pretrain__epochs=0)}
    before = configs["wa"].to_json()
    results = sweep(configs, tmp_path / "sweep", seeds=2)
    assert configs["wa"].to_json() == before
    assert results.names == ["0-wa", "1-wa"]
    assert results["1-wa"].workdir == tmp_path / "sweep" / "1-wa"
    assert results["1-wa"]["round"] == 1
    (table,) = (t for title, t in results.tables.items() if title.startswith("Mean"))
    assert len(table) == 1
    assert set(results.rows.run) == {
        str(results[name].workdir) for name in results.names
    }
    assert results.figure().axes and "0-wa, 1-wa" in repr(results)
    # The same call goes on, and has nothing to do.
    again = sweep(configs, tmp_path / "sweep", seeds=2)
    assert again["0-wa"] == results["0-wa"]
    assert "holds this run, finished" in capsys.readouterr().out


def test_runs_of_a_sweep_that_fail_are_an_error(tmp_path, monkeypatch):
    def fail(*args: object) -> None:
        raise UserError("it is broken")

    monkeypatch.setattr(train, "run", fail)
    with pytest.raises(
        SweepError, match="1 of 1 runs have failed\n    a: it is broken"
    ):
        sweep({"a": small()}, tmp_path)


@pytest.mark.parametrize("jobs", [0, -1])
def test_a_number_of_jobs_is_at_least_one(tmp_path, jobs):
    with pytest.raises(UserError, match=f"jobs is {jobs}; it must be at least 1"):
        sweep({"a": small()}, tmp_path / "sweep", jobs=jobs)
    assert not (tmp_path / "sweep").exists()


def test_several_processes_need_a_folder_of_their_own(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="several processes need a workdir"):
        run(small())


def test_compiled_programs_are_kept_unless_jax_has_been_told_where(
    tmp_path, monkeypatch
):
    given = jax.config.values["jax_compilation_cache_dir"]
    _compile_cache.keep_compiled()
    assert jax.config.values["jax_compilation_cache_dir"] == given
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        _compile_cache.keep_compiled()
        kept = jax.config.values["jax_compilation_cache_dir"]
        assert kept == str(tmp_path / "dimat_jax" / "xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", given)
        _compile_cache.compilation_cache.reset_cache()


def test_the_bar_is_one_that_suits_notebooks():
    for function in (train.run, dimat_jax.run):
        assert inspect.signature(function).parameters["make_bar"].default is auto.tqdm
