"""How the programs start and end: one clear message, and an exit code of its kind.

0: done. 1: a run's loss was not finite. 2: bad input. Anything else that goes wrong is
a bug, and shows its traceback.
"""

import ast
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from dimat_jax.data._cache import user_cache
from dimat_jax.errors import NonFiniteError, UserError

__all__ = ["expect_no", "run"]


def run(main: Callable[[list[str]], Any], *, resumes: bool = True) -> NoReturn:
    """Parses absl's flags, runs `main` with the other arguments, and exits.

    Args:
        main: the program.
        resumes: whether the same command goes on where it was interrupted.
    """
    # Orbax tells every step of every save; --verbosity=0 brings it back.
    logging.set_verbosity(logging.WARNING)
    # The runs of a sweep, and a run that resumes, compile the same programs.
    if not jax.config.values["jax_compilation_cache_dir"]:
        cache = str(user_cache() / "xla")
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    try:
        app.run(lambda argv: main(argv[1:]), flags_parser=_parse)
    except UserError as error:
        _end(2, f"error: {error}")
    except NonFiniteError as error:
        _end(1, f"error: {error}")
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from the last checkpoint"
        _end(130, "interrupted" + (goes_on if resumes else ""))
    sys.exit(0)


def _parse(argv: list[str]) -> list[str]:
    """Reads the flags, config files included."""
    try:
        rest = flags.FLAGS(argv)
        # A config file that does not load says so only when its fields are asked for.
        for name in flags.FLAGS:
            getattr(getattr(flags.FLAGS, name), "keys", None)
    except AttributeError as error:
        # ml_collections: "'roundz'\nDid you mean "rounds" instead of "roundz"?"
        message = str(error)
        if message.startswith("'"):
            message = ast.literal_eval(message)
        hint = " ".join(message.split())
        raise UserError(f"the config has no such field: {hint}") from error
    except (flags.Error, OSError, ValueError, TypeError, KeyError) as error:
        message = str(error).strip()
        if "Traceback" in message:  # what a config file raised; its last line says it
            message = message.splitlines()[-1].strip()
        raise UserError(message) from error
    return rest


def expect_no(arguments: list[str]) -> None:
    """Refuses what is left of a command line that should hold flags alone."""
    if arguments:
        raise UserError(f"expected only flags (--name=value), got {arguments}")


def _end(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)
