"""Facts about options in words, for the documentation and for `dimat show options`."""

from collections.abc import Callable, Iterable, Mapping

from dimat_jax.options import Option, every, readers

__all__ = ["by_section", "facts"]

Places = list[tuple[Option, list[str]]]
"""Options, each with those of its values for which something holds."""

Format = Callable[[str], str]


def by_section(roots: Iterable[Option]) -> dict[str, list[Option]]:
    """Groups all options by the section of the config that they stand in.

    Args:
        roots: the options that every config reads; the others follow from these.

    Returns:
        the options of each section. The first one, "", has the fields that belong to
        no section.
    """
    sections: dict[str, list[Option]] = {"": []}
    for option in every(roots):
        section = option.path.rpartition(".")[0]
        sections.setdefault(section, []).append(option)
    return sections


def facts(
    roots: Iterable[Option], *, code: Format = str, link: Format = str
) -> dict[str, list[str]]:
    """Describes every option: its default, its values, its unit, and what reads it.

    An option's meaning is not repeated, and the records that an option chooses among
    are not listed.

    Args:
        roots: the options that every config reads; the others follow from these.
        code: marks a value as code, e.g. between backticks.
        link: makes a link out of the path of an option.

    Returns:
        lists of facts such as "Unit: epochs", by the option's path.
    """
    roots = list(roots)
    opened_by, ignored_by = readers(roots), _ignored_by(every(roots))
    always = {option.path for option in roots}

    def places(found: Places) -> str:
        return "; or where ".join(_place(*place, code, link) for place in found)

    def read(path: str) -> str:
        opened = path in opened_by and path not in always
        where = f"where {places(opened_by[path])}" if opened else "always"
        if path in ignored_by:
            where += f", but not where {places(ignored_by[path])}"
        return where

    described = {}
    for option in every(roots):
        lines = [*_own_facts(option, code), f"Read: {read(option.path)}"]
        if not option.changes_results:
            lines.append("A run may resume with another value: it changes no result.")
        described[option.path] = lines
    return described


def _own_facts(option: Option, code: Format) -> list[str]:
    """Describes an option without the options that lead to it."""
    default = repr(option.default).replace("'", '"')
    lines = [f"Default: {code(default)}"]
    if option.empty and not option.default:
        lines[0] += f" ({option.empty})"
    elif option.empty:
        lines.append(f"Empty: {option.empty}")
    if option.bounds:
        lines.append(f"Allowed: {option.bounds}")
    if option.choices is not None and not isinstance(option.choices, Mapping):
        lines.append(f"Allowed: {_names(option.choices, code)}")
    if option.unit:
        lines.append(f"Unit: {option.unit}")
    return lines


def _ignored_by(options: Iterable[Option]) -> dict[str, Places]:
    """Finds for every path the options and values that make a config ignore it."""
    found: dict[str, Places] = {}
    for option in options:
        if not isinstance(option.choices, Mapping):
            continue
        names: dict[str, list[str]] = {}
        for name, record in option.choices.items():
            for ignored in record.ignores:
                names.setdefault(ignored.path, []).append(name)
        for path, values in names.items():
            found.setdefault(path, []).append((option, values))
    return found


def _place(option: Option, values: Iterable[str], code: Format, link: Format) -> str:
    # The value "" stands for any value that is not empty.
    named = [value for value in values if value]
    where = link(option.path)
    return f"{where} is {_names(named, code)}" if named else f"{where} is set"


def _names(names: Iterable[str], code: Format) -> str:
    return ", ".join(code(name or '""') for name in names)
