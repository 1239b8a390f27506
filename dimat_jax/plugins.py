"""Plugins: modules that add algorithms, models, data sets and other things by name.

A plugin is a module that adds records to registries when it is imported:

    from dimat_jax import ALGORITHMS
    ALGORITHMS.add(AlgorithmRecord("near_dgd", near_dgd, ...))

It becomes known in one of three ways. An installed package names it as an entry point
of the group `dimat_jax.plugins`, and then it is imported before the first config is
made or read. A program is given --plugin=MODULE, or --plugin=FILE.py. Or a config file
or a script imports it. A run writes down which modules the things come from that its
config names, so that a program which reads the run's folder imports them by itself.
"""

from importlib import metadata
from pathlib import Path

from dimat_jax import _user_code
from dimat_jax.errors import UserError

__all__ = ["GROUP", "PluginError", "load", "load_installed"]

GROUP = "dimat_jax.plugins"
"""The group of entry points by which installed packages name their plugins."""


class PluginError(UserError):
    """A plugin cannot be used. The message names it, and says why."""


# Files that have been loaded. Modules with names are in `sys.modules`.
_loaded: set[Path] = set()
# The entry points that have been loaded, or are being loaded. "" is among them once
# entry points have been looked for, since there may be none.
_installed: set[str] = set()


def load(*plugins: str) -> None:
    """Imports plugins. Those that are imported already stay as they are.

    Args:
        plugins: names of modules, or paths of files that end with ".py".

    Raises:
        PluginError: a plugin cannot be imported, or registers what cannot be
            registered, as a name that is taken.
    """
    for plugin in plugins:
        try:
            if plugin == "__main__":
                raise UserError(
                    "a script or a notebook has registered what is needed here; put "
                    "that code into a file of its own, and import it"
                )
            if plugin.endswith(".py"):
                _load_file(Path(plugin).resolve())
            else:
                _user_code.import_module(plugin)
        except UserError as error:
            raise PluginError(f"the plugin {plugin!r}: {error}") from error


def load_installed() -> None:
    """Imports the plugins of installed packages, once. See `GROUP`.

    Raises:
        PluginError: a plugin cannot be imported; see `load`. The message names the
            package that it belongs to.
    """
    if _installed:
        return
    # A plugin may make a config itself, so the list is complete before any is loaded.
    entries = {entry.value: entry for entry in metadata.entry_points(group=GROUP)}
    _installed.update(["", *entries])
    for value, entry in entries.items():
        try:
            load(value.partition(":")[0].strip())
        except PluginError as error:
            _installed.clear()
            package = entry.dist.name if entry.dist else "a package"
            raise PluginError(
                f"{error}. It is an entry point of {package}; mend or uninstall that"
            ) from error


def _load_file(path: Path) -> None:
    if path in _loaded:
        return
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    _user_code.run(path)
    _loaded.add(path)
