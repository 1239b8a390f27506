"""Fixtures that several test folders share."""

import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

# The hook has to be there before the first import of the package. It is not installed
# by pytest's option --jaxtyping-packages, because pytest-xdist does not pass the
# options in `addopts` on to plugins of its worker processes.
# Which items of a list or a dict are checked must not differ from run to run
# (`is_random`), and an int will do where a float is asked for (`is_pep484_tower`).
install_import_hook(
    "dimat_jax",
    "beartype.beartype(conf=beartype.BeartypeConf("
    "is_pep484_tower=True, is_random=False))",
)

from dimat_jax.placement import request_cpu_devices  # noqa: E402
from tests import promotion  # noqa: E402

# Before JAX starts: tests lay agents out over 1, 2 and 5 devices.
request_cpu_devices(5)

# No test measures time: the first example compiles, and the machine may be busy.
hypothesis.settings.register_profile("dimat_jax", deadline=None)
hypothesis.settings.load_profile("dimat_jax")

# Many tests run the same small programs; each is compiled once in a session, whose
# worker processes inherit the environment of the one that removes the folder.
_COMPILED = "DIMAT_TEST_COMPILED"
if _COMPILED not in os.environ:
    _folder = tempfile.TemporaryDirectory(prefix="dimat_jax-xla-")
    os.environ[_COMPILED] = _folder.name
jax.config.update("jax_compilation_cache_dir", os.environ[_COMPILED])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# The workers of pytest-xdist ignore SIGINT, and nohup ignores SIGHUP. Programs that
# tests start would inherit that. A handler that does nothing has the same effect here,
# and is not inherited.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, lambda number, frame: None)

# A broadcast over a missing axis, or a dtype that JAX chose, is more often a mistake
# than a wish. In the tests, the package has to write down what it means.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
promotion.allow_in_flax_and_optax()


# The files that take longest.
_FIRST = (
    "test_train.py",
    "test_processes.py",
    "test_model_conformance.py",
    "test_examples.py",
    "test_programs.py",
    "test_conformance.py",
    "test_batch_norm.py",
    "test_small_shards.py",
    "test_ending.py",
    "test_verify.py",
    "test_derive.py",
    "test_interruptions.py",
)


@pytest.hookimpl(tryfirst=True)  # The slow cases are deselected after this.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks slow cases, and puts long files first.

    Processes that share the files end together if the long ones come first.
    """
    n_cases: Counter[tuple[Path, str]] = Counter()
    for item in items:
        sampled = item.get_closest_marker("every_nth")
        if sampled is not None:
            test = (item.path, item.name.partition("[")[0])
            if n_cases[test] % sampled.args[0]:
                item.add_marker(pytest.mark.slow)
            n_cases[test] += 1
    items.sort(key=lambda item: item.path.name not in _FIRST)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_end_with_their_module() -> Iterator[None]:
    """Frees the programs that a module's tests have compiled.

    Thousands of them would need gigabytes, and more mappings than a process may have.
    """
    yield
    jax.clear_caches()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests that need an accelerator where there is none."""
    anywhere = os.environ.get("DIMAT_TEST_ANY_DEVICE")
    needs_one = item.get_closest_marker("gpu") is not None
    if needs_one and not anywhere and jax.default_backend() == "cpu":
        pytest.skip("JAX has no accelerator; DIMAT_TEST_ANY_DEVICE=1 runs it here")


@pytest.fixture
def without_type_checks() -> Iterator[None]:
    """For tests that pass a wrong type, to see the error that users get for it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


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
