"""Runs the commands of `dimat`: flags, help, error messages and exit codes.

The exit code is 0 after success, 1 if a run's loss was not finite or runs of a sweep
have failed, and 2 after bad input, with one clear message. After a signal it is 128 and
the signal's number. Any other error is a bug, and shows its traceback.
"""

import contextlib
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from absl import app, flags, logging

from dimat_jax import _processes, _signals, plugins
from dimat_jax._compile_cache import keep_compiled
from dimat_jax._near_names import probably_meant
from dimat_jax._storage import problem
from dimat_jax.config import field_paths
from dimat_jax.errors import (
    Interrupted,
    NonFiniteError,
    SweepError,
    UserError,
    in_one_line,
    out_of_memory,
)

__all__ = ["Command", "expect_no", "run"]


class Command(NamedTuple):
    """One command of `dimat`.

    Attributes:
        name: the word after `dimat`.
        doc: the help text, in which the command is "dimat NAME". It is the docstring of
            the command's file.
        main: the function of the command. It takes the arguments that are no flags.
        define_flags: the function that defines the command's flags. They are not
            defined on import, because several commands have flags of the same name.
        resumes: whether the same command continues from where it was interrupted.
        more_help: the function that writes the end of the help text, which follows the
            flags. It is called after plugins have been loaded.
    """

    name: str
    doc: str | None
    main: Callable[[list[str]], Any]
    define_flags: Callable[[], Any] = lambda: None
    resumes: bool = False
    more_help: Callable[[], str] = lambda: ""


def run(
    command: Command,
    called: str | None = None,
    arguments: Sequence[str] | None = None,
) -> NoReturn:
    """Parses the flags, runs a command with the other arguments, and exits.

    Args:
        command: the command to run.
        called: the words with which the user has called it. By default "dimat NAME".
        arguments: the flags and the other arguments. By default those of this process.
    """
    _signals.start()
    called = called or f"dimat {command.name}"
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # ml_collections looks for overrides of a config's fields in `sys.argv`.
    sys.argv = [called, *arguments]
    # Orbax logs every step of every save at the level below; --verbosity=0 shows it.
    logging.set_verbosity(logging.WARNING)
    # The runs of a sweep, and a run that resumes, compile the same programs.
    keep_compiled()
    try:
        _define(command, called, arguments)
        app.run(
            lambda argv: _main(command, argv[1:]), argv=sys.argv, flags_parser=_parse
        )
    except UserError as error:
        _end(2, f"error: {error}")
    except (NonFiniteError, SweepError) as error:
        _end(1, f"error: {error}")
    except Exception as error:
        # Neither a full disk nor a full memory is a mistake in the program.
        reason = problem(error) or out_of_memory(error)
        if reason is None:
            raise
        _end(2, f"error: {reason}")
    except KeyboardInterrupt as error:
        if not isinstance(error, Interrupted):
            error = Interrupted()
        hint = "; the same command goes on from the last checkpoint"
        what = str(error) or "interrupted"
        message = what + (hint if command.resumes else "")
        _end(error.exit_code, message, error.agreed)
    sys.exit(0)


def _define(command: Command, called: str, arguments: Sequence[str]) -> None:
    """Defines the flags, or prints the help text if it is asked for, and exits."""
    shared = set(flags.FLAGS)
    with _reading_flags():
        # A default may be a config, which overrides already change here.
        flags.DEFINE_multi_string(
            "plugin",
            [],
            "A module, or a file that ends with .py, which adds algorithms, models and "
            "the like by name. The flag may be repeated.",
        )
        # Configs, which are read with the flags, may name things of plugins.
        plugins.load(*_plugins(called, arguments))
        command.define_flags()
    if {"-h", "-help", "--help"} & set(arguments):
        print(_help(command, called, sorted(set(flags.FLAGS) - shared)))
        sys.exit(0)


def _plugins(called: str, arguments: Sequence[str]) -> list[str]:
    """The values of --plugin, read before all other flags."""
    values = flags.FlagValues()
    flags.DEFINE_multi_string("plugin", [], "See `_define`.", flag_values=values)
    values([called, *arguments], known_only=True)
    return list(values["plugin"].value or ())


def _main(command: Command, arguments: list[str]) -> NoReturn:
    plugins.load_installed()
    command.main(arguments)
    _processes.leave(0)


def _help(command: Command, called: str, names: Sequence[str]) -> str:
    """Writes the help text, with the meanings and defaults of the command's flags."""
    paragraphs = [(command.doc or "").strip().replace(f"dimat {command.name}", called)]
    for name in names:
        flag = flags.FLAGS[name]
        shown = isinstance(flag.default, (str, int, float))
        # absl adds words of its own to flags that may be repeated.
        meaning = flag.help.partition(";\n    repeat this option")[0]
        text = meaning + (f" Default: {flag.default}." if shown else "")
        text = textwrap.indent(textwrap.fill(text, 80), " " * 8)
        paragraphs.append(f"    --{name}\n{text}")
    return "\n\n".join(filter(None, [*paragraphs, command.more_help()]))


def _parse(argv: Sequence[str]) -> list[str]:
    """Reads the flags, config files included."""
    with _reading_flags():
        return flags.FLAGS(argv)


@contextlib.contextmanager
def _reading_flags() -> Iterator[None]:
    """Raises what is wrong with flags as an error with one message."""
    try:
        yield
    except UserError:
        raise
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"{error}{_perhaps_a_field(error.flagname)}") from error
    except Exception as error:
        # Nothing is read here but what the user has given, and absl and ml_collections
        # raise many kinds of errors for it.
        if isinstance(error.__context__, UserError):
            raise error.__context__ from None
        is_flag = isinstance(error, flags.Error)
        message = " ".join(str(error).split()) if is_flag else in_one_line(error)
        raise UserError(_in_plain_words(message)) from error


def _perhaps_a_field(name: str) -> str:
    """Names the fields of a config that may be meant by a flag that does not exist."""
    if "config" not in flags.FLAGS or name.startswith("config."):
        return ""
    meant = probably_meant(name, field_paths())
    given = " or ".join(f"--config.{path}" for path in meant)
    return f". A field of the config is set by {given}" if meant else ""


# What Python and absl say about values of flags, and the same in plain words.
_PLAIN = (
    (r"invalid literal for int\(\) with base 10: .*", "expected a whole number"),
    (r"could not convert string to float: .*", "expected a number"),
    (r"\('Non-boolean argument to boolean flag', .*\)", "expected true or false"),
    (r"Could not parse '(.*)': SyntaxError.*", r"the config has no field '\1'"),
)


def _in_plain_words(message: str) -> str:
    """Replaces what a library says about a flag's value by what is expected."""
    for said, plain in _PLAIN:
        message = re.sub(said, plain, message)
    return message


def expect_no(arguments: list[str]) -> None:
    """Refuses arguments that are no flags, for commands that take only flags."""
    if arguments:
        raise UserError(f"expected only flags (--name=value), got {arguments}")


def _end(code: int, message: str, agreed: bool = False) -> NoReturn:
    print(message, file=sys.stderr)
    _processes.leave(code, agreed)
