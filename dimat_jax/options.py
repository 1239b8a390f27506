"""Options and records: each fact about a config's fields stands in one place.

An `Option` is declared in the file of the thing that it configures. It holds the
option's place in a config, its default, its meaning, and the values that it may have.
Function signatures take their defaults from it, and functions check their arguments
with it:

    STAY = Option("merge.stay", 0.0, "What a unit must gain to move.", at_least=0)

    def align(..., stay: float = STAY.default):
        STAY.check(stay)

A `Record` is one entry of a registry (of topologies, of optimizers, ...): how the thing
is built, and the options that it reads. A registry is a dict of records by name, to
which other packages may add (see `dimat_jax.plugins`), and an option whose `choices`
are a registry leads to the options of the entry that it names.
So the options that a config reads form a tree, and `read` finds all of them. Checks,
builders, reports and the documentation all use it.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from numbers import Real as Number
from typing import Any, Generic, TypeVar

from dimat_jax._registries import Registry, Together, origin_of
from dimat_jax.errors import UserError, nearest

__all__ = [
    "SEED",
    "Option",
    "OptionError",
    "Record",
    "Registry",
    "Together",
    "arguments",
    "describe_readers",
    "every",
    "origin_of",
    "read",
    "readers",
    "registry",
]

T = TypeVar("T")
Fields = Mapping[str, Any]
"""The values of a config's fields, by dotted path."""


class OptionError(UserError):
    """An option has a value that is not allowed. The message says what is allowed."""


@dataclasses.dataclass(frozen=True, eq=False)
class Option:
    """One field of a config, and one keyword argument of the code that reads it.

    Attributes:
        path: the field's place in a config, e.g. "merge.stay".
        default: the value in a config that does not set the field.
        meaning: the documentation of the option, one or more full sentences.
        choices: the names that the value may be: a registry of `Record`s if each name
            leads to further options. None if the option is no choice among names.
        at_least: the least allowed number. A number with any bound must be finite.
        above: a bound that the number must exceed.
        at_most: the largest allowed number.
        below: a bound that the number must not reach.
        unit: the unit of a number, e.g. "epochs".
        words: the texts that the value may be instead of a number. The numbers of an
            option with such texts are whole numbers.
        empty: a description of what the empty value means ("" for a text, 0 for a
            number). A text without this description must not be empty if it is read.
        opens: the options that are read only if this one is not empty.
        changes_results: False for an option that only says where files are, how fast a
            run is, or what it keeps. A run may resume with another value of such an
            option, and reports do not compare runs by it.
        names_file: whether the value is the path of a file whose content changes
            results. A run keeps a copy of it.
        several: whether the value may be several of the choices, with commas between
            them.
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
    words: tuple[str, ...] = ()
    empty: str = ""
    opens: tuple["Option", ...] = ()
    changes_results: bool = True
    names_file: bool = False
    several: bool = False

    @property
    def keyword(self) -> str:
        """The argument's name in the code that reads it: the last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def bounds(self) -> str:
        """The bounds in words, e.g. "at least 0 and below 1"; "" if there are none.

        The `words` follow, e.g. "at least 0 or 'enough'".
        """
        return " or ".join(filter(None, [self._limits, *map(repr, self.words)]))

    @property
    def _limits(self) -> str:
        """The bounds in words, without the texts that are allowed too."""
        limits = {
            "at least": self.at_least,
            "above": self.above,
            "at most": self.at_most,
            "below": self.below,
        }
        return " and ".join(
            f"{words} {limit:g}" for words, limit in limits.items() if limit is not None
        )

    def _allowed(self, kind: str) -> str:
        """What is allowed, e.g. "a number, at least 0 or 'enough'"."""
        numbers = ", ".join(filter(None, [kind, self._limits]))
        return " or ".join([numbers, *map(repr, self.words)])

    def check(self, value: Any, name: str | None = None) -> None:
        """Checks a value of this option.

        Args:
            value: the value.
            name: the option's name in the message. By default it is the keyword.

        Raises:
            OptionError: the value is not allowed; the message says what is allowed.
        """
        name = name or self.keyword
        if isinstance(value, str) and value in self.words:
            return
        if self.words and isinstance(value, float):
            allowed = self._allowed("a whole number")
            raise OptionError(f"{name} is {value}; it must be {allowed}")
        if self.bounds and (isinstance(value, bool) or not isinstance(value, Number)):
            allowed = self._allowed("a number")
            raise OptionError(f"{name} is {value!r}; it must be {allowed}")
        if self.empty and not value and isinstance(value, (str, int, float)):
            return
        if self.choices is not None:
            self._check_names(value, name, self.choices)
        if value == "":
            raise OptionError(f"{name} is empty; it must be given here")
        if self.bounds and not self._within(value):
            raise OptionError(f"{name} is {value}; it must be {self.bounds}")

    def _check_names(self, value: Any, name: str, choices: Collection[str]) -> None:
        names = self.names(value)
        for part in names:
            if part not in choices:
                hint = nearest(str(part), choices)
                raise OptionError(f"{name} is {value!r}; {hint}")
            if names.count(part) > 1:
                raise OptionError(f"{name} is {value!r}, which has {part!r} twice")

    def _within(self, value: Any) -> bool:
        # A whole number is finite, and may be too large for a float.
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def names(self, value: Any) -> list[Any]:
        """The names of choices that a value consists of."""
        if not self.several:
            return [value]
        return [part.strip() for part in value.split(",")] if value else []

    def chosen(self, value: Any) -> "list[Record[Any]]":
        """The records that a value names. A name without a record is left out."""
        if not isinstance(self.choices, Mapping):
            return []
        names = self.names(value)
        return [self.choices[name] for name in names if name in self.choices]

    def entry(self, name: str) -> "Record[Any]":
        """Returns the record that a value of this option names."""
        assert isinstance(self.choices, Mapping)
        return self.choices[name]

    def opened_by(self, value: Any) -> tuple["Option", ...]:
        """Returns the options that are read because this one has a certain value."""
        opened = self.opens if value else ()
        return (*(o for entry in self.chosen(value) for o in entry.reads), *opened)

    def under(self, section: str) -> "Option":
        """Returns a copy in another section, with the options that it leads to."""
        choices = self.choices
        if isinstance(choices, Mapping):
            choices = Together(choices, change=lambda record: record.under(section))
        return dataclasses.replace(
            self,
            path=f"{section}.{self.path}",
            choices=choices,
            opens=tuple(option.under(section) for option in self.opens),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Record(Generic[T]):
    """One entry of a registry. Calling a record calls its builder.

    Attributes:
        name: the entry's name in the registry and in a config.
        build: the function that builds what the entry names.
        options: the options that are keyword arguments of `build`.
        leads_to: the options that other code reads if this entry is chosen.
        ignores: the options that other code does not read if this entry is chosen.
        summary: one sentence that says what the entry is. If it is empty, `meaning`
            takes the first line of `build`'s docstring.
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
        """One sentence that says what the entry is, for the documentation."""
        return self.summary or (inspect.getdoc(self.build) or "").partition("\n")[0]

    def under(self, section: str) -> "Record[T]":
        """Returns a copy of the entry with its options in another section."""
        return dataclasses.replace(
            self,
            options=tuple(option.under(section) for option in self.options),
            leads_to=tuple(option.under(section) for option in self.leads_to),
            ignores=tuple(option.under(section) for option in self.ignores),
        )


R = TypeVar("R", bound=Record)


def registry(*records: R, kind: type = Record) -> Registry[R]:
    """Makes a registry of records, in the given order.

    Args:
        records: the records that dimat_jax itself has.
        kind: the class that further records must have.
    """
    return Registry({record.name: record for record in records}, kind)


def read(roots: Iterable[Option], fields: Fields) -> dict[str, Option]:
    """The options that a config reads, by path.

    Args:
        roots: the options that every config reads.
        fields: the config's values. The value of an option that chooses among records
            must be one of them, or empty.
    """
    roots, ignored = list(roots), set()
    while True:
        found = _walk(roots, fields, ignored)
        more = {
            ignored_option.path
            for path, option in found.items()
            for entry in option.chosen(fields[path])
            for ignored_option in entry.ignores
        } - ignored
        if not more:
            return found
        # What an ignored option would lead to is not read either: walk once more.
        ignored |= more


def _walk(
    roots: Iterable[Option], fields: Fields, ignored: Collection[str]
) -> dict[str, Option]:
    found: dict[str, Option] = {}
    waiting = list(roots)
    while waiting:
        option = waiting.pop(0)
        if option.path not in found and option.path not in ignored:
            found[option.path] = option
            waiting += option.opened_by(fields[option.path])
    return found


def every(roots: Iterable[Option]) -> Iterator[Option]:
    """Yields all options that any config can read, each path once.

    Raises:
        OptionError: two options have the same path, but different defaults.
    """
    waiting, seen = list(roots), dict[str, Option]()
    while waiting:
        option = waiting.pop(0)
        if other := seen.get(option.path):
            if repr(other.default) != repr(option.default):
                raise OptionError(
                    f"two options have the path {option.path!r}, with the defaults "
                    f"{other.default!r} and {option.default!r}; give one of them "
                    "another path"
                )
            continue
        seen[option.path] = option
        yield option
        opened = [other for _, other in _opened(option)]
        waiting = opened + waiting


def readers(roots: Iterable[Option]) -> dict[str, list[tuple[Option, list[str]]]]:
    """Finds which options, with which of their values, lead to each path.

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


def describe_readers(routes: Iterable[tuple[Option, list[str]]]) -> str:
    """Says where an option is read, e.g. "topology is 'ring' or mixing is 'file'"."""
    return " or ".join(
        f"{option.path} is {_one_of(values)}" for option, values in routes
    )


def _one_of(values: Iterable[str]) -> str:
    names = [repr(value) for value in values if value]
    if not names:
        return "not 0"
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def _opened(option: Option) -> Iterator[tuple[str, Option]]:
    """Yields each value that leads to a further option, together with that option."""
    if isinstance(option.choices, Mapping):
        for name, record in option.choices.items():
            for other in record.reads:
                yield name, other
    for other in option.opens:
        yield "", other


SEED = Option(
    "seed",
    0,
    "The seed of all random numbers: of data order, initial weights, augmentation, "
    "random graphs, and faults. Two runs with the same seed draw the same numbers.",
    at_least=0,
)


def arguments(record: Record, fields: Fields) -> dict[str, Any]:
    """Returns the keyword arguments that a config gives to the builder of a record."""
    return {option.keyword: fields[option.path] for option in record.options}
