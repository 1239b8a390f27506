"""The face of the package: what `import dimat_jax` offers, and what it leaves out."""

import ast
import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import dimat_jax

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "dimat_jax",
    "dimat_jax.algorithms",
    "dimat_jax.cli",
    "dimat_jax.data",
    "dimat_jax.matching",
    "dimat_jax.models",
    "dimat_jax.permutation",
    "dimat_jax.reports",
)
# Packages whose names, or some of them, are imported at first use.
LAZY = ("dimat_jax", "dimat_jax.data", "dimat_jax.models", "dimat_jax.reports")
FACE = sorted(getattr(dimat_jax, "__all__"))  # noqa: B009  (type checkers know no list)
# What the permutation tools do without.
HEAVY = (
    "absl",
    "flax",
    "matplotlib",
    "ml_collections",
    "optax",
    "orbax",
    "pandas",
    "sklearn",
    "tensorboardX",
    "tensorflow_datasets",
    "torch",
)


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh process has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def for_type_checkers(package: str) -> dict[str, str]:
    """The names in a package's `if TYPE_CHECKING` block, and their modules."""
    source = inspect.getsource(importlib.import_module(package))
    (block,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            # The form that exports the name from a typed package.
            assert alias.asname == alias.name
            found[alias.name] = str(node.module)
    return found


def test_importing_the_package_loads_nothing_but_the_standard_library():
    before, after = loaded_by("pass"), loaded_by("import dimat_jax")
    new = {name for name in after - before if not name.startswith("_")}
    assert {name for name in new if name.startswith("dimat_jax")} == {
        "dimat_jax",
        "dimat_jax._lazy",
    }
    others = {name.partition(".")[0] for name in new} - {"dimat_jax"}
    assert others <= sys.stdlib_module_names


@pytest.mark.parametrize(
    "statement",
    [
        "import dimat_jax.permutation",
        "import dimat_jax.matching",
        "import dimat_jax.merge",
        "from dimat_jax import derive, weight_matching, average, UserError",
    ],
)
def test_the_permutation_tools_load_no_library_for_training(statement):
    loaded = {name.partition(".")[0] for name in loaded_by(statement)}
    assert "jax" in loaded
    assert not loaded & set(HEAVY)


def test_weights_from_pytorch_are_offered_without_loading_pytorch():
    loaded = loaded_by("from dimat_jax import from_torch, to_torch")
    assert "dimat_jax.models.torch_import" in loaded
    assert not loaded & {"torch", "safetensors"}


@pytest.mark.parametrize("package", PACKAGES)
def test_dir_shows_public_names_only_and_each_can_be_used(package):
    module = importlib.import_module(package)
    names = dir(module)
    assert names and not [name for name in names if name.startswith("_")]
    assert set(getattr(module, "__all__", [])) <= set(names)
    for name in names:
        getattr(module, name)


@pytest.mark.parametrize("name", FACE)
def test_every_name_of_the_face_is_documented(name):
    value, home = getattr(dimat_jax, name), for_type_checkers("dimat_jax")[name]
    if callable(value):
        assert inspect.getdoc(value)
    else:
        # A registry: its own module must speak of it.
        assert f"{name}[" in inspect.getsource(importlib.import_module(home))


@pytest.mark.parametrize("package", LAZY)
def test_type_checkers_and_programs_find_the_same_names(package):
    module, names = importlib.import_module(package), for_type_checkers(package)
    for name, home in names.items():
        source = importlib.import_module(home)
        # A module of the package itself is found by its own name.
        expected = (
            importlib.import_module(f"{home}.{name}")
            if source is module
            else getattr(source, name)
        )
        assert getattr(module, name) is expected
    # dimat_jax.models imports only some of its names at first use.
    if package != "dimat_jax.models":
        assert sorted(names) == dir(module)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_name_is_both_a_module_and_something_else(package):
    module = importlib.import_module(package)
    for name in dir(module):
        if importlib.util.find_spec(f"{package}.{name}"):
            assert isinstance(getattr(module, name), ModuleType), name


def test_there_is_no_module_where_a_function_is():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("dimat_jax.permutation.derive")
    assert inspect.isfunction(dimat_jax.permutation.derive)


def test_a_name_that_does_not_exist_is_refused_as_by_any_module():
    with pytest.raises(AttributeError, match="'dimat_jax' has no attribute 'derve'"):
        dimat_jax.derve  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018
    assert not hasattr(dimat_jax.reports, "nothing")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from dimat_jax import nothing")


def test_the_version_stands_once():
    assert "version =" not in (ROOT / "pyproject.toml").read_text().split("[tool.")[0]
    assert dimat_jax.__version__
