"""Describes the fields of a config for the terminal: in help texts and in lists."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping

from dimat_jax._option_facts import by_section, facts
from dimat_jax.config import ROOT
from dimat_jax.options import Option

__all__ = ["WIDTH", "describe_fields"]

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
        texts = [option.meaning, *described[option.path]]
        if isinstance(option.choices, Mapping):
            texts.append(f"Allowed: {', '.join(option.choices)}")
        for text in texts:
            yield textwrap.fill(
                text,
                WIDTH,
                initial_indent=" " * 4,
                subsequent_indent=" " * 4,
                break_on_hyphens=False,
            )
