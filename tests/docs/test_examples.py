"""Every code block of the site and of the README runs, or is checked word by word.

Python blocks of one page run one after the other in one namespace and one folder, and
with them the shell blocks below a line `<!-- run -->`. A block with a title is also
written to a file of that name. The commands of all shell blocks are checked: programs,
files, flags and config fields have to exist.
"""

import functools
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from ml_collections import config_flags

from dimat_jax.algorithms import ALGORITHMS, BETWEEN_MERGES
from dimat_jax.callbacks import CALLBACKS
from dimat_jax.cli import COMMANDS
from dimat_jax.cli._bundled import load_config
from dimat_jax.compression import COMPRESSORS
from dimat_jax.config import check, settle_overrides
from dimat_jax.data.partition import PARTITIONS
from dimat_jax.data.sources import SOURCES
from dimat_jax.experiment import check_network
from dimat_jax.mixing import MIXINGS
from dimat_jax.models import MODELS, to_torch
from dimat_jax.models.classifier import init
from dimat_jax.optimizers import OPTIMIZERS
from dimat_jax.tasks import TASKS
from dimat_jax.topology import TOPOLOGIES

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "experiments" / "RESULTS.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# What a shell block may hold beside the project's own programs.
OTHER_PROGRAMS = {"pip", "tfds", "pre-commit", "source", "for", "do", "done", "git"}


FENCED = re.compile(
    r"""
    (?: (<!--\ run\ -->)\n )?
    ^ (\ *) ``` (\w*) (?: \ + title="([^"\n]*)" )? \n
    (.*?)
    ^ \2 ``` $
    """,
    flags=re.DOTALL | re.MULTILINE | re.VERBOSE,
)


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        language: the word after the fence.
        title: of the file that the block is; "" if it is none.
        text: without the fences.
        line: where its text begins in the page.
        run: whether the page says that a shell block is to be run.
    """

    language: str
    title: str
    text: str
    line: int
    run: bool


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, indented ones included."""
    text = page.read_text()
    found = []
    fence = (
        r"(?:(<!-- run -->)\n)?^( *)```(\w*)(?: +title=\"([^\"\n]*)\")?\n(.*?)^\2```$"
    )
    for match in re.finditer(fence, text, flags=re.DOTALL | re.MULTILINE):
        run, indent, language, title, body = match.groups()
        body = re.sub(f"^{indent}", "", body, flags=re.MULTILINE)
        line = text.count("\n", 0, match.start(5)) + 1
        found.append(Block(language, title or "", body, line, bool(run)))
    # Nothing may hide in a fence that the pattern does not know.
    assert 2 * len(found) == len(re.findall(r"^ *(?:```|~~~)", text, re.MULTILINE))
    return found


BLOCKS = {name: blocks_of(page) for name, page in zip(NAMES, PAGES, strict=True)}


def is_run(block: Block) -> bool:
    return block.language == "python" or block.run


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_python_shell_or_output(name):
    for block in BLOCKS[name]:
        assert block.language in ("python", "bash", "text"), block


def test_readme_tutorials_and_how_tos_have_examples():
    for name in NAMES:
        if name == "README.md" or name.startswith(("docs/tutorials", "docs/how-to")):
            assert any(block.language == "python" for block in BLOCKS[name]), name


@pytest.fixture
def registries() -> Iterator[None]:
    """Takes back what examples add to registries, which other tests share."""
    found = [ALGORITHMS, BETWEEN_MERGES, COMPRESSORS, MIXINGS, MODELS, OPTIMIZERS]
    found += [CALLBACKS, PARTITIONS, SOURCES, TASKS, TOPOLOGIES]
    before = [dict(registry) for registry in found]
    yield
    for registry, entries in zip(found, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture
def folder(tmp_path, monkeypatch, registries) -> Path:
    """A new folder that looks like the project's, to run examples in."""
    for name in ("configs", "dimat_jax", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def torch_files(folder):
    """Two narrow ResNet-18s, as files that PyTorch could have written."""
    safetensors = pytest.importorskip("safetensors.numpy")
    model = MODELS["resnet18"](n_classes=3, width=1 / 16)
    start = jax.jit(partial(init, model))
    for seed, name in enumerate("ab"):
        variables = start(jax.random.key(seed), jnp.ones((1, 64, 64, 3)))
        state_dict = to_torch("resnet18", variables)
        safetensors.save_file(state_dict, folder / f"{name}.safetensors")


@pytest.fixture
def wandb_rows(monkeypatch) -> list[dict]:
    """The rows that a stand-in for the package wandb gets, which needs no account."""
    rows: list[dict] = []

    def init(**settings):
        assert settings["mode"] == "offline"
        return SimpleNamespace(
            log=lambda row, step: rows.append(row), finish=lambda: None
        )

    stand_in = ModuleType("wandb")
    stand_in.__spec__ = ModuleSpec("wandb", None)
    stand_in.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return rows


# The examples of these pages take from 15 seconds to a minute.
LONG = {
    "docs/tutorials/compare.md",
    "docs/tutorials/merge.md",
    "docs/tutorials/sweep.md",
    "docs/how-to/callbacks.md",
    "docs/how-to/data.md",
    "docs/how-to/devices.md",
    "docs/how-to/questions.md",
    "docs/how-to/reuse.md",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in LONG else [])
        for name in NAMES
        if any(map(is_run, BLOCKS[name]))
    ],
)
def test_the_examples_run(name, folder, request):
    if any("a.safetensors" in block.text for block in BLOCKS[name]):
        request.getfixturevalue("torch_files")
    logs = any('callbacks = "wandb"' in block.text for block in BLOCKS[name])
    rows = request.getfixturevalue("wandb_rows") if logs else []
    namespace = {"__name__": "example"}
    for block in filter(is_run, BLOCKS[name]):
        if block.language == "bash":
            run_shell(block.text, folder)
            continue
        if block.title:
            (folder / block.title).write_text(block.text)
        # Empty lines before the text: errors then name the line of the page.
        code = "\n" * (block.line - 1) + block.text
        # Examples are users' programs, in which JAX's own defaults hold.
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            exec(compile(code, str(ROOT / name), "exec"), namespace)
    assert bool(rows) == logs


def test_every_question_is_answered_in_five_lines():
    name = "docs/how-to/questions.md"
    questions = re.findall(r"^## (.*)$", Path(ROOT, name).read_text(), re.MULTILINE)
    _, *answers = BLOCKS[name]  # the first block has what all of them use
    assert len(questions) == len(answers) == 10
    for question, answer in zip(questions, answers, strict=True):
        assert question.endswith("?")
        assert len(list(filter(None, answer.text.splitlines()))) <= 5, question


def run_shell(script: str, folder: Path) -> None:
    compiled = str(jax.config.values["jax_compilation_cache_dir"])
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "JAX_COMPILATION_CACHE_DIR": compiled,
        "PYTHONPATH": str(folder),
    }
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


# Shell blocks, word by word ===========================================================


def commands(script: str) -> list[list[str]]:
    """The commands of a script, as lists of words."""
    lines = script.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] if line[:1] == ["do"] else line for line in words if line]


SHELL = [
    pytest.param(name, block, id=f"{name}:{block.line}")
    for name, blocks in BLOCKS.items()
    for block in blocks
    if block.language == "bash"
]


@pytest.mark.every_nth(6)
@pytest.mark.parametrize("name, block", SHELL)
def test_shell_blocks_are_correct(name, block, folder, monkeypatch):
    subprocess.run(["bash", "-n", "-c", block.text], check=True)
    for other in BLOCKS[name]:
        if other.title:
            (folder / other.title).write_text(other.text)
    for command in commands(block.text):
        if command[0] == "make":
            assert len(command) > 1
            for target in command[1:]:
                assert target in make_targets(), target
        elif command[:2] == ["python", "-m"]:
            check_program(("-m", command[2]), command[3:], monkeypatch)
        elif command[0] == "dimat":
            assert command[1] in COMMANDS, command
            program = "from dimat_jax.cli import main; main()"
            check_program(("-c", program, command[1]), command[2:], monkeypatch)
        else:
            assert Path(command[0]).name in OTHER_PROGRAMS, command


@functools.cache
def make_targets() -> frozenset[str]:
    makefile = (ROOT / "Makefile").read_text()
    return frozenset(re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE))


@functools.cache
def flags_of(program: tuple[str, ...]) -> frozenset[str]:
    """The flags that a program has, as its --help lists them."""
    result = subprocess.run(
        [sys.executable, *program, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout, result.stderr
    return frozenset(re.findall(r"--(?:\[no\])?([\w.]+)", result.stdout))


def check_program(
    program: tuple[str, ...], arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks a command of one of the project's programs.

    Args:
        program: what comes after `python`.
        arguments: what comes after the program.
        monkeypatch: pytest's.
    """
    known, settings = flags_of(program), []
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        name, _, value = argument.removeprefix("--").partition("=")
        assert name.partition(".")[0] in known, f"{program} has no --{name}"
        if name in ("config", "sweep"):
            file, colon, form = value.partition(":")
            if program[0] == "-c" and not file.endswith(".py"):
                file = f"configs/{file}.py"  # a bundled one
            assert Path(file).is_file(), value
            argument = f"--{name}={file}{colon}{form}"
        if argument.startswith("--config"):
            settings.append(argument)
    if any(setting.startswith("--config=") for setting in settings):
        check_config(settings, monkeypatch)


def check_config(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that a config with these flags could be run."""
    settings = [re.sub(r"\$\w+", "0", setting) for setting in settings]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    command = ["program", *settings]
    monkeypatch.setattr(sys, "argv", command)  # ml_collections reads settings there
    with warnings.catch_warnings():
        # ml_collections loads config files in a way that Python 3.12 warns of.
        warnings.simplefilter("ignore", DeprecationWarning)
        values(command)
    flag = values["config"]
    named = settings[0].partition("=")[2]
    overridden = config_flags.get_override_values(flag)
    config = settle_overrides(flag.value, load_config(named), overridden)
    check(config)
    check_network(config)


# Files and pages that are named =======================================================


@pytest.mark.parametrize("name", NAMES)
def test_the_files_that_pages_name_exist(name):
    text = Path(ROOT, name).read_text()
    known = "configs|dimat_jax|experiments|docs|tests"
    named = set(re.findall(rf"(?<![\w/.])(?:{known})/[\w/]+\.\w+", text))
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]


@pytest.mark.parametrize("name", NAMES)
def test_links_to_files_of_the_project_lead_somewhere(name):
    """As a code host shows the pages, which are not yet the site."""
    page = ROOT / name
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, _ = link.partition("#")
        if not re.match(r"\w+:", link) and path:
            assert (page.parent / path).exists(), link


def test_the_readme_has_the_numbers_of_the_quickstart():
    def rows(name):
        lines = Path(ROOT, name).read_text().splitlines()
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        return [row for row in cells if row]

    names = {
        ("dimat", "reference"): "DIMAT, one frame for all",
        ("dimat", "own"): "DIMAT, own frames (the paper)",
        ("wm", "joint"): "matched by weights, joint",
        ("wa", ""): "plain averaging",
    }
    expected = {name: [name] for name in names.values()}
    for row in rows("docs/quickstart.md"):
        _, _, algorithm, frame, _, _, *accuracies = row
        if (algorithm, frame) in names:
            cell = f"{accuracies[0]}, {accuracies[-1]}"
            expected[names[algorithm, frame]].append(cell)
    shown = {row[0]: row for row in rows("README.md")}
    assert expected == {name: shown[name] for name in expected}
