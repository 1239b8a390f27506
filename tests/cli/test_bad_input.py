"""Whatever a user can get wrong ends as one message and exit code 2, before any work.

The commands run in this process, because their imports take seconds. None of them gets
so far that it trains, compiles or writes anything.
"""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from absl import flags, logging

from dimat_jax import TOPOLOGIES, _signals, cli, plugins, train
from dimat_jax.cli import _outlook, _program, _show, _sweep, _train
from dimat_jax.config import default_config

Command = Callable[..., str]


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path, tmp_path_factory) -> Iterator[Command]:
    """Runs a command that must be refused, and returns its message."""
    known, verbosity = set(flags.FLAGS), logging.get_verbosity()
    for module, name in (
        # The signals of this process are those of the tests.
        (_signals, "start"),
        (_signals, "end_at_once"),
        # JAX has started already.
        (_train, "request_cpu_devices"),
        (_sweep, "request_cpu_devices"),
        (_show, "request_cpu_devices"),
    ):
        monkeypatch.setattr(module, name, lambda *args: None)
    monkeypatch.setattr(_outlook, "Timing", lambda *args: pytest.fail("it times"))
    monkeypatch.setattr(train, "_train", lambda *args: pytest.fail("it trains"))
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)
    # A message must not depend on what other tests have read.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))

    def forget_flags() -> None:
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()

    def run(*arguments: object) -> str:
        before = files(tmp_path)
        try:
            with pytest.raises(SystemExit) as end:
                cli.main([str(argument) for argument in arguments])
        finally:
            forget_flags()
        printed = capsys.readouterr()
        assert end.value.code == 2, printed
        first, *more = printed.err.splitlines()
        # A list of runs may follow.
        assert first.startswith("error: ") and all(x.startswith("    ") for x in more)
        message = "\n".join([first, *more])
        assert "Traceback" not in printed.out
        assert files(tmp_path) == before
        return message.removeprefix("error: ")

    yield run
    forget_flags()
    logging.set_verbosity(verbosity)


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


WORKDIR = "--workdir=run"
QUICKSTART = ("train", "--config=quickstart:wa", WORKDIR)
CONFIG = "from dimat_jax.config import default_config\n"
RUNS = """
from dimat_jax.configs import quickstart

def run(algorithm="wa", **changes):
    config = quickstart.get_config(algorithm)
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict(fields)
    return config

def get_runs():
    return {"a": run(), %s}
"""


# Code of users ------------------------------------------------------------------------

CODE = {
    "": "file.py defines no get_",
    "def get_config(:": "file.py, line 1: SyntaxError: ",
    "x = 1\n1 / 0": "file.py, line 2: ZeroDivisionError: division by zero",
    "import nowhere_at_all": "file.py, line 1: ModuleNotFoundError: No module ",
    "import sys\nsys.exit(0)": "file.py, line 2: the file ends the program (SystemExit",
    "x = " + "(" * 500 + ")" * 500: "file.py",
    "class E(BaseException): pass\nraise E('x')": "file.py, line 2: E: x",
}


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize(
    "command",
    [("train", "--config=file.py"), ("sweep", "--sweep=file.py")],
    ids=["train", "sweep"],
)
def test_code_that_cannot_run_is_named_with_its_line(refused, tmp_path, code, command):
    (tmp_path / "file.py").write_text(code)
    assert CODE[code] in refused(*command, WORKDIR)


def test_a_file_that_is_not_utf8_is_named(refused, tmp_path):
    (tmp_path / "file.py").write_bytes(b"x = 'caf\xe9'\n")
    assert "file.py, line 1: SyntaxError: " in refused(
        "train", "--config=file.py", WORKDIR
    )
    assert "file.py cannot be used: 'utf-8' codec" in refused("show", "file.py")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", "file.py: get_config(): expected a config, as default_config"),
        ("return {'rounds': 3}", "got a value of type dict"),
        ("raise KeyError('k')", "file.py, line 3: KeyError: 'k'"),
        ("return get_config()", "RecursionError"),
        (
            "c = default_config().unlock(); del c.rounds; return c",
            "lacks the field(s) ",
        ),
        (
            "c = default_config().unlock(); c.roundz = 3; return c",
            "a field too many: there is no field 'roundz'; did you mean 'rounds'?",
        ),
        (
            "c = default_config(); c.roundz = 3; return c",
            "line 3: AttributeError: there is no field 'roundz'; did you mean 'rounds'",
        ),
        (
            "c = default_config(); c.merge.evry = 3; return c",
            "line 3: AttributeError: there is no field 'merge.evry'; did you mean "
            "'merge.every'?",
        ),
        (
            "c = default_config()\n  c.update_from_flattened_dict({'mrge.evry': 3})",
            "line 4: NoSuchField: there is no field 'mrge.evry'; did you mean "
            "'merge.every'?",
        ),
        (
            "c = default_config()\n  with c.ignore_type(): c.rounds = 'many'\n"
            "  return c",
            "config.rounds is 'many', of type str; it must be of type int",
        ),
        (
            "c = default_config()\n  with c.ignore_type(): c.data.name = []\n"
            "  return c",
            "config.data.name is [], of type list",
        ),
        ("c = default_config(); c.rounds = True; return c", "config.rounds is True"),
    ],
)
def test_what_is_no_config_is_refused(refused, tmp_path, body, message):
    (tmp_path / "file.py").write_text(f"{CONFIG}def get_config():\n  {body}\n")
    assert message in refused("train", "--config=file.py", WORKDIR)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("None", "get_runs() must return a dict of configs by name, got NoneType"),
        ("{}", "got no runs"),
        ("{'a': 3}", "file.py: run 'a': expected a config"),
        ("{1: default_config()}", "the name of a run must be a text, got 1"),
    ],
)
def test_what_are_no_runs_is_refused(refused, tmp_path, returned, message):
    code = f"{CONFIG}def get_runs():\n    return {returned}\n"
    (tmp_path / "file.py").write_text(code)
    assert message in refused("sweep", "--sweep=file.py", WORKDIR)


# Flags --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.roundz=3", "there is no field 'roundz'; did you mean 'rounds'?"),
        ("--config.merge.evry=2", "field 'merge.evry'; did you mean 'merge.every'?"),
        ("--config.mrge.evry=2", "field 'mrge.evry'; did you mean 'merge.every'?"),
        (
            "--noconfig.flip",
            "there is no field 'flip'; did you mean 'augmentation.flip",
        ),
        ("--config.lr=1", "there is no field 'lr'; did you mean 'optimizer.learning_r"),
        (
            "--rounds=3",
            "flag 'rounds'. A field of the config is set by --config.rounds",
        ),
        ("--config.topology=RNG", "did you mean 'ring'?"),
        ("--config.rounds=many", "flag --config.rounds=many: expected a whole number"),
        ("--config.batch_norm.data=3", "config.batch_norm.data is '3'; allowed: "),
        ("--config.model.width=abc", "--config.model.width=abc: expected a number"),
        ("--config.augmentation.flip=3", "flip=3: expected true or false"),
        ("--config.=3", "the config has no field ''"),
        ("--config.rounds=" + "9" * 5000, "Exceeds the limit"),
        ("--config.data=3", "'data' is a section, which has the fields data.name, "),
        ("--config.data={'name': 'digits'}", ""),
        ("--config.rounds.x=1", ""),
        ("--config..rounds=1", ""),
        ("--config=", "no config file "),
        ("--config=" + "x" * 5000, "cannot be used"),
        ("--flagfile=nowhere", "nowhere"),
        ("--workdir=", "workdir is empty; it must name a folder"),
        ("--workdir=/dev/null/x", "cannot be a folder: /dev/null is none"),
        ("--workdir=" + "w" * 300, "has a name that is too long"),
        ("--workdir=a\0b", "is no path"),
        ("--config.agents=1000000000", "would need at least 7993 PiB"),
        ("--config.batch_size=1000000000000", "a batch of so many images would need"),
        ("--config.eval.batch_size=1" + "0" * 30, "would need at least "),
        ("--config.model.width=1e9", "of memory, but there are "),
        (
            "--config.rounds=1" + "0" * 400,
            "local steps; a phase of a run has less than",
        ),
        ("--config.augmentation.pad=1000000000", "images of 2000000008 x 2000000008"),
        ("--config.placement.cpu_devices=1000000", "at least 1 and at most 1024"),
        ("--config.data.train_size=1000000", "expected 1 to 1433 samples"),
        ("--config.agents=2000", "expected 1 to 1433 agents"),
        ("--config.eval.samples=1000000", "there are only 364 images"),
        ("--config.pretrain.cache_dir=/dev/null/x", "config.pretrain.cache_dir=/dev/n"),
    ],
)
def test_a_bad_flag_is_named(refused, flag, message):
    assert message in refused(*QUICKSTART, flag)


def test_a_workdir_of_something_else_is_refused(refused, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").touch()
    (tmp_path / "file").touch()
    message = refused(*QUICKSTART, "--workdir=photos")
    assert "no fresh folder: it has no config.json, and holds me.jpg" in message
    assert "cannot be a folder" in refused(*QUICKSTART, "--workdir=file")
    assert "cannot be a folder" in refused(*QUICKSTART, "--workdir=file/x/y")


# What is shown ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one topic; allowed: algorithms"),
        (["configs", "sweeps"], "expected one topic"),
        (["quickstart", "--config=quickstart"], "expected one topic"),
        (["algoritms"], "did you mean 'algorithms'"),
        (["quickstar"], "did you mean 'quickstart'"),
        (["--config=quickstar"], "did you mean 'quickstart'"),
        (["options", "--config.agents=3"], "Unknown command line flag 'config.agents'"),
        (["quickstart", "--config.agens=3"], "no field 'agens'; did you mean 'agents'"),
        (["quickstart", "--config.agents=0"], "config.agents is 0; it must be at leas"),
        (["quickstart", "--config.gossip.gamma=.1"], "'dimat' and merge.inner='local'"),
        (["quickstart", "--config.topology=file"], "config.graph.file is empty"),
        (["quickstart", "--config.agents=1434", "--seconds=0"], "expected 1 to 1433 "),
        (
            ["quickstart", "--config.data.train_size=1434", "--seconds=0"],
            "train_size: expected 1 to 1433 samples",
        ),
        (["quickstart", "--seconds=-1"], "--seconds=-1"),
    ],
)
def test_what_cannot_be_shown_is_refused(refused, arguments, message):
    assert message in refused("show", *arguments)


@pytest.mark.parametrize(
    "before",
    [
        ("--seconds", "0"),
        # The value is the name of a file, which could be a config.
        ("--plugin", "mine.py"),
        ("--config.data.dir", "mine.py"),
        # This flag has no value.
        ("--config.augmentation.flip",),
        ("--verbosity", "0"),
    ],
)
def test_the_value_of_another_flag_is_not_taken_for_the_config(
    refused, monkeypatch, before
):
    monkeypatch.setattr(plugins, "_loaded", set())
    Path("mine.py").touch()
    Path("own.py").write_text(
        "from dimat_jax.configs import quickstart\nget_config = quickstart.get_config\n"
    )
    message = refused("show", *before, "own.py", "--config.agents=-7")
    assert "config.agents is -7" in message


# A config to start from ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["there.py"], "FILE=there.py exists already; remove it or choose another"),
        (["a.py", "b.py"], "expected one file, got a.py, b.py"),
        (["mine.txt"], "FILE=mine.txt must be a Python file"),
        (["folder/"], "FILE=folder/ must name a file"),
        ([""], "FILE= must name a file"),
        (["a\0.py"], "is no path"),
        (["there.py/mine.py"], "cannot be a folder"),
        (["n" * 300 + ".py"], "has a name that is too long"),
        (["mine.py", "--like=quickstar"], "did you mean 'quickstart'?"),
        (["mine.py", "--like=cifar100_resnet20:smal"], "argument is paper, small or "),
        (["mine.py", "--like=quickstart:wn"], "config.algorithm is 'wn'; allowed: "),
        (["mine.py", "--like="], "there is no config file "),
    ],
)
def test_a_config_file_is_not_written(refused, tmp_path, arguments, message):
    (tmp_path / "there.py").touch()
    assert message in refused("init", *arguments)


# Sweeps -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("'../x': run(seed=1)", "'../x'; a name must be a path below the sweep's fol"),
        ("'/tmp/x': run(seed=1)", "a name must be a path below"),
        ("'': run(seed=1)", "a name must be a path below"),
        ("'pretrained': run(seed=1)", "the sweep keeps its own files there"),
        ("'a/': run(seed=1)", "the runs 'a' and 'a/' have the same folder"),
        ("'a/b': run(seed=1)", "'a/b' would be in the folder of the run 'a'"),
        ("'b': run(rounds=-1)", "run 'b': config.rounds is -1"),
        (
            "'b': run(data__name='cifar10', data__dir='/nowhere')",
            "run 'b': cifar10: no /nowhere/cifar10/",
        ),
        ("'b': run(data__train_size=10**6)", "run 'b': digits: train_size: expected 1"),
        ("'b': run(agents=2000)", "run 'b': expected 1 to 1433 agents"),
        ("'b': run(agents=10**9)", "run 'b': config.agents is 1000000000"),
        (
            "'b': run('dimat', merge__match_data='proxy', merge__match_samples=10**6)",
            "run 'b': config.merge.match_samples is 1000000, but there are only 1433",
        ),
        ("'b': run(topology='file', graph__file='no.json')", "run 'b': no.json cannot"),
    ],
)
def test_all_runs_of_a_sweep_are_checked_first(refused, tmp_path, second, message):
    (tmp_path / "file.py").write_text(RUNS % second)
    assert message in refused("sweep", "--sweep=file.py", "--workdir=out")


def test_a_sweep_refuses_a_folder_of_something_else(refused, tmp_path):
    (tmp_path / "file.py").write_text(RUNS % "'b': run(seed=1)")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").touch()
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "config.json").touch()
    sweep = ("sweep", "--sweep=file.py")
    assert "holds other files (me.jpg)" in refused(*sweep, "--workdir=photos")
    assert "folder of a single run" in refused(*sweep, "--workdir=single")
    assert "--workdir is empty" in refused(*sweep, "--workdir=")
    assert "cannot be a folder" in refused(*sweep, "--workdir=file.py")


# Files of runs ------------------------------------------------------------------------

CONTENT = {
    "empty": b"",
    "no text": b"\xff\xfe",
    "nested": b"[" * 100_000,
    "a list": b"[]",
    "wrong types": b'{"rounds": "x", "data": 3, "files": 1}',
}


@pytest.mark.parametrize("content", CONTENT.values(), ids=CONTENT.keys())
def test_a_damaged_config_json_is_named(refused, tmp_path, content):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_bytes(content)
    (run / "metrics.jsonl").touch()
    for command in (
        QUICKSTART,
        ("report", "run", "--out=report"),
        ("tune", "run"),
        ("merge", "run", "run:1", "--out=merged"),
    ):
        assert "config.json" in refused(*command)
    if content != CONTENT["wrong types"]:
        assert "config.json" in refused("show", "run")


ROWS = {
    "nested": b'{"round": ' + b"[" * 100_000 + b"\n",
    "no text": b"\xff\xfe\n",
    "a list": b"[]\n",
    "wrong types": b'{"round": [], "phase": {}, "test_accuracy_mean": "x"}\n',
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_damaged_rows_are_named(refused, tmp_path, rows):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(default_config().to_json())
    (run / "metrics.jsonl").write_bytes(rows)
    for command in (("report", "run", "--out=report"), ("show", "run")):
        assert "metrics.jsonl" in refused(*command)
    if rows != ROWS["wrong types"]:
        assert "metrics.jsonl" in refused("tune", "run")


@pytest.mark.parametrize("name", ["summary.json", "layout.json", "inputs.json"])
@pytest.mark.parametrize("content", CONTENT.values(), ids=CONTENT.keys())
def test_another_damaged_file_of_a_run_is_named(refused, tmp_path, name, content):
    from dimat_jax.configs import quickstart

    run = tmp_path / "run"
    run.mkdir()
    config = quickstart.get_config("wa")
    (run / "config.json").write_text(config.to_json())
    (run / name).write_bytes(content)
    if name == "summary.json" and content == CONTENT["wrong types"]:
        pytest.skip("a summary may hold anything")
    assert name in refused(*QUICKSTART)


@pytest.mark.parametrize("out", ["", "file/x", "/dev/null/x", "o" * 300])
@pytest.mark.parametrize(
    "command", [("report", "run"), ("merge", "run", "other"), ("bench", "train")]
)
def test_an_out_that_cannot_be_written_is_refused_first(
    refused, tmp_path, command, out
):
    (tmp_path / "file").touch()
    config = default_config().to_json()
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    assert "--out" in refused(*command, f"--out={out}")


@pytest.mark.parametrize("other", ["run", "./run", "run:0", "link", "run/../run:00"])
def test_a_model_is_not_merged_with_itself(refused, tmp_path, other):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    message = refused("merge", "run", other, "--out=merged")
    assert message.startswith("expected two different models or more")


def test_a_safetensors_file_of_nested_brackets_is_named(refused, tmp_path):
    header = b"[" * 100_000
    for name in "ab":
        content = len(header).to_bytes(8, "little") + header
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    names = ("a.safetensors", "b.safetensors")
    message = refused("merge", *names, "--model=mlp", "--data=digits", "--out=merged")
    assert message.startswith("a.safetensors")


# Graphs -------------------------------------------------------------------------------

HEADER = "{'descr': '<f8', 'fortran_order': False, 'shape': (3, 3, 1000000000000), }"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("graph.json", b"[" * 100_000),
        ("graph.json", b"\xff"),
        ("graph.json", b"[[1], [1, 2]]"),
        ("graph.json", b"[[" + b"9" * 400 + b", 0, 0], [0, 0, 0], [0, 0, 0]]"),
        ("graph.npy", b"junk"),
        ("graph.npy", b"\x93NUMPY\x01\x00v\x00" + HEADER.encode().ljust(117) + b"\n"),
    ],
)
def test_a_damaged_graph_is_named(refused, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    graph = ("--config.topology=file", f"--config.graph.file={name}")
    message = refused(*QUICKSTART, "--config.agents=3", *graph)
    assert message.startswith(f"{name} ")


# What is no mistake of the user -------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError("Unable to allocate 7.28 TiB"), 2),
        (OSError(28, "No space left on device", "/disk/report.md"), 2),
        (ZeroDivisionError("division by zero"), None),
        (FileNotFoundError(2, "No such file or directory", "template.html"), None),
    ],
)
def test_only_a_mistake_of_the_program_shows_a_traceback(
    refused, monkeypatch, error, code
):
    def main(arguments):
        raise error

    command = _program.Command("broken", "", main)
    if code is None:
        with pytest.raises(type(error)):
            _program.run(command, arguments=[])
    else:
        with pytest.raises(SystemExit) as end:
            _program.run(command, arguments=[])
        assert end.value.code == code


def test_a_config_with_numpys_numbers_is_a_config(tmp_path):
    config = default_config()
    config.optimizer.learning_rate = np.float64(0.5)
    assert json.loads(config.to_json())["optimizer"]["learning_rate"] == 0.5


# Plugins and callbacks ----------------------------------------------------------------

OPTIONS = "from dimat_jax.options import Option, Record\n"
TOPOLOGY = f"{OPTIONS}from dimat_jax import TOPOLOGIES\n"
PLUGINS = {
    "import nowhere_at_all": "file.py, line 1: ModuleNotFoundError: No module named",
    "import sys\nsys.exit(0)": "file.py, line 2: the file ends the program",
    f"{TOPOLOGY}TOPOLOGIES.add(Record('ring', print))": (
        "the name 'ring' is taken by a Record of dimat_jax; choose another name"
    ),
    f"{TOPOLOGY}TOPOLOGIES.add(print)": "expected a Record to register, got <built-in",
    f"{OPTIONS}from dimat_jax import MODELS\nMODELS.add(Record('a', print))": (
        "expected a ModelRecord to register, got"
    ),
}


@pytest.mark.parametrize("code", PLUGINS)
@pytest.mark.parametrize("command", [QUICKSTART, ("report", ".")], ids=["train", "rep"])
def test_a_plugin_that_cannot_be_used_is_named(refused, tmp_path, code, command):
    (tmp_path / "file.py").write_text(code)
    message = refused(*command, "--plugin=file.py")
    assert message.startswith("the plugin 'file.py': ") and PLUGINS[code] in message


def test_a_plugin_that_is_not_there_is_named(refused):
    for plugin, reason in {
        "nowhere_at_all": "ModuleNotFoundError: No module named 'nowhere_at_all'",
        "nowhere.py": "there is no file",
    }.items():
        message = refused(*QUICKSTART, "--plugin", plugin)
        assert message.startswith(f"the plugin {plugin!r}: {reason}")


def test_an_installed_plugin_that_cannot_be_used_is_named(
    refused, tmp_path, monkeypatch
):
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[dimat_jax.plugins]\na = nowhere_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "_installed", set())
    assert refused(*QUICKSTART) == (
        "the plugin 'nowhere_at_all': ModuleNotFoundError: No module named "
        "'nowhere_at_all'. It is an entry point of broken; mend or uninstall that"
    )


def test_an_option_whose_path_another_one_has_is_refused(
    refused, tmp_path, monkeypatch
):
    monkeypatch.setattr(plugins, "_loaded", set())
    (tmp_path / "file.py").write_text(
        f"{TOPOLOGY}TOPOLOGIES.add(Record('a', print, (Option('rounds', 3, 'x'),)))"
    )
    try:
        message = refused(*QUICKSTART, "--plugin=file.py")
    finally:
        del TOPOLOGIES["a"]
    assert "two options have the path 'rounds', with the defaults 3 and 100" in message


def test_callbacks_that_cannot_be_used_are_refused(refused, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for names, message in {
        "cvs": "config.callbacks is 'cvs'; allowed: csv, early_stopping, wandb; did ",
        "csv,csv": "config.callbacks is 'csv,csv', which has 'csv' twice",
        "csv, wandb": "config.callbacks names wandb, which is not installed: pip ",
        "early_stopping": "config.early_stopping.field is 'validation_accuracy_mean', "
        "but config.data.validation is 0: there are no validation images",
    }.items():
        assert refused(*QUICKSTART, f"--config.callbacks={names}").startswith(message)
