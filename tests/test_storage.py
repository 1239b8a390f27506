"""What the file system refuses: one message, nothing is lost, and resuming works."""

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from dimat_jax import _lock, train
from dimat_jax._storage import StorageError, explained, problem
from dimat_jax.workdir import load_agents
from tests.sweeping.small import rows
from tests.test_long_runs import tiny

ADVICE = "Then start it again"


def chain(*errors: BaseException) -> BaseException:
    """Errors of which each was raised because of the next one."""
    for error, cause in zip(errors, errors[1:], strict=False):
        error.__cause__ = cause
    return errors[0]


FULL = OSError(errno.ENOSPC, "No space left on device", "/disk/rows")
DATA_LOSS = ValueError(
    'DATA_LOSS: Error writing "/disk/checkpoints/3/d/1": No space left on device [OS'
)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FULL, "/disk/rows: No space left on device; free some space"),
        (chain(RuntimeError("a"), KeyError("b"), FULL), "/disk/rows: No space left"),
        (DATA_LOSS, "/disk/checkpoints/3/d/1: No space left on device; free"),
        (PermissionError(errno.EACCES, "no"), "Permission denied; change the permis"),
        (OSError(errno.EFBIG, "no", "/x"), "/x: File too large; raise the limit of"),
        (FileNotFoundError(errno.ENOENT, "no", "/disk/rows"), "/disk/rows: No such f"),
    ],
)
def test_the_file_the_reason_and_what_to_do_are_named(error, expected):
    found = problem(error, Path("/disk"))
    assert found is not None and found.startswith(expected)
    with pytest.raises(StorageError) as raised, explained(Path("/disk"), ADVICE):
        raise error
    message = str(raised.value)
    assert expected in message and message.endswith(f". {ADVICE}")
    assert "/" in message and raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("division by zero"),
        # A file of the program itself that is missing is the program's mistake.
        FileNotFoundError(errno.ENOENT, "no", "/usr/lib/template.html"),
        OSError("no number"),
    ],
)
def test_a_mistake_of_the_program_stays_what_it_is(error):
    assert problem(error, Path("/disk")) is None
    with pytest.raises(type(error)) as raised, explained(Path("/disk"), ADVICE):
        raise error
    assert raised.value is error


def full_file(path: Path) -> None:
    """Makes a file that takes nothing more, as on a full disk."""
    path.unlink()
    path.symlink_to("/dev/full")


def no_more(path: Path) -> None:
    """Limits the sizes of all files that this process writes."""
    del path
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))


def removed(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train.run(tiny(4), folder, lambda line: None)
    return folder


# Threads of Orbax may find out after the run's end that their event loop is closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("disturb", "name", "reason"),
    [
        (full_file, "metrics.jsonl", "No space left on device; free some space"),
        pytest.param(
            full_file,
            "metrics.digests",
            "No space left on device; free some space",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            removed,
            "metrics.jsonl",
            "Is a directory; choose another name",
            marks=pytest.mark.slow,
        ),
        # Rows, events and arrays are refused; which one comes first does not matter.
        (no_more, "", "File too large; raise the limit of file sizes"),
    ],
)
def test_a_run_that_cannot_write_ends_with_one_message_and_goes_on_later(
    tmp_path, undisturbed, caplog, disturb: Callable[[Path], None], name, reason
):
    folder, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    path = folder / name

    def log(line: str) -> None:
        if line.startswith("round   2    trained"):
            disturb(path)

    try:
        with pytest.raises(StorageError) as raised:
            train.run(tiny(4), folder, log)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # Orbax's threads would print a traceback each.
    assert not [record for record in caplog.records if record.exc_info]
    message = str(raised.value)
    assert str(path) in message and reason in message and "\n" not in message
    assert message.endswith("the same command goes on once this is mended")
    assert not list(folder.glob("checkpoints/*tmp*"))
    # The last good checkpoint can be read, and no lock is left.
    if disturb is removed:
        path.rmdir()
    load_agents(folder)
    _lock.check_free(folder)
    train.run(tiny(4), folder, lambda line: None)
    assert rows(folder) == rows(undisturbed)
    assert (folder / "summary.json").is_file()


def test_a_lock_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "run").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(_lock.LockError, match="cannot be written: .*File too lar"):
            with _lock.held(tmp_path / "run", print):
                pytest.fail("it is held")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "run" / ".running.json").exists()
    with _lock.held(tmp_path / "run", print):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(Exception, match="cannot be written: no permission in"):
        train.run(tiny(1), tmp_path / "closed" / "run", lambda line: None)
