"""Writes the lists of options and algorithms from their records, as Markdown."""

from collections.abc import Iterable, Mapping
from typing import Any

from dimat_jax._option_facts import by_section, facts
from dimat_jax.algorithms import AlgorithmRecord
from dimat_jax.algorithms.conditions import anything
from dimat_jax.options import Option, Record

__all__ = ["algorithms_table", "options_page"]


def options_page(roots: Iterable[Option]) -> str:
    """Every option with its default, its meaning, its values and what reads it.

    Options are grouped by the section of the config that they stand in, and each has a
    heading whose anchor is its path, so that other pages can link to it.

    Args:
        roots: the options that every config reads; the others follow from these.
    """
    roots = list(roots)
    described = facts(roots, code=_code, link=_link)
    registries: dict[tuple[str, ...], str] = {}
    parts = []
    for section, options in by_section(roots).items():
        parts.append(f"## `{section}`" if section else "## At the top")
        for option in options:
            parts.append(_entry(option, described[option.path]))
            parts += _choices(option, registries)
    return "\n\n".join(parts)


def _entry(option: Option, described: Iterable[str]) -> str:
    """The heading of an option, its meaning, and a list of facts about it."""
    lines = "\n".join(f"- {fact}" for fact in described)
    heading = f"### `{option.path}` {{ #{option.path} }}"
    return f"{heading}\n\n{option.meaning}\n\n{lines}"


def _choices(option: Option, registries: dict[tuple[str, ...], str]) -> list[str]:
    """A table of the records that an option chooses from, once for each registry."""
    if not isinstance(option.choices, Mapping):
        return []
    records: Mapping[str, Any] = option.choices
    shown_at = registries.setdefault(tuple(records), option.path)
    if shown_at != option.path:
        return [f"Allowed: the values of {_link(shown_at)}."]
    rows = ["| value | meaning | further options |", "|:--|:--|:--|"]
    rows += [_row(name, record) for name, record in records.items()]
    return ["\n".join(rows)]


def _row(name: str, record: Record) -> str:
    paths = dict.fromkeys(option.path for option in record.reads)
    options = ", ".join(map(_link, paths))
    return f"| `{name}` | {_cell(record.meaning)} | {options} |"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def _code(text: str) -> str:
    return f"`{text}`"


def _link(path: str) -> str:
    return f"[`{path}`](#{path})"


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
