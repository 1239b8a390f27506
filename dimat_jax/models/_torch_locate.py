"""Finds a model's weights in a checkpoint: in which entry, and behind which prefix.

Checkpoints hold more than one model's weights: averages beside the weights, metrics, a
second encoder, the rest of a larger model. The names of the model's own layers tell
where its weights are. If they are in several places, the user has to choose.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from dimat_jax.models._state_dict import (
    Entry,
    StateDict,
    listed,
    read_checkpoint,
    state_dicts,
)
from dimat_jax.models._torch_files import TorchImportError
from dimat_jax.models._torch_fit import Fit
from dimat_jax.models._torch_names import Shape

__all__ = ["Located", "Schema", "as_it_is", "locate"]

# The names of modules that only wrap others: DataParallel and DistributedDataParallel,
# torch.compile, FSDP, activation checkpointing.
_WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}


class Schema(NamedTuple):
    """A model's names and shapes, as PyTorch code has them.

    Attributes:
        name: the name of the model for messages.
        spellings: the keys that its arrays may have.
        fit: a function from the shapes of arrays, by key, to how they fit the model.
    """

    name: str
    spellings: Collection[str]
    fit: Callable[[Mapping[str, Shape]], Fit]


class Located(NamedTuple):
    """A model's weights in a checkpoint.

    Attributes:
        source: the name of their place for messages.
        fit: how they fit the model.
        tensors: all arrays of the state dict, by its own keys.
        keys: for each name of the fit, the state dict's own key.
    """

    source: str
    fit: Fit
    tensors: dict[str, Any]
    keys: dict[str, str]


def locate(
    schema: Schema,
    checkpoint: StateDict,
    entry: Entry = None,
    prefix: str | None = None,
) -> Located:
    """Finds a model's weights; see the module.

    Args:
        schema: the model.
        checkpoint: a file or a mapping.
        entry: the place in the checkpoint in which to look. None: everywhere.
        prefix: what the keys of the model begin with. None: it is found.

    Raises:
        TorchImportError: the checkpoint cannot be read, there is no such entry or
            prefix, or several places hold the model's weights.
    """
    source, mapping = read_checkpoint(checkpoint)
    places = [
        place
        for name, tensors in state_dicts(source, mapping, entry).items()
        for place in _places(schema, name, tensors, prefix)
    ]
    most = max(place.n_matches for place in places)
    if most:
        places = [place for place in places if place.n_matches == most]
    else:
        places = [max(places, key=lambda place: len(place.tensors))]
    located = [place.located(schema) for place in places]
    fitting = [each for each in located if not each.fit.n_faults]
    if len(fitting) > 1:
        raise _several(f"hold a {schema.name}", [each.source for each in fitting])
    return min(located, key=lambda each: each.fit.n_faults)


def as_it_is(
    checkpoint: StateDict, entry: Entry = None, prefix: str | None = None
) -> Located:
    """Finds the one state dict of a checkpoint, whatever model it belongs to.

    Raises:
        TorchImportError: as of `locate`.
    """
    source, mapping = read_checkpoint(checkpoint)
    found = state_dicts(source, mapping, entry)
    if len(found) > 1:
        raise _several("are there", list(found))
    ((source, tensors),) = found.items()
    schema = Schema("", (), lambda shapes: Fit("", {}, {}, {}))
    (place,) = _places(schema, source, tensors, prefix or "")
    return place.located(schema)


def _several(what: str, sources: list[str]) -> TorchImportError:
    return TorchImportError(
        f"several state dicts {what}: {listed(sources)}; choose one with entry= or "
        "prefix="
    )


class _Place(NamedTuple):
    """Arrays that begin with a prefix.

    Attributes:
        source: the name of the state dict.
        tensors: all arrays of the state dict, by its own keys.
        prefix: the prefix, without wrappers.
        keys: for each key without wrappers and prefix, the state dict's own key.
        n_matches: the number of these keys that the model may have.
    """

    source: str
    tensors: dict[str, Any]
    prefix: str
    keys: dict[str, str]
    n_matches: int

    def located(self, schema: Schema) -> Located:
        shapes = {key: tuple(self.tensors[own].shape) for key, own in self.keys.items()}
        source = self.source
        if self.prefix:
            source += f" (its keys that begin with {self.prefix!r})"
        return Located(source, schema.fit(shapes), self.tensors, self.keys)


def _places(
    schema: Schema, source: str, tensors: dict[str, Any], prefix: str | None
) -> Iterable[_Place]:
    """The prefixes behind which a state dict has most of a model's keys."""
    own_keys = _unwrapped(tensors, schema.spellings)
    if prefix is None:
        prefixes = _likely_prefixes(own_keys, schema.spellings)
    else:
        prefixes = [_without_wrappers(f"{prefix.rstrip('.')}.") if prefix else ""]
        if not any(key.startswith(prefixes[0]) for key in own_keys):
            first = sorted({f"{key.partition('.')[0]}." for key in own_keys})
            raise TorchImportError(
                f"{source}: no key begins with {prefix!r}; they begin with "
                f"{listed(first)}"
            )
    for each in prefixes:
        # A model behind a longer prefix is no part of the one behind this prefix.
        others = [p for p in prefixes if p != each and p.startswith(each)]
        keys = {
            key.removeprefix(each): own
            for key, own in own_keys.items()
            if key.startswith(each) and not key.startswith(tuple(others))
        }
        n_matches = sum(key in schema.spellings for key in keys)
        yield _Place(source, tensors, each, keys, n_matches)


def _likely_prefixes(keys: Iterable[str], spellings: Collection[str]) -> list[str]:
    counts = Counter()
    for key in keys:
        starts = [0, *(i + 1 for i, letter in enumerate(key) if letter == ".")]
        counts.update(key[:start] for start in starts if key[start:] in spellings)
    most = max(counts.values(), default=0)
    return [prefix for prefix, count in counts.items() if count == most] or [""]


def _unwrapped(keys: Iterable[str], spellings: Collection[str]) -> dict[str, str]:
    """Maps keys without wrapping modules to the keys as they are.

    They stay as they are if the model has such names itself, or if two keys would
    become equal.
    """
    keys = list(keys)
    if not any(_without_wrappers(name) != name for name in spellings):
        plain = {_without_wrappers(key): key for key in keys}
        if len(plain) == len(keys):
            return plain
    return {key: key for key in keys}


def _without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)
