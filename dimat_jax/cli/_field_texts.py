"""Describes the fields of a config for the terminal: in help texts and in lists."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping

from dimat_jax._option_facts import by_section, facts
from dimat_jax.config import ROOT
from dimat_jax.options import Option

__all__ = ["WIDTH", "describe_fields", "texts_of", "wrapped"]

WIDTH = 88
"""The most characters of a line in the terminal."""


def describe_fields(flag: str = "") -> str:
    """Describes every field: its meaning, default, values, and what reads it.

    The fields that belong to no section come first, then one section after the other.

    Args:
        flag: what stands before the path of each field, as "--config.".
    """
    described = facts(ROOT)
    return "\n\n".join(
        "\n".join(_section(section, options, described, flag))
        for section, options in by_section(ROOT).items()
    )


def _section(
    section: str,
    options: Iterable[Option],
    described: Mapping[str, list[str]],
    flag: str,
) -> Iterator[str]:
    """Yields the lines about the fields of one section."""
    yield f"[{section or 'at the top'}]"
    for option in options:
        yield f"{flag}{option.path}"
        for text in texts_of(option, described[option.path]):
            yield wrapped(text, " " * 4)


def texts_of(option: Option, described: Iterable[str]) -> list[str]:
    """All that is to say about an option: its meaning, and facts about it.

    Args:
        option: the option.
        described: the option's entry in `facts`.
    """
    texts = [option.meaning, *described]
    if isinstance(option.choices, Mapping):
        texts.append(f"Allowed: {', '.join(option.choices)}")
    return texts


def wrapped(text: str, indent: str) -> str:
    """Breaks a text into lines that all begin with the indent."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )
