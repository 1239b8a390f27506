"""Finds the fields of a config that were probably meant by a name that none has."""

import difflib
from collections.abc import Iterable, Iterator, Sequence

__all__ = ["no_such_field", "probably_meant"]

# Names that are less similar than this are not suggested, nor those that are less
# similar than the best one by more than the margin.
_LEAST, _MARGIN = 0.7, 0.1
# The share of a field's own name in the similarity of a path that has sections.
_OF_NAME = 0.7
# How similar an abbreviation is to the whole name ("lr" to "learning_rate"), and a name
# to one that begins or ends with it.
_ABBREVIATION, _PART = 0.95, 0.8


def no_such_field(path: str, known: Iterable[str]) -> str:
    """Says that a config has no such field, and which ones were probably meant.

    Args:
        path: the path that does not exist.
        known: the paths of all fields. Of those that are equally similar, the first
            ones are suggested.
    """
    known = list(known)
    within = [field for field in known if field.startswith(f"{path}.")]
    if within:
        return f"{path!r} is a section, which has the fields {', '.join(within)}"
    meant = probably_meant(path, known)
    hint = f"did you mean {' or '.join(map(repr, meant))}?"
    where = "`dimat show options` lists all fields"
    return f"there is no field {path!r}; {hint if meant else where}"


def probably_meant(path: str, known: Sequence[str]) -> list[str]:
    """Returns the most similar fields and sections, at most three, the best one first.

    Args:
        path: a path, whose section may be wrong or missing.
        known: the paths of all fields; see `no_such_field`.
    """
    path = path.lower().replace("-", "_")
    scores = {field: _similarity(path, field) for field in known}
    for section in (field.rpartition(".")[0] for field in known):
        if section.count(".") == path.count("."):
            scores.setdefault(section, _ratio(path, section))
    least = max(_LEAST, max(scores.values(), default=0) - _MARGIN)
    near = [name for name, score in scores.items() if score >= least]
    # The longest paths belong to pre-training, which has the options of the rounds too.
    near.sort(key=lambda name: (-scores[name], name.count(".")))
    return near[:3]


def _similarity(path: str, field: str) -> float:
    """How similar a field is to a path that does not exist, from 0 to 1."""
    section, _, name = path.rpartition(".")
    its_section, _, its_name = field.rpartition(".")
    similarity = max(_of_names(name, its_name))
    if section and its_section:
        # Two fields of one section have a long beginning in common, but may have names
        # that have nothing to do with each other.
        if similarity < _LEAST:
            return 0.0
        of_sections = _ratio(section, its_section)
        return _OF_NAME * similarity + (1 - _OF_NAME) * of_sections
    # Some write "eval_every" for "eval.every".
    as_a_whole = _ratio(path.replace(".", "_"), field.replace(".", "_"))
    return max(as_a_whole, _OF_NAME * similarity if section else similarity)


def _of_names(name: str, other: str) -> Iterator[float]:
    """Yields by several measures how similar two names without sections are."""
    yield _ratio(name, other)
    words = other.split("_")
    if len(words) > 1 and name == "".join(word[0] for word in words):
        yield _ABBREVIATION
    is_part = other.startswith(name) or other.endswith(name)
    if len(name) > 2 and (is_part or name.endswith(f"_{other}")):
        yield _PART


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
