"""Writes the lists of options and algorithms from their records, as Markdown."""

from collections.abc import Iterable, Mapping
from typing import Any

from dimat_jax.algorithms import AlgorithmRecord
from dimat_jax.algorithms.conditions import anything
from dimat_jax.options import Option, Record, every, readers

__all__ = ["algorithms_table", "options_page"]


def options_page(roots: Iterable[Option]) -> str:
    """Every option with its default, its meaning, its values and what reads it.

    Options are grouped by the section of the config that they stand in, and each has a
    heading whose anchor is its path, so that other pages can link to it.

    Args:
        roots: the options that every config reads; the others follow from these.
    """
    roots = list(roots)
    sections: dict[str, list[Option]] = {}
    for option in every(roots):
        section = option.path.rpartition(".")[0]
        sections.setdefault(section, []).append(option)
    opened_by, ignored_by = readers(roots), _ignored_by(every(roots))
    always = {option.path for option in roots}
    registries: dict[tuple[str, ...], str] = {}
    parts = []
    for section, options in sections.items():
        parts.append(f"## `{section}`" if section else "## At the top")
        for option in options:
            where = _read_where(opened_by.get(option.path, []), option.path in always)
            if option.path in ignored_by:
                where += f", but not where {_places(ignored_by[option.path])}"
            parts.append(_entry(option, where))
            parts += _choices(option, registries)
    return "\n\n".join(parts)


def _entry(option: Option, where: str) -> str:
    """The heading of an option, its meaning, and a list of facts about it."""
    facts = [f"Default: {_code(option.default)}"]
    if option.empty and not option.default:
        facts[0] += f" ({option.empty})"
    elif option.empty:
        facts.append(f"Empty: {option.empty}")
    if option.bounds:
        facts.append(f"Allowed: {option.bounds}")
    if option.unit:
        facts.append(f"Unit: {option.unit}")
    if option.choices is not None and not isinstance(option.choices, Mapping):
        facts.append(f"Allowed: {_codes(option.choices)}")
    facts.append(f"Read: {where}")
    if not option.changes_results:
        facts.append("A run may resume with another value: it changes no result.")
    lines = "\n".join(f"- {fact}" for fact in facts)
    heading = f"### `{option.path}` {{ #{option.path} }}"
    return f"{heading}\n\n{option.meaning}\n\n{lines}"


Places = list[tuple[Option, list[str]]]
"""Options, each with the values of it that something holds for."""


def _ignored_by(options: Iterable[Option]) -> dict[str, Places]:
    """For every path, the options and values that make a config ignore it."""
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


def _read_where(opened_by: Places, always: bool) -> str:
    return "always" if always or not opened_by else f"where {_places(opened_by)}"


def _places(places: Places) -> str:
    texts = []
    for option, values in places:
        link = f"[`{option.path}`](#{option.path})"
        values = [value for value in values if value]
        texts.append(f"{link} is {_codes(values)}" if values else f"{link} is set")
    return "; or where ".join(texts)


def _choices(option: Option, registries: dict[tuple[str, ...], str]) -> list[str]:
    """A table of the records that an option chooses from, once for each registry."""
    if not isinstance(option.choices, Mapping):
        return []
    records: Mapping[str, Any] = option.choices
    shown_at = registries.setdefault(tuple(records), option.path)
    if shown_at != option.path:
        return [f"Allowed: the values of [`{shown_at}`](#{shown_at})."]
    rows = ["| value | meaning | further options |", "|:--|:--|:--|"]
    rows += [_row(name, record) for name, record in records.items()]
    return ["\n".join(rows)]


def _row(name: str, record: Record) -> str:
    paths = dict.fromkeys(option.path for option in record.reads)
    options = ", ".join(f"[`{path}`](#{path})" for path in paths)
    return f"| `{name}` | {_cell(record.meaning)} | {options} |"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def _code(value: Any) -> str:
    return f"`{value!r}`".replace("'", '"')


def _codes(values: Iterable[str]) -> str:
    return ", ".join(f"`{value}`" if value else '`""`' for value in values)


def algorithms_table(records: Mapping[str, AlgorithmRecord]) -> str:
    """A table of algorithms: what each does, and what it asks of its surroundings."""
    names = ("`algorithm`", "what it does", "it sends", "network", "optimizer")
    rows = [f"| {' | '.join(names)} |", "|" + ":--|" * len(names)]
    return "\n".join([*rows, *map(_algorithm_row, records.values())])


def _algorithm_row(record: AlgorithmRecord) -> str:
    if record.merges:
        when = "once a round, and as `merge.inner` does"
    else:
        when = "with every step" if record.uses_graph else ""
    check = record.network
    # The API says what the condition is.
    condition = f"[`{check.__name__}`][{check.__module__}.{check.__qualname__}]"
    if check is anything:
        condition = ""
    optimizer = f"`{record.optimizer}`"
    if not record.other_optimizers:
        optimizer += " only"
    meaning = _cell(record.meaning)
    return f"| `{record.name}` | {meaning} | {when} | {condition} | {optimizer} |"
