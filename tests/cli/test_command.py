"""Tests the command `dimat`: usage, errors, bundled configs, and `dimat show`."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import dimat_jax
from dimat_jax import cli, options
from dimat_jax._option_facts import facts
from dimat_jax.cli import _bundled, _program, _show, _train
from dimat_jax.config import ROOT as ROOT_OPTIONS
from dimat_jax.config import fields_of, resolved
from dimat_jax.configs import quickstart
from dimat_jax.errors import UserError
from dimat_jax.options import every
from dimat_jax.topology import ring

ROOT = Path(__file__).parents[2]


def ended(capsys, *arguments: str) -> tuple[int, str, str]:
    """Runs the command in this process; returns its exit code and what it prints."""
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    printed = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, printed.out, printed.err


def alone(*arguments: str) -> subprocess.CompletedProcess:
    """Runs the command in a process of its own."""
    code = "import sys; from dimat_jax.cli import main; main(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_without_a_command_it_prints_all_commands(capsys, arguments):
    code, out, err = ended(capsys, *arguments)
    assert (code, err) == (0, "")
    for name in cli.COMMANDS:
        assert f"\n    {name} " in out
    assert "dimat train --config=quickstart --workdir=" in out


def test_it_prints_its_version(capsys):
    assert ended(capsys, "--version") == (0, f"dimat_jax {dimat_jax.__version__}\n", "")


def test_an_unknown_command_ends_with_one_message_and_near_names(capsys):
    code, out, err = ended(capsys, "trian", "--config=quickstart")
    assert (code, out) == (2, "")
    assert err.startswith("error: there is no command 'trian'; allowed: bench, ")
    assert err.endswith("did you mean 'train'?\n") and err.count("\n") == 1


def test_usage_and_unknown_commands_need_no_jax():
    code = """
import sys
from dimat_jax.cli import main
for arguments in (["--help"], ["trian"]):
    try:
        main(arguments)
    except SystemExit:
        pass
assert not {"jax", "numpy", "absl"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.every_nth(3)
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name):
    result = alone(name, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(_first_line(name))
    assert f"    dimat {name} " in result.stdout
    flags = {
        "train": ("--config\n", "--workdir\n"),
        "sweep": ("--sweep\n", "--workdir\n", "--data_dir\n"),
        "report": ("--out\n",),
        "merge": ("--out\n", "--samples\n", "Default: 1000."),
        "export": ("--out\n", "--agent\n", "--round\n"),
        "bench": ("--out\n", "--repeats\n", "--steps\n", "Default: 3."),
        "init": ("--like\n", "Default: quickstart."),
        "show": ("--config\n", "--seconds\n", "Default: 30"),
        "tune": ("--field\n", "--at\n", "Default: optimizer.learning_rate."),
    }[name]
    in_one_line = " ".join(result.stdout.split())
    for flag in flags:
        assert flag in (in_one_line if flag.startswith("Default") else result.stdout)


def _first_line(name: str) -> str:
    text = (ROOT / "dimat_jax" / "cli" / f"_{name}.py").read_text()
    return text.partition("\n")[0].strip('"')


def test_a_program_of_the_repository_has_help_that_calls_it_by_its_name():
    command = [sys.executable, "-m", "experiments.report", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "\n    python -m experiments.report DIR [DIR ...]\n" in done.stdout


# --- Bundled files --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["quickstart", "quickstart.py", "configs/quickstart", "configs/quickstart.py"],
)
@pytest.mark.parametrize("argument", ["", ":wa"])
def test_a_bundled_config_is_found_by_its_name_from_anywhere(
    tmp_path, monkeypatch, name, argument
):
    monkeypatch.chdir(tmp_path)
    config = _bundled.load_config(name + argument)
    assert config.data.name == "digits"
    assert config.algorithm == ("wa" if argument else "dimat")


@pytest.mark.parametrize(
    "name", ["faults", "sweeps/faults", "configs/sweeps/faults.py"]
)
def test_a_bundled_sweep_is_found_by_its_name_from_anywhere(
    tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    assert len(_bundled.load_runs(name)) == 72


def test_a_file_of_the_user_comes_before_a_bundled_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.py").write_text(
        "from dimat_jax.configs import quickstart\n"
        "def get_config():\n"
        "    return quickstart.get_config('sgp')\n"
    )
    assert _bundled.load_config("configs/quickstart.py").algorithm == "sgp"
    assert _bundled.load_config("quickstart").algorithm == "dimat"


def test_a_name_that_is_not_bundled_is_refused_with_near_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no config file quikstart.*'quickstart'"):
        _bundled.load_config("quikstart:wa")
    with pytest.raises(UserError, match="no sweep file graph, .*'graphs'"):
        _bundled.load_runs("graph")


def test_a_file_without_its_function_or_its_ending_is_refused(tmp_path):
    path = tmp_path / "empty.py"
    path.touch()
    with pytest.raises(UserError, match=r"empty.py defines no get_config\(\)"):
        _bundled.load_config(str(path))
    with pytest.raises(UserError, match=r"empty.py defines no get_runs\(\)"):
        _bundled.load_runs(str(path))
    path = tmp_path / "config.txt"
    path.touch()
    with pytest.raises(UserError, match="config.txt is no Python file"):
        _bundled.load_config(str(path))


def test_the_bundled_files_are_those_of_the_repository():
    folder = ROOT / "configs"
    for bundled, expected in (
        (_bundled.bundled_configs(), folder),
        (_bundled.bundled_sweeps(), folder / "sweeps"),
    ):
        paths = {p.resolve() for p in expected.glob("*.py") if p.stem != "__init__"}
        assert {path.resolve() for path in bundled.values()} == paths
        assert all(map(_bundled.summary, bundled.values()))


# --- dimat show -----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def jax_has_started(monkeypatch):
    monkeypatch.setattr(_show, "request_cpu_devices", lambda n: None)


def shown(topic: str) -> str:
    return f"{_show.show(topic)}\n"


@pytest.mark.parametrize(
    ("topic", "names"),
    [
        ("configs", _bundled.bundled_configs()),
        ("sweeps", _bundled.bundled_sweeps()),
        ("algorithms", dimat_jax.ALGORITHMS),
        ("compressors", dimat_jax.COMPRESSORS),
        ("mixings", dimat_jax.MIXINGS),
        ("models", dimat_jax.MODELS),
        ("optimizers", dimat_jax.OPTIMIZERS),
        ("partitions", dimat_jax.PARTITIONS),
        ("sources", dimat_jax.SOURCES),
        ("topologies", dimat_jax.TOPOLOGIES),
    ],
)
def test_it_lists_what_a_config_can_name(topic, names):
    lines = shown(topic).splitlines()
    assert [line.split()[0] for line in lines] == list(names)


def test_it_says_what_each_entry_is():
    meaning = (ring.__doc__ or "").partition("\n")[0]
    lines = [line.split(maxsplit=1) for line in shown("topologies").splitlines()]
    assert ["ring", meaning] in lines
    assert "quickstart         Five agents learn" in shown("configs")


def test_it_says_all_about_the_options_that_the_documentation_says():
    listed = shown("options")
    expect_all_options(listed, "")
    assert "Read: always, but not where algorithm is centralized" in listed
    assert "\n    Allowed: own, reference, joint\n" in listed


def test_the_help_of_train_lists_every_field_after_the_flags():
    text = _program._help(_train.COMMAND, "dimat train", [])
    before, _, listed = text.partition("--config.FIELD=VALUE:\n\n")
    assert "dimat train --config=NAME" in before
    expect_all_options(listed, "--config.")


def expect_all_options(text: str, flag: str) -> None:
    """Expects all facts about every option, in lines that a terminal can show."""
    entries: dict[str, list[str]] = {}
    sections = []
    for line in filter(None, text.splitlines()):
        assert len(line) <= 88
        if line.startswith("["):
            sections.append(line.strip("[]"))
        elif line.startswith("    "):
            entries[list(entries)[-1]].append(line.strip())
        else:
            entries[line.removeprefix(flag)] = []
    described = facts(ROOT_OPTIONS)
    expected_options = {option.path: option for option in every(ROOT_OPTIONS)}
    assert sorted(entries) == sorted(expected_options)
    assert sections[0] == "at the top" and set(sections[1:]) == {
        path.rpartition(".")[0] for path in expected_options if "." in path
    }
    for path, option in expected_options.items():
        expected = [option.meaning, *described[path]]
        if isinstance(option.choices, Mapping):
            expected.append(f"Allowed: {', '.join(option.choices)}")
        assert " ".join(entries[path]) == " ".join(expected)


def test_every_registry_of_the_package_is_a_topic():
    names = [name for name in dir(dimat_jax) if name.isupper()]
    assert {name.lower(): getattr(dimat_jax, name) for name in names} == (
        _show._REGISTRIES
    )


@pytest.mark.parametrize("topic", ["quickstart:wa", "configs/quickstart.py:wa"])
def test_it_shows_the_fields_that_a_config_reads_and_which_are_no_defaults(topic):
    _, _, listed = shown(topic).partition("\n\n")
    rows = {line.split()[0]: line.split()[1:] for line in listed.splitlines()}
    assert rows["algorithm"] == ["'wa'", "'dimat'"]
    assert rows["merge.opt_state"] == ["'merge'", "'reset'"]
    assert rows["merge.every"] == ["1"]
    read = options.read(ROOT_OPTIONS, resolved(fields_of(quickstart.get_config("wa"))))
    assert rows.keys() == {"field", "-" * len(max(read, key=len)), *read}
    assert rows["agents"] == ["5"]


def test_it_shows_the_runs_of_a_sweep():
    runs = _bundled.load_runs("quickstart")
    assert shown("sweeps/quickstart").split() == list(runs)


def test_it_shows_a_file_of_the_user(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from dimat_jax.configs import quickstart\nget_config = quickstart.get_config\n"
    )
    assert "'sgp'" in shown(f"{path}:sgp")
    path.write_text(
        "from dimat_jax.config import default_config\n"
        "def get_runs():\n"
        "    return {'one': default_config(), 'two': default_config()}\n"
    )
    assert shown(str(path)) == "one\ntwo\n"


def test_it_shows_a_run_and_how_far_it_got(tmp_path):
    config = _bundled.load_config("quickstart")
    (tmp_path / "config.json").write_text(config.to_json())
    assert shown(str(tmp_path)).endswith("\n\nnot finished\n")
    epoch = {"round": 0, "phase": "pretraining", "epoch": 2, "train_accuracy_mean": 0.4}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(epoch) + "\n")
    assert shown(str(tmp_path)).endswith(
        "\n\nnot finished; epoch 2 of pre-training: mean training accuracy 40.00 %\n"
    )
    row = {"round": 3, "phase": "merged", "test_accuracy_mean": 0.5}
    later = {**epoch, "round": 3, "phase": "training"}
    lines = [json.dumps(each) + "\n" for each in (epoch, row, later)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    (tmp_path / "summary.json").write_text("{}")
    out = shown(str(tmp_path))
    assert "'digits'" in out
    assert out.endswith(
        "\n\nfinished; round 3 of 10, merged: mean test accuracy 50.00 %\n"
    )
