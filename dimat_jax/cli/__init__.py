"""The command `dimat`."""

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from dimat_jax import __version__, _signals
from dimat_jax._lazy import public_names
from dimat_jax.errors import nearest

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "init": "write a config file to start from",
    "train": "run one config, or go on with an interrupted run",
    "sweep": "run many configs, and report on all of them",
    "report": "write tables and figures of runs",
    "tune": "choose learning rates, or values of another field, on validation images",
    "merge": "merge models that were trained apart",
    "export": "write a run's average model, or an agent, for use elsewhere",
    "bench": "measure how long training and merging take",
    "show": "say what a config will do; list configs, algorithms, options, ...",
}
"""The commands of `dimat` by name, with their summaries. `_NAME` is NAME's module."""

_USAGE = """usage: dimat COMMAND [ARGUMENTS]

{commands}

`dimat COMMAND --help` says more about a command. This one is a good start:

    dimat train --config=quickstart --workdir=runs/digits
"""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command of `dimat`, and exits.

    Args:
        argv: the command's name and its arguments. By default they are those of this
            process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments else "--help"
    if name in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = [f"    {name:{width}}  {text}" for name, text in COMMANDS.items()]
        print(_USAGE.format(commands="\n".join(lines)), end="")
        sys.exit(0)
    if name == "--version":
        print(f"dimat_jax {__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        message = f"error: there is no command {name!r}; {nearest(name, COMMANDS)}"
        print(message, file=sys.stderr)
        sys.exit(2)
    # The commands are imported only now: `dimat --help` needs no JAX. A signal within
    # these seconds ends the program without a traceback.
    _signals.end_at_once()
    from dimat_jax.cli import _program

    module = importlib.import_module(f"dimat_jax.cli._{name}")
    _program.run(module.COMMAND, arguments=arguments)


def __dir__() -> list[str]:
    return public_names(__name__)
