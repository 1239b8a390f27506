"""Bad input of every kind ends with one message, exit code 2, and nothing written.

Wrong values come from the schema: every option gets values beside its bounds, names
that do not exist, texts that are no numbers, and a value where nothing reads it.
Damaged files and code that cannot run come from `_bad_files`.
"""

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dimat_jax.config import (
    ROOT,
    Config,
    default_config,
    drop_unread,
    fields_of,
    resolved,
)
from dimat_jax.errors import UserError
from dimat_jax.options import Option, read, readers
from experiments.soak import _bad_files
from experiments.soak._cases import Case
from experiments.soak._children import ACCEPTED, Limits, run
from experiments.soak._draws import OPTIONS, SMALL, write_config

__all__ = ["another_value", "mistake"]

# Everything is checked within so many seconds of work.
_MOST_SECONDS = 20.0
_READERS = readers(ROOT)
_NOT_NUMBERS = ("abc", "", "1,5", "0x", "--", "None", "[1]", "1e", "é")


def mistake(case: Case) -> None:
    """One bad input: a wrong value of an option, or a damaged file."""
    if case.number % 3 == 2:
        what, arguments = _bad_files.draw(case.folder, case.rng)
        must_refuse = False
    else:
        options = list(OPTIONS.values())
        at = 2 * (case.number // 3) + case.number % 3
        option = options[at % len(options)]
        what, arguments = _wrong_value(option, case.folder, case.rng)
        must_refuse = True
    before = _files(case.folder)
    ended = run(arguments, case.folder, Limits(only_checks=True)).wait()
    answer = ended.errors[0] if ended.errors else ended.code
    case.notes.append(f"{what[:200]} | {answer}")
    if ended.code == ACCEPTED or ended.code == 0:
        case.expect("Traceback" not in ended.text, "traceback", what, ended)
        # Not every flipped bit of a file makes it a bad one.
        case.expect(not must_refuse, "accepted", what, ended)
        case.count("inputs that were good after all")
        return
    case.expect_message(what, ended, _MOST_SECONDS)
    case.expect(_files(case.folder) == before, "written", what, ended)
    case.count("bad inputs")


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """The times and sizes of all files of a folder, but for the lock's."""
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.name != ".running" and path.is_file()
    }


def _wrong_value(
    option: Option, folder: Path, rng: random.Random
) -> tuple[str, list[str]]:
    """A command line with a wrong value of an option, and words for it."""
    unread = rng.random() < 0.2 and not_reading(option.path)
    fields = unread or reading(option.path)
    config = _config({**SMALL, **fields})
    if unread and option.path not in read(ROOT, resolved(fields_of(config))):
        value = str(another_value(option))
    else:
        config = _config({**SMALL, **reading(option.path)})
        value = rng.choice(list(wrong_values(option)))
    path = write_config(config, folder / "config.py")
    flag = f"--config.{option.path}={value}"
    given = ["train", f"--config={path}", f"--workdir={folder / 'run'}", flag]
    return flag, given


def wrong_values(option: Option) -> Iterator[str]:
    """Yields texts that are no values of an option."""
    if option.choices is not None:
        name = next(iter(option.choices))
        yield from (
            "no_such_name",
            f"{name}x",
            name.upper() + "-",
            "1",
            " ",
            "/",
            "é\n",
        )
        return
    if isinstance(option.default, bool):
        yield from ("maybe", "2", "tru", "None")
        return
    if isinstance(option.default, str):
        # A path below something that is no folder, and one that is too long.
        yield from ("/dev/null/x", "/dev/null/x/y", "x" * 5000 + "/y")
        return
    is_whole = isinstance(option.default, int)
    yield from (text for text in _NOT_NUMBERS if text not in option.words)
    if option.at_least is not None:
        yield from (str(int(option.at_least) - 1), f"-1{'0' * 30}")
    if option.above is not None:
        yield f"{option.above - 1:g}"
        if option.above or not option.empty:  # 0 may be the empty value.
            yield f"{option.above:g}"
    if option.at_most is not None:
        yield from (str(int(option.at_most) + 1), f"1{'0' * 30}")
    if option.below is not None:
        yield from (f"{option.below:g}", f"1{'0' * 30}")
    yield from ("1.5", "1e3") if is_whole else ("nan", "inf", "-inf", "1e400")


def another_value(option: Option) -> Any:
    """An allowed value that is not the default."""
    if option.choices is not None:
        return next(name for name in option.choices if name != option.default)
    if isinstance(option.default, bool):
        return not option.default
    if isinstance(option.default, str):
        return "1:2-3" if option.path == "faults.absences" else "some/file.npy"
    for value in (option.default + 1, option.default / 2, 0.25):
        value = type(option.default)(value)
        try:
            option.check(value)
        except UserError:
            continue
        if value != option.default:
            return value
    raise AssertionError(f"no other value of {option.path}")


def reading(path: str) -> dict[str, Any]:
    """Fields with which a config reads an option: choices that lead to it."""
    if path in {option.path for option in ROOT}:
        return {}
    opener, values = _READERS[path][0]
    fields = reading(opener.path)
    return {**fields, opener.path: values[0] or another_value(opener)}


def not_reading(path: str) -> dict[str, Any]:
    """Fields with which a config may not read an option; {} if there are none."""
    fields: dict[str, Any] = {}
    for opener, values in _READERS.get(path, ()):
        if not isinstance(opener.choices, Mapping):
            fields[opener.path] = type(opener.default)()
        elif others := [name for name in opener.choices if name not in values]:
            fields.setdefault(opener.path, others[0])
    return fields


def _config(fields: dict[str, Any]) -> Config:
    config = default_config()
    config.update_from_flattened_dict(fields)
    drop_unread(config)
    if config.graph.file:
        config.graph.file = "no-such-file.json"
    return config
