"""The wheel and the sdist: what they hold, and `dimat` where only the wheel is."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCES = ("dimat_jax", "configs", "pyproject.toml", "README.md", "LICENSE")
SWEEP = """
from dimat_jax.configs import quickstart

def get_runs():
    runs = {}
    for algorithm in ("dimat", "wa"):
        config = quickstart.get_config(algorithm)
        config.rounds = 1
        config.pretrain.epochs = 1
        runs[algorithm] = config
    return runs
"""


def call(*command: str | Path, cwd: Path) -> str:
    """What a command prints, which has to succeed."""
    # Only what is installed may be imported.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["XDG_CACHE_HOME"] = str(cwd / ".cache")
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Environment:
    """A fresh virtual environment."""

    def __init__(self, folder: Path):
        call(sys.executable, "-m", "venv", folder, cwd=folder.parent)
        self.bin = folder / "bin"
        self.python = self.bin / "python"
        purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.site = Path(call(self.python, "-c", purelib, cwd=folder).strip())

    def borrow_dependencies(self) -> None:
        """Lets it import what is installed here, after its own packages.

        Python reads no .pth file in a folder that a .pth file names: what is installed
        here in editable form stays unknown.
        """
        here = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
        (self.site / "borrowed.pth").write_text("\n".join(here))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and a wheel that was built from it."""
    folder = tmp_path_factory.mktemp("build")
    builder = Environment(folder / "builder")
    try:
        call(builder.python, "-m", "pip", "install", "setuptools>=77", cwd=folder)
    except AssertionError:
        builder.borrow_dependencies()  # without a network, the one that is here
    for name in SOURCES:
        path, copy = ROOT / name, folder / "source" / name
        copy.parent.mkdir(exist_ok=True)
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, copy, symlinks=True, ignore=ignored)
        else:
            shutil.copy(path, copy)
    build = (
        f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    )
    call(builder.python, "-c", build, cwd=folder / "source")
    (sdist,) = folder.glob("*.tar.gz")
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    call(builder.python, "-m", "pip", "wheel", sdist, *options, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> tuple[Environment, set[str]]:
    """An environment with the wheel, and what its installation added."""
    environment = Environment(tmp_path_factory.mktemp("install") / "user")
    environment.borrow_dependencies()

    def files() -> set[str]:
        folders = (environment.site, environment.bin)
        return {path.name for folder in folders for path in folder.iterdir()}

    before = files()
    install = (environment.python, "-m", "pip", "install", "--no-deps", built[1])
    call(*install, cwd=environment.site)
    return environment, files() - before


@pytest.fixture
def dimat(installed, tmp_path):
    """Calls the command in an empty folder."""
    return lambda *arguments: call(installed[0].bin / "dimat", *arguments, cwd=tmp_path)


def test_the_sdist_and_the_wheel_hold_the_bundled_configs_as_files(built):
    sdist, wheel = built
    names = [
        f"dimat_jax/{path.relative_to(ROOT)}"
        for path in (ROOT / "configs").rglob("*.py")
    ]
    names += ["dimat_jax/py.typed", "dimat_jax/reports/page.html"]
    with tarfile.open(sdist) as archive:
        files = {m.name.partition("/")[2]: m for m in archive.getmembers()}
        assert all(files[name].isfile() for name in names)
    with zipfile.ZipFile(wheel) as archive:
        assert set(names) <= set(archive.namelist())
        folders = {name.partition("/")[0] for name in archive.namelist()}
    assert {f.partition("-")[0] for f in folders} == {"dimat_jax"}


def test_an_installation_adds_the_package_and_the_command_and_nothing_else(installed):
    _, added = installed
    (info,) = (name for name in added if name.endswith(".dist-info"))
    assert added == {"dimat_jax", info, "dimat"}


def test_in_an_empty_folder_every_command_works(dimat, tmp_path):
    # Another seed than that of the sweep, since the report below has both.
    short = ("--config.rounds=1", "--config.pretrain.epochs=1", "--config.seed=1")
    dimat("train", "--config=quickstart", *short, "--workdir=x")
    assert json.loads((tmp_path / "x" / "summary.json").read_text())["round"] == 1
    (tmp_path / "own.py").write_text(SWEEP)
    printed = dimat("sweep", "--sweep=own.py", "--workdir=s")
    assert "[2/2] wa" in printed and (tmp_path / "s" / "report.md").exists()
    assert "| dimat" in dimat("report", "s", "x")
    dimat("merge", "x:0", "x:1", "--out=m", "--points=2", "--samples=100")
    assert (tmp_path / "m" / "model").is_dir()
    dimat("bench", "merge", "--out=b.json", "--config=quickstart", "--repeats=1")
    assert json.loads((tmp_path / "b.json").read_text())["bench"] == "merge"
    assert "finished; round 1 of 1" in dimat("show", "x")


def test_in_an_empty_folder_bundled_files_are_known_by_name(dimat):
    assert "cifar100_resnet20" in dimat("show", "configs")
    assert "'wa'" in dimat("show", "quickstart:wa")
    assert "iid-ring-wa" in dimat("show", "sweeps/quickstart").split()


def test_neither_experiments_nor_configs_can_be_imported(installed, tmp_path):
    environment, _ = installed
    code = """
import importlib.util
import dimat_jax
assert dimat_jax.__file__.startswith({site!r}), dimat_jax.__file__
for name in ("experiments", "configs", "tests"):
    assert importlib.util.find_spec(name) is None, name
"""
    code = code.format(site=str(environment.site))
    call(environment.python, "-c", code, cwd=tmp_path)
