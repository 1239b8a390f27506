"""Names of a package that are imported when they are first used (PEP 562).

A package that imports at first use writes its names twice: in a dict, which says at run
time where a name is, and in an `if TYPE_CHECKING` block, which says the same to type
checkers and editors. A test holds that the two agree.
"""

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["importer", "public_names"]

Homes = Mapping[str, Sequence[str]]
"""The names that a package offers, by the module (below the package) that has them."""


def importer(package: str, homes: Homes) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose names are imported at first use.

    The public modules of the package are imported at first use, too.

    Args:
        package: the package's `__name__`.
        homes: where the package's other names are.
    """
    home_of = {name: module for module, names in homes.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name in home_of:
            module = importlib.import_module(f"{package}.{home_of[name]}")
            value = getattr(module, name)
        elif name in _public_modules(package):
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(
                f"module {package!r} has no attribute {name!r}",
                name=name,
                obj=sys.modules[package],
            )
        # Python calls this function only for names that the package does not have yet.
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__


def public_names(package: str) -> list[str]:
    """The `dir()` of a package: its `__all__` and its public modules, sorted."""
    exported = getattr(sys.modules[package], "__all__", [])
    return sorted({*exported, *_public_modules(package)})


@functools.cache
def _public_modules(package: str) -> frozenset[str]:
    """The modules and packages in a package whose names do not begin with "_"."""
    found = pkgutil.iter_modules(sys.modules[package].__path__)
    return frozenset(module.name for module in found if module.name[0] != "_")
