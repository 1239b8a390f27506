"""Tests the programs as a user runs them: exit codes, messages, files, and resuming."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dimat_jax import reports
from dimat_jax._metrics import read_evaluations, read_rows
from dimat_jax.cli._bundled import load_runs

ROOT = Path(__file__).parents[2]
SMALL = (
    "--config=configs/quickstart.py",
    "--config.agents=3",
    "--config.rounds=3",
    "--config.data.train_size=300",
    "--config.data.test_size=100",
    "--config.pretrain.epochs=3",
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    # The programs get a cache of their own, where they store their compiled code.
    cache = tmp_path_factory.mktemp("cache")
    return {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONUNBUFFERED": "1"}


def command(program: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"experiments.{program}", *arguments]


def run(environment, program: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(program, *arguments),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def without_times(rows: list[dict]) -> list[dict]:
    times = ("seconds_total", "merge_seconds")
    return [{k: v for k, v in row.items() if k not in times} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, environment) -> tuple[Path, str]:
    """The workdir of a small run of the program, and the text that it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    result = run(environment, "train", *SMALL, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    return workdir, result.stdout


def test_train_prints_a_line_for_every_evaluation_and_names_its_files(finished):
    workdir, printed = finished
    assert printed.count("test accuracy") == 1 + 2 * 3
    tables = ("md", "html", "tex", "csv")
    figures = ("accuracy", "loss", "consensus", "bytes", "agents", "partition")
    for name in (*(f"report.{t}" for t in tables), *(f"{f}.png" for f in figures)):
        assert f"wrote {workdir / name}" in printed
        assert (workdir / name).stat().st_size > 0
    assert "\r" not in printed  # no progress bar without a terminal


@pytest.mark.slow
def test_a_run_killed_with_kill_9_resumes_with_the_same_results(
    tmp_path, environment, finished
):
    arguments = (*SMALL, f"--workdir={tmp_path}")
    process = subprocess.Popen(
        command("train", *arguments),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(read_evaluations(tmp_path)) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "summary.json").exists(), "it was too fast to be killed"

    result = run(environment, "train", *arguments)
    assert result.returncode == 0, result.stderr
    assert "going on after local step" in result.stdout
    ours, theirs = read_rows(tmp_path), read_rows(finished[0])
    assert without_times(ours) == without_times(theirs)


@pytest.mark.every_nth(3)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.roundz=3"], "no field 'roundz'; did you mean 'rounds'?"),
        (["--config.merge.fram=own"], "did you mean 'merge.frame'"),
        (["--config.rounds=many"], "expected a whole number"),
        (["--config.algorithm=dimatt"], "did you mean 'dimat'"),
        (["--config=configs/nowhere.py"], "configs/nowhere.py"),
        (["--config=quickstrat"], "did you mean 'quickstart'"),
        (["--config=configs/cifar100_resnet20.py:tiny"], "is paper, small or bench"),
        (["--roundz=3"], "Unknown command line flag 'roundz'"),
        (["rounds=3"], "expected only flags"),
        (["--config.data.name=cifar100", "--config.data.dir=/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_ends_with_one_message_and_exit_code_2(
    tmp_path, environment, arguments, message
):
    workdir = tmp_path / "run"
    config = [] if arguments[0].startswith("--config=") else [SMALL[0]]
    result = run(environment, "train", *config, *arguments, f"--workdir={workdir}")
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not workdir.exists()


def test_a_loss_that_is_not_finite_exits_with_1(tmp_path, environment):
    result = run(
        environment,
        "train",
        *SMALL,
        "--config.pretrain.optimizer.name=sgd",
        "--config.pretrain.optimizer.learning_rate=1e30",
        f"--workdir={tmp_path}",
    )
    assert result.returncode == 1
    assert "is not finite" in result.stderr
    assert "Traceback" not in result.stderr


def test_another_config_in_the_same_workdir_exits_with_2(environment, finished):
    workdir, _ = finished
    result = run(
        environment, "train", *SMALL, "--config.seed=1", f"--workdir={workdir}"
    )
    assert result.returncode == 2
    assert "seed (0 there, 1 here)" in result.stderr


SWEEP = """
from configs import quickstart

def get_runs():
    runs = {}
    for algorithm in ("dimat", "wa"):
        for seed in (0, 1):
            config = quickstart.get_config(algorithm)
            config.update_from_flattened_dict(
                {"seed": seed, "agents": 3, "rounds": 2, "pretrain.epochs": 1}
            )
            runs[f"{algorithm}-{seed}"] = config
    return runs
"""


@pytest.mark.slow
def test_a_sweep_runs_all_its_configs_and_reports_over_seeds(tmp_path, environment):
    sweep = tmp_path / "sweep.py"
    sweep.write_text(SWEEP)
    workdir = tmp_path / "out"
    arguments = (f"--sweep={sweep}", f"--workdir={workdir}")
    result = run(environment, "sweep", *arguments)
    assert result.returncode == 0, result.stderr
    for name in ("dimat-0", "dimat-1", "wa-0", "wa-1"):
        assert json.loads((workdir / name / "summary.json").read_text())["round"] == 2
    # There is one set of agents for each seed, and a lock for each.
    assert len(list((workdir / "pretrained").glob("[!.]*"))) == 2
    runs = reports.load([workdir])
    assert runs.fields == ["algorithm"]
    summary, by_round, _, by_kind = reports.tables(runs).values()
    assert list(summary.index) == ["dimat", "wa"]
    assert list(by_kind.matching > 0) == [True, False]
    cells = summary["trained (last round)"]
    assert all("±" in cell and cell.endswith("(n=2)") for cell in cells)
    evaluations = runs.evaluations
    mean = evaluations[
        (evaluations.algorithm == "wa")
        & (evaluations.phase == "merged")
        & (evaluations["round"] == 1)
    ].test_accuracy_mean.mean()
    assert by_round.loc["wa", 1] == pytest.approx(100 * mean, abs=0.06)
    assert "nothing" not in result.stdout

    again = run(environment, "sweep", *arguments)
    assert again.returncode == 0 and again.stdout.count("this run, finished") == 4


def test_report_refuses_a_folder_without_runs(tmp_path, environment):
    result = run(environment, "report", str(tmp_path))
    assert result.returncode == 2 and "no run" in result.stderr


def test_a_sweep_that_does_not_exist_is_refused(tmp_path, environment):
    result = run(environment, "sweep", "--sweep=graph", f"--workdir={tmp_path}")
    assert result.returncode == 2 and "did you mean 'graphs'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["merge", "scale"])
def test_bench_writes_ratios(tmp_path, environment, name):
    out = tmp_path / "bench.json"
    result = run(environment, "bench", name, *SMALL[:2], f"--out={out}", "--repeats=1")
    assert result.returncode == 0, result.stderr
    content = json.loads(out.read_text())
    ratio = {
        "merge": "merge_per_local_epoch",
        "scale": "per_agent_relative_to_one",
    }[name]
    assert content[ratio]


@pytest.mark.slow
def test_bench_merge_compares_ways_to_merge_trained_agents(
    tmp_path, environment, finished
):
    out = tmp_path / "bench.json"
    result = run(
        environment,
        "bench",
        "merge",
        *SMALL,
        "--config.merge.frame=own",
        "--config.merge.batch_size=20",
        f"--agents={finished[0]}",
        f"--out={out}",
        "--repeats=1",
        "--steps=1",
    )
    assert result.returncode == 0, result.stderr
    merges = json.loads(out.read_text())["merges"]
    assert merges.keys() == {"published", "round", "few"}
    for found in merges.values():
        assert found["seconds"] > 0 and found["peak_bytes"] > 0
        assert 0.1 < found["accuracy"] <= 1
        assert found["published_per_this"] > 0
    assert merges["published"]["images"] == merges["round"]["images"] == 300
    assert merges["few"]["images"] < 300
    assert merges["round"]["accuracy"] == merges["published"]["accuracy"]
    assert merges["round"]["seconds_by_phase"].keys() >= {"activations", "assignment"}
    assert "times as fast as published" in result.stdout


@pytest.mark.parametrize(
    ("bench", "flag", "message"),
    [
        ("scale", "--agents=runs/digits", "--agents is for merge; scale does not"),
        ("train", "--speed=2", "--speed is for scale; train does not"),
        ("gpt2", "--repeats=1", "--config is not for gpt2, which reads no config"),
    ],
)
def test_a_benchmark_refuses_the_flags_of_others(
    tmp_path, environment, bench, flag, message
):
    out = tmp_path / "bench.json"
    result = run(environment, "bench", bench, SMALL[0], flag, f"--out={out}")
    assert result.returncode == 2 and message in result.stderr
    assert not out.exists()


@pytest.mark.slow
def test_bench_scale_times_a_single_agent_and_reads_the_hardware(tmp_path, environment):
    out = tmp_path / "bench.json"
    hardware = {"bandwidth": 1.0, "latency": 2.0, "agents_per_device": 4, "speed": 3.0}
    given = [f"--{name}={value}" for name, value in hardware.items()]
    arguments = ("--config=quickstart:centralized", f"--out={out}", "--repeats=1")
    result = run(environment, "bench", "scale", *arguments, *given)
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    assert found["per_agent_relative_to_one"] == {"1": 1}
    assert found["hardware"] == hardware


def test_bench_refuses_hardware_for_a_benchmark_that_predicts_nothing(
    tmp_path, environment
):
    out = tmp_path / "bench.json"
    result = run(environment, "bench", "train", "--speed=3", f"--out={out}")
    assert result.returncode == 2 and not out.exists()
    assert "--speed is for scale; train does not read it" in result.stderr


def test_bench_refuses_to_time_the_merge_of_an_algorithm_without_one(
    tmp_path, environment
):
    out = tmp_path / "bench.json"
    config = "--config=quickstart:local"
    result = run(environment, "bench", "merge", config, f"--out={out}")
    assert result.returncode == 2 and not out.exists()
    assert "config.algorithm is 'local'; it does not merge" in result.stderr


SWEEPS = sorted(path.stem for path in (ROOT / "configs" / "sweeps").glob("[!_]*.py"))


@pytest.mark.parametrize(
    "name",
    # It has hundreds of runs.
    [
        pytest.param(n, marks=[pytest.mark.slow] * (n == "learning_rates"))
        for n in SWEEPS
    ],
)
def test_every_sweep_file_loads(name):
    path = ROOT / "configs" / "sweeps" / f"{name}.py"
    assert load_runs(str(path)).keys() == load_runs(name).keys()
