"""How the programs start and end: one clear message, and an exit code of its kind.

0: done. 1: a run's loss was not finite. 2: bad input. Anything else that goes wrong is
a bug, and shows its traceback.
"""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags

from dimat_jax.errors import UserError

__all__ = ["run"]


def run(main: Callable[[], Any]) -> NoReturn:
    """Parses absl's flags, runs `main` and exits."""
    try:
        app.run(lambda _: main(), flags_parser=_parse)
    except UserError as error:
        _end(2, f"error: {error}")
    except ArithmeticError as error:
        _end(1, f"error: {error}")
    except KeyboardInterrupt:
        _end(130, "interrupted; the same command goes on from the last checkpoint")
    sys.exit(0)


def _parse(argv: list[str]) -> list[str]:
    """Reads the flags, config files included."""
    try:
        rest = flags.FLAGS(argv)
        # A config file that does not load says so only when it is asked for.
        for name in flags.FLAGS:
            _ = flags.FLAGS[name].value
    except AttributeError as error:
        # ml_collections: "'roundz'\nDid you mean "rounds" instead of "roundz"?"
        hint = " ".join(str(error).replace("\\n", " ").strip("'\"").split())
        raise UserError(f"the config has no such field: {hint}") from error
    except (flags.Error, OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(str(error)) from error
    if len(rest) > 1:
        raise UserError(f"arguments that are no flags: {' '.join(rest[1:])}")
    return rest


def _end(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)
