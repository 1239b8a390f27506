"""All runs of a sweep are checked before the first one, and start in a good order."""

import pytest

from dimat_jax import train
from dimat_jax._sweeping import prepare
from dimat_jax._sweeping._plan import in_order, pretraining_key, unfinished
from dimat_jax.config import ConfigError
from tests.sweeping.small import jobs, small


def test_a_config_that_cannot_run_is_refused_before_any_run_starts(tmp_path):
    bad = small()
    bad.rounds = -1
    with pytest.raises(ConfigError, match="rounds is -1"):
        prepare({"good": small(), "bad": bad}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_another_run_is_refused_before_any_run_starts(tmp_path):
    train.run(small(pretrain__epochs=0, rounds=0), tmp_path / "b", lambda line: None)
    with pytest.raises(ConfigError, match="b holds the run of another config"):
        jobs(tmp_path, a=small(), b=small("local"))
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_runs_share_agents_in_a_folder_of_the_sweep_unless_a_config_names_one(
    tmp_path,
):
    own = small(pretrain__cache_dir="elsewhere")
    first, second, third = jobs(tmp_path, a=small(), b=own, c=small(pretrain__epochs=0))
    assert first.config.pretrain.cache_dir == str(tmp_path / "pretrained")
    assert second.config.pretrain.cache_dir == "elsewhere"
    assert third.config.pretrain.cache_dir == ""


def test_the_folder_of_the_data_reaches_the_configs_that_read_it(tmp_path):
    config = small()
    config.data.name = "cifar10"
    made = prepare({"digits": small(), "cifar": config}, tmp_path, "DATA")
    assert [job.config.data.dir for job in made] == ["", "DATA"]


def test_only_runs_that_pretrain_the_same_agents_have_the_same_key(tmp_path):
    made = jobs(
        tmp_path,
        a=small("wa"),
        b=small("dimat", rounds=7),
        seed=small(seed=1),
        agents=small(agents=4),
        epochs=small(pretrain__epochs=3),
        none=small(pretrain__epochs=0),
    )
    keys = {job.name: pretraining_key(job.config) for job in made}
    assert keys["a"] == keys["b"] is not None
    assert len(set(keys.values())) == 5 and keys["none"] is None


def test_runs_that_pretrain_different_agents_start_first(tmp_path):
    made = jobs(
        tmp_path,
        wa0=small(),
        local0=small("local"),
        wa1=small(seed=1),
        none=small(pretrain__epochs=0),
        local1=small("local", seed=1),
    )
    order = [job.name for job in in_order(made)]
    assert order == ["wa0", "wa1", "none", "local0", "local1"]


def test_finished_runs_are_left_out_and_named(tmp_path, capsys):
    made = jobs(tmp_path, a=small(), b=small("local"))
    made[1].workdir.mkdir()
    (made[1].workdir / "config.json").write_text(small("local").to_json())
    (made[1].workdir / "summary.json").write_text("{}")
    assert unfinished(made) == made[:1]
    assert capsys.readouterr().out == f"{tmp_path / 'b'} holds this run, finished\n"
