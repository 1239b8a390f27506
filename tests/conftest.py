"""Fixtures that several test folders share."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from dimat_jax.placement import request_cpu_devices

# Before JAX starts: tests lay agents out over 1, 2 and 5 devices.
request_cpu_devices(5)

# Many tests run the same small programs; each is compiled once in a session, whose
# worker processes inherit the environment of the one that removes the folder.
_COMPILED = "DIMAT_TEST_COMPILED"
if _COMPILED not in os.environ:
    _folder = tempfile.TemporaryDirectory(prefix="dimat_jax-xla-")
    os.environ[_COMPILED] = _folder.name
jax.config.update("jax_compilation_cache_dir", os.environ[_COMPILED])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


# The files that take longest.
_FIRST = (
    "test_train.py",
    "test_every_model.py",
    "test_programs.py",
    "test_merge_round.py",
    "test_model_conformance.py",
    "test_faults.py",
    "test_conformance.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts long files first: processes that share the files then end together."""
    items.sort(key=lambda item: item.path.name not in _FIRST)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real data: `$DIMAT_TEST_DATA`, or shared/data beside the project."""
    beside = Path(__file__).parents[1].parent / "shared" / "data"
    path = Path(os.environ.get("DIMAT_TEST_DATA") or beside)
    if not path.is_dir():
        pytest.skip(f"no data at {path}; DIMAT_TEST_DATA can name another folder")
    return path


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cache of decoded data for the whole test session (CIFAR takes seconds)."""
    path = tmp_path_factory.mktemp("data_cache")
    yield str(path)
    shutil.rmtree(path)
