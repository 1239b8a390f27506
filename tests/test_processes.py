"""Runs in two processes with two devices each, over loopback.

Processes take seconds to start and to compile. So one pair runs all small experiments,
another one is killed and resumes, and the wrong commands run side by side.
"""

import contextlib
import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from dimat_jax import train
from dimat_jax._metrics import read_evaluations, read_rows
from dimat_jax._processes import (
    check_equal,
    everywhere,
    from_main,
    together,
)
from dimat_jax.cli._multihost import check_arguments
from dimat_jax.errors import UserError
from tests.processes import RUNS, config_of

ROOT = Path(__file__).parents[1]
TIMES = ("seconds_total", "merge_seconds")
# A run that goes on long enough to be killed.
LONG = (
    "--config=quickstart:wa",
    "--config.agents=4",
    "--config.rounds=20",
    "--config.local_epochs=1",
    "--config.data.train_size=200",
    "--config.data.test_size=50",
    "--config.pretrain.epochs=1",
    "--config.model.width=.125",
    "--config.placement.cpu_devices=2",
)


def free_port() -> int:
    """A free port below those that the system gives to outgoing connections."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def none_is_left() -> Iterator[None]:
    """Ends the processes that a test has started and, since it failed, left."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


def start(command: Sequence[str]) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": os.environ["DIMAT_TEST_COMPILED"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    # The number of threads that this process has asked for is not the program's own.
    environment.pop("PJRT_NPROC", None)
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(process)
    return process


def start_training(
    *commands: Sequence[str], n_processes: int = 2, arrival_timeout: int = 60
) -> list[subprocess.Popen]:
    """Starts the first processes of a run, with a command for each."""
    flags = (
        "--multihost",
        f"--coordinator=127.0.0.1:{free_port()}",
        f"--n_processes={n_processes}",
        f"--arrival_timeout={arrival_timeout}",
    )
    return [
        start(["experiments.train", *command, *flags, f"--process_id={process}"])
        for process, command in enumerate(commands)
    ]


def ended(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str, str]:
    """Waits for a process: its exit code, and what it has printed."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"a process did not end:\n{out}\n{err}")
    return process.returncode, out, err


def assert_one_message(err: str, *parts: str) -> None:
    """Asserts that stderr has one line of ours, with these parts, and no traceback."""
    assert "Traceback" not in err and "Fatal Python error" not in err, err
    (message,) = [line for line in err.splitlines() if line.startswith("error: ")]
    for part in parts:
        assert part in message, message


def without_times(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


# All experiments at once ==============================================================


# Merging, gossip and push-sum are in every run of the tests.
IN_EVERY = ("reference frame, five agents", "gossip", "push-sum")
OTHERS = [name for name in RUNS if name not in IN_EVERY]


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory) -> Path:
    """The folder of the runs that two processes have done, for the selected tests."""
    folder = tmp_path_factory.mktemp("pair")
    cases = [getattr(item, "callspec", None) for item in request.session.items]
    selected = {case.params.get("name") for case in cases if case}
    names = [name for name in RUNS if name in selected or name in IN_EVERY]
    coordinator = f"127.0.0.1:{free_port()}"
    processes = [
        start(["tests.processes", str(folder), coordinator, "2", str(process), *names])
        for process in range(2)
    ]
    for number, process in enumerate(processes):
        code, out, err = ended(process, 280)
        assert code == 0, f"process {number}:\n{out}\n{err}"
        # Process 0 alone reports.
        n_evaluations = sum(len(read_evaluations(folder / name)) for name in names)
        assert out.count("test accuracy") == (0 if number else n_evaluations)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Callable[[str, int], Path]:
    """Does a run in this process, once for each number of devices."""

    @functools.cache
    def run(name: str, cpu_devices: int) -> Path:
        workdir = tmp_path_factory.mktemp("alone")
        train.run(config_of(name, cpu_devices), workdir, lambda line: None)
        return workdir

    return run


@pytest.mark.parametrize(
    ("name", "cpu_devices"),
    [
        *((name, 4) for name in IN_EVERY),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in IN_EVERY),
        *(pytest.param(name, 4, marks=pytest.mark.slow) for name in OTHERS),
    ],
)
def test_two_processes_find_what_one_process_finds(pair, alone, name, cpu_devices):
    ours, theirs = read_rows(pair / name), read_rows(alone(name, cpu_devices))
    assert [list(row) for row in ours] == [list(row) for row in theirs]
    for row, expected in zip(without_times(ours), without_times(theirs), strict=True):
        for field, value in row.items():
            if isinstance(value, (str, int, dict)) or field == "bytes_sent_by_link":
                assert value == expected[field], field
            else:
                # Sums over processes are rounded in another order.
                np.testing.assert_allclose(value, expected[field], rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("own frames, own data, BatchNorm", marks=pytest.mark.slow),
        "push-sum",
    ],
)
def test_the_agents_of_two_processes_are_loaded_in_one(pair, alone, name):
    _, agents = train.load_agents(pair / name)
    _, expected = train.load_agents(alone(name, 4))
    assert jax.tree.structure(agents) == jax.tree.structure(expected)
    for leaf, other in zip(*map(jax.tree.leaves, (agents, expected)), strict=True):
        assert isinstance(leaf, np.ndarray) and len(leaf) == 4
        np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=1e-5)


def test_two_processes_share_the_agents_that_they_have_pre_trained(pair):
    names = [name for name in RUNS if (pair / name).is_dir()]
    starts = {(RUNS[n].get("agents"), RUNS[n].get("model.norm")) for n in names}
    assert len(list((pair / "pretrained").iterdir())) == len(starts) < len(names)
    first = [read_evaluations(pair / name)[0] for name in ("gossip", "push-sum")]
    assert first[0]["test_loss"] == first[1]["test_loss"]


# A process dies =======================================================================


@pytest.mark.slow
def test_when_a_process_is_killed_the_other_ends_and_the_run_resumes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = (*LONG, f"--workdir={killed}")
    others = start_training(*[(*LONG, f"--workdir={whole}")] * 2)
    for victim in (1, 0):
        processes = start_training(command, command)
        n_rows = len(read_evaluations(killed)) + 5
        deadline = time.monotonic() + 120
        while len(read_evaluations(killed)) < n_rows and time.monotonic() < deadline:
            time.sleep(0.02)
        processes[victim].send_signal(signal.SIGKILL)
        processes[victim].communicate()
        code, out, err = ended(processes[1 - victim])
        assert code == 1, out + err
        assert_one_message(err, "another process of the run has ended", "same command")
        assert not (killed / "summary.json").exists(), "it was too fast to be killed"
        if victim:
            shutil.copytree(killed, tmp_path / "copy")

    for process in (*others, *start_training(command, command)):
        code, out, err = ended(process)
        assert code == 0, out + err
    assert without_times(read_rows(killed)) == without_times(read_rows(whole))

    # One process goes on with what two have begun.
    config = train.load_agents(whole)[0].config
    train.run(config, tmp_path / "copy", lambda line: None)
    last, expected = (read_evaluations(d)[-1] for d in (tmp_path / "copy", whole))
    assert last["bytes_sent_total"] == expected["bytes_sent_total"]
    np.testing.assert_allclose(last["test_loss"], expected["test_loss"], rtol=1e-2)


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_after_the_same_step(tmp_path):
    """And the run goes on as if it had never been interrupted."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    steps = ("--config.local_epochs=0", "--config.local_steps=300", "--config.rounds=2")
    for number, victim in ((signal.SIGTERM, 1), (signal.SIGHUP, 0)):
        command = (*LONG, *steps, f"--workdir={stopped}")
        processes = start_training(command, command)
        n_rows = 2 if victim else 4
        deadline = time.monotonic() + 120
        while len(read_evaluations(stopped)) < n_rows and time.monotonic() < deadline:
            time.sleep(0.02)
        processes[victim].send_signal(number)
        results = [ended(process) for process in processes]
        assert [code for code, _, _ in results] == [128 + number] * 2, results
        lasts = {err.strip().splitlines()[-1] for _, _, err in results}
        (last,) = lasts
        assert f"{number.name}: the run has ended after local step " in last
        assert "everything is saved" in last
    command = (*LONG, *steps, f"--workdir={stopped}")
    others = start_training(*[(*LONG, *steps, f"--workdir={whole}")] * 2)
    for process in (*start_training(command, command), *others):
        code, out, err = ended(process)
        assert code == 0, out + err
    assert without_times(read_rows(stopped)) == without_times(read_rows(whole))


# Bad input ============================================================================


@pytest.mark.slow
def test_processes_that_disagree_or_are_missing_end_with_one_message(tmp_path):
    command = (*LONG, f"--workdir={tmp_path / 'run'}")
    other = (*command, "--config.seed=1", "--config.batch_size=16")
    few = (*command, "--config.agents=1", "--config.topology=disconnected")
    # The processes wait for each other, so these pairs cost as much as one.
    pairs = {
        "configs": start_training(command, other),
        "devices": start_training(
            command, (*command, "--config.placement.cpu_devices=1")
        ),
        "agents": start_training(few, few),
        "missing": start_training(command, command, n_processes=3, arrival_timeout=9),
    }
    messages = {
        "configs": ("config.batch_size (32 on process 0, 16 on process 1)", "seed"),
        "devices": ("same number of devices", "2 on process 0, 1 on process 1"),
        "agents": ("1 agents are too few for 2 processes",),
        "missing": ("the 3 processes did not arrive", "within 9 seconds"),
    }
    for name, processes in pairs.items():
        for process in processes:
            code, out, err = ended(process)
            assert code == 2, f"{name}: {out}\n{err}"
            assert_one_message(err, *messages[name])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1234", None, None), "given together"),
        ((None, 2, 0), "given together"),
        (("localhost:1234", 2, 2), "--process_id must be from 0 to 1"),
        (("localhost", 2, 0), "HOST:PORT"),
        (("localhost:http", 2, 0), "HOST:PORT"),
        (("localhost:99999", 2, 0), "HOST:PORT"),
    ],
)
def test_arguments_that_name_no_process_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        check_arguments(*arguments)


def test_a_port_that_is_taken_is_refused():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .* is taken"):
            check_arguments(f"localhost:{port}", 2, 0)


def test_flags_of_a_process_need_the_flag_multihost(tmp_path):
    process = start(
        ["experiments.train", *LONG, f"--workdir={tmp_path}", "--n_processes=2"]
    )
    code, _, err = ended(process)
    assert code == 2
    assert_one_message(err, "--n_processes needs --multihost")


def test_a_single_process_agrees_with_itself():
    assert everywhere({"a": (1, 2)}) == [{"a": (1, 2)}]
    assert from_main("x") == "x"
    check_equal({"seed": 1})
    with pytest.raises(UserError, match="as it is"), together():
        raise UserError("as it is")
