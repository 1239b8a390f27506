"""Registries: entries by name, to which other packages may add their own.

A registry notes for each entry that was added later which module has added it. So a run
can write down where the things come from that its config names.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dimat_jax.errors import UserError

__all__ = ["RegistrationError", "Registry", "Together", "origin_of"]

T = TypeVar("T")

# Functions of these packages may be between a registry and the code that adds to it:
# checkers of types wrap functions.
_BETWEEN = (__name__.partition(".")[0], "jaxtyping", "beartype")


class RegistrationError(UserError):
    """Something cannot be registered. The message says what, and why not."""


class Registry(dict[str, T]):
    """Entries by name. `add` refuses a name that another module has taken.

    `registry[name] = entry` replaces an entry.

    Args:
        entries: the entries that dimat_jax itself has.
        kind: the class that entries must have.
    """

    def __init__(self, entries: Mapping[str, T], kind: type = object):
        super().__init__(entries)
        self._own, self._kind = dict(entries), kind
        # The entries that were added later, with the code that has added them.
        self._added: dict[str, tuple[T, _Code]] = {}

    def __setitem__(self, name: str, entry: T) -> None:
        super().__setitem__(name, entry)
        self._added[name] = entry, _caller()

    def add(self, entry: T) -> T:
        """Adds an entry under its own name.

        A module may add an entry again, as a notebook does whose cell runs twice. The
        new entry then replaces the old one.

        Args:
            entry: an entry that has the attribute `name`.

        Returns:
            `entry` itself.

        Raises:
            RegistrationError: another module has registered the name, or the entry is
                of another kind than those of this registry.
        """
        if not isinstance(entry, self._kind):
            raise RegistrationError(
                f"expected a {self._kind.__name__} to register, got {entry!r} of type "
                f"{type(entry).__name__}"
            )
        name = getattr(entry, "name", None)
        if not isinstance(name, str) or not name:
            raise RegistrationError(
                f"a {self._kind.__name__} without a name: {entry!r}"
            )
        added = self._added.get(name)
        if name in self and (added is None or added[1].place != _caller().place):
            raise RegistrationError(
                f"the name {name!r} is taken by a {self._kind.__name__} of "
                f"{self.origin(name) or 'dimat_jax'}; choose another name"
            )
        self[name] = entry
        return entry

    def origin(self, name: str) -> str:
        """The module that has added an entry; "" for the entries of dimat_jax.

        If the module cannot be imported by a name, as a config file, it is the path of
        its file.
        """
        entry, code = self._added.get(name, (None, None))
        is_current = entry is self[name] and self._own.get(name) is not entry
        return code.origin if code and is_current else ""


class Together(Mapping[str, T]):
    """The entries of other registries, together. What is added to these appears here.

    Args:
        sources: the registries.
        change: what makes an entry here of an entry there. By default they are equal.
    """

    def __init__(
        self, *sources: Mapping[str, T], change: Callable[[T], T] | None = None
    ):
        self._sources, self._change = sources, change
        # Entries are compared by identity, so each is changed only once.
        self._changed: dict[str, tuple[T, T]] = {}

    def __getitem__(self, name: str) -> T:
        entry = self.source(name)[name]
        if self._change is None:
            return entry
        before, after = self._changed.get(name, (None, None))
        if before is not entry or after is None:
            after = self._change(entry)
            self._changed[name] = entry, after
        return after

    def source(self, name: str) -> Mapping[str, T]:
        """The registry that has an entry."""
        for source in self._sources:
            if name in source:
                return source
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for each in self._sources for name in each))

    def __len__(self) -> int:
        return len(list(iter(self)))


def origin_of(entries: Any, name: Any) -> str:
    """The module that has added an entry to a registry; see `Registry.origin`."""
    if isinstance(entries, Together):
        return origin_of(entries.source(name), name)
    return entries.origin(name) if isinstance(entries, Registry) else ""


class _Code(NamedTuple):
    """Code that has added an entry.

    Attributes:
        origin: the module, or the path of its file if it has no name to import it by.
        place: the path of the file; the module if there is none. Several programs may
            run a file as modules of different names.
    """

    origin: str
    place: str


def _caller() -> _Code:
    """The code outside of this package that is running.

    A module that is not in `sys.modules`, as a config file, cannot be imported by its
    name.
    """
    frame: Any = sys._getframe()
    name = ""
    while frame.f_back and (not name or name.partition(".")[0] in _BETWEEN):
        frame = frame.f_back
        name = str(frame.f_globals.get("__name__"))
    module = frame.f_globals
    is_imported = getattr(sys.modules.get(name), "__dict__", None) is module
    if "__file__" not in module:
        return _Code(name, name)
    place = str(Path(module["__file__"]).resolve())
    return _Code(name if is_imported else place, place)
