"""Options and records: what a config can say, stated once, where it is read.

An `Option` is declared in the file whose code reads it. It holds the option's place in
a config, its default, its meaning, and the values that it may have. Function signatures
take their defaults from it, and functions check their arguments with it:

    STAY = Option("merge.stay", 0.0, "What a unit must gain to move.", at_least=0)

    def align(..., stay: float = STAY.default):
        STAY.check(stay)

A `Record` is one entry of a registry (of topologies, of optimizers, ...): how the thing
is built, and the options that it reads. A registry is a dict of records by name, and an
option whose `choices` are a registry leads to the options of the entry that it names.
So the options that a config reads form a tree, and `read` walks it. Checks, builders,
reports and the documentation all use that one walk.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from dimat_jax.errors import UserError, nearest

__all__ = [
    "SEED",
    "Option",
    "OptionError",
    "Record",
    "arguments",
    "every",
    "read",
    "readers",
    "registry",
]

T = TypeVar("T")
Fields = Mapping[str, Any]
"""The values of a config's fields, by dotted path."""


class OptionError(UserError):
    """An option with a value that it cannot have; the message says what is allowed."""


@dataclasses.dataclass(frozen=True, eq=False)
class Option:
    """One field of a config, and one keyword argument of the code that reads it.

    Attributes:
        path: the field's place in a config, e.g. "merge.stay".
        default: the value of a config that does not set it.
        meaning: one or more full sentences, for the documentation.
        choices: the names that it may be; a registry of `Record`s, if these read
            further options. None: it is no choice.
        at_least, above, at_most, below: the bounds of a number. A bounded number must
            be finite.
        unit: of a number, e.g. "epochs".
        empty: what the empty value stands for ("" of a text, 0 of a number), in words.
            A text without these words must not be empty where it is read.
        opens: the options that are read only where this one is not empty.
        changes_results: False for where things are, how fast they go and what is kept:
            a run may resume with another value, and runs are not compared by it.
    """

    path: str
    default: Any
    meaning: str
    choices: Collection[str] | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    unit: str = ""
    empty: str = ""
    opens: tuple["Option", ...] = ()
    changes_results: bool = True

    @property
    def keyword(self) -> str:
        """The argument's name in the code that reads it: the last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def bounds(self) -> str:
        """The bounds in words, e.g. "at least 0 and below 1"; "" if there are none."""
        limits = {
            "at least": self.at_least,
            "above": self.above,
            "at most": self.at_most,
            "below": self.below,
        }
        return " and ".join(
            f"{words} {limit:g}" for words, limit in limits.items() if limit is not None
        )

    def check(self, value: Any, name: str | None = None) -> None:
        """Checks a value of this option.

        Args:
            value: the value.
            name: what to call it in the message; None: the keyword.

        Raises:
            OptionError: the value is not allowed; the message says what is.
        """
        name = name or self.keyword
        if self.empty and not value and isinstance(value, (str, int, float)):
            return
        if self.choices is not None and value not in self.choices:
            raise OptionError(f"{name} is {value!r}; {nearest(value, self.choices)}")
        if value == "":
            raise OptionError(f"{name} is empty; it must be given here")
        if self.bounds and not self._within(value):
            raise OptionError(f"{name} is {value}; it must be {self.bounds}")

    def _within(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def entry(self, name: str) -> "Record[Any]":
        """The record that a value of this option names."""
        assert isinstance(self.choices, Mapping)
        return self.choices[name]

    def opened_by(self, value: Any) -> tuple["Option", ...]:
        """The options that are read where this one has a value."""
        if isinstance(self.choices, Mapping) and value in self.choices:
            return (*self.choices[value].reads, *self.opens)
        return self.opens if value else ()

    def under(self, section: str) -> "Option":
        """The same option in another section, with all that it leads to."""
        choices = self.choices
        if isinstance(choices, Mapping):
            choices = {name: record.under(section) for name, record in choices.items()}
        return dataclasses.replace(
            self,
            path=f"{section}.{self.path}",
            choices=choices,
            opens=tuple(option.under(section) for option in self.opens),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Record(Generic[T]):
    """One entry of a registry. Calling it builds the thing.

    Attributes:
        name: its name in the registry and in a config.
        build: the function that builds it.
        options: the options that are keyword arguments of `build`.
        leads_to: the options that others read where this entry is chosen.
        ignores: the options that others read, but not where this entry is chosen.
        summary: what it is, in a sentence; "": the first line of `build`'s docstring.
    """

    name: str
    build: Callable[..., T]
    options: tuple[Option, ...] = ()
    leads_to: tuple[Option, ...] = ()
    ignores: tuple[Option, ...] = ()
    summary: str = ""

    def __call__(self, *args: Any, **kwargs: Any) -> T:
        return self.build(*args, **kwargs)

    @property
    def reads(self) -> tuple[Option, ...]:
        """All options that are read because this entry is chosen."""
        return (*self.options, *self.leads_to)

    @property
    def meaning(self) -> str:
        """What it is, in a sentence."""
        return self.summary or (inspect.getdoc(self.build) or "").partition("\n")[0]

    def under(self, section: str) -> "Record[T]":
        """The same entry with its options in another section."""
        return dataclasses.replace(
            self,
            options=tuple(option.under(section) for option in self.options),
            leads_to=tuple(option.under(section) for option in self.leads_to),
        )


R = TypeVar("R", bound=Record)


def registry(*records: R) -> dict[str, R]:
    """Records by name, in the given order."""
    return {record.name: record for record in records}


def read(roots: Iterable[Option], fields: Fields) -> dict[str, Option]:
    """The options that a config reads, by path.

    Args:
        roots: the options that every config reads.
        fields: the config's values. The value of an option that chooses among records
            must be one of them, or empty.
    """
    found: dict[str, Option] = {}
    ignored: set[str] = set()
    waiting = list(roots)
    while waiting:
        option = waiting.pop(0)
        if option.path in found:
            continue
        found[option.path] = option
        value = fields[option.path]
        waiting += option.opened_by(value)
        if isinstance(option.choices, Mapping) and value in option.choices:
            ignored |= {other.path for other in option.choices[value].ignores}
    return {path: option for path, option in found.items() if path not in ignored}


def every(roots: Iterable[Option]) -> Iterator[Option]:
    """All options that any config can read, each path once."""
    waiting, seen = list(roots), set()
    while waiting:
        option = waiting.pop(0)
        if option.path in seen:
            continue
        seen.add(option.path)
        yield option
        opened = [other for _, other in _opened(option)]
        waiting = opened + waiting


def readers(roots: Iterable[Option]) -> dict[str, list[tuple[Option, list[str]]]]:
    """For every path, which other options lead to it, and with which of their values.

    An option that every config reads has no entry. A value of "" stands for any value
    that is not empty.
    """
    found: dict[str, list[tuple[Option, list[str]]]] = {}
    for option in every(roots):
        values_by_path: dict[str, list[str]] = {}
        for value, opened in _opened(option):
            values_by_path.setdefault(opened.path, []).append(value)
        for path, values in values_by_path.items():
            found.setdefault(path, []).append((option, values))
    return found


def _opened(option: Option) -> Iterator[tuple[str, Option]]:
    """Every value that leads to further options, and each of these."""
    if isinstance(option.choices, Mapping):
        for name, record in option.choices.items():
            for other in record.reads:
                yield name, other
    for other in option.opens:
        yield "", other


SEED = Option(
    "seed",
    0,
    "Everything random follows from it: data order, initial weights, augmentation, "
    "random graphs, faults. Two runs with the same seed draw the same numbers.",
    at_least=0,
)


def arguments(record: Record, fields: Fields) -> dict[str, Any]:
    """The keyword arguments that a config gives the builder of a record."""
    return {option.keyword: fields[option.path] for option in record.options}
