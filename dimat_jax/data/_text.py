"""Texts for language models, character by character.

An example is a piece of the text, and its labels are the same piece one character on.
"""

from pathlib import Path

import numpy as np

from dimat_jax.data._dataset import DataError, Dataset, Split, make_split

__all__ = ["CONTEXT", "MOST_CHARACTERS", "dataset_of", "read"]

CONTEXT = 64
"""The number of characters in an example."""

MOST_CHARACTERS = 128
"""How many different characters a text is expected to have at most."""

# The text is cut into so many spans, and the last part of each is for testing: a story
# changes from its beginning to its end.
_SPANS = 10
_TEST_SHARE = 0.1


def read(directory: str | None, cache_dir: str | None) -> Dataset:
    """The text of a file, or else of Python's own reference manual, by characters."""
    del cache_dir
    if not directory:
        # The licence is Python's. The text differs between versions of Python, which
        # the digest of a run's data tells.
        from pydoc_data.topics import topics

        return dataset_of("".join(topics[name] for name in sorted(topics)))
    path = Path(directory).expanduser()
    if not path.is_file():
        raise DataError(f"there is no file {path}; expected a text, in UTF-8")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error}") from error
    return dataset_of(text)


def dataset_of(text: str, name: str = "text") -> Dataset:
    """Cuts a text into examples of `CONTEXT` characters.

    The classes are the characters that occur, in the order of their code points. The
    last tenth of each tenth of the text is for testing.

    Raises:
        DataError: the text is too short for that.
    """
    text = text.replace("\r\n", "\n")
    shortest = round(2 * _SPANS * CONTEXT / _TEST_SHARE)
    if len(text) < shortest:
        raise DataError(
            f"{name}: the text has {len(text)} characters; it must have at least "
            f"{shortest}"
        )
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    known, tokens = np.unique(codes, return_inverse=True)
    train, test = [], []
    for span in np.array_split(tokens, _SPANS):
        cut = round(len(span) * (1 - _TEST_SHARE))
        train.append(_pieces(span[:cut]))
        test.append(_pieces(span[cut:]))
    none = np.zeros(0, np.float32)
    names = tuple(map(chr, known.tolist()))
    return Dataset(name, _split(train), _split(test), len(known), none, none, names)


def _split(pieces: list[np.ndarray]) -> Split:
    whole = np.concatenate(pieces).astype(np.int32)
    return make_split(whole[:, :-1].copy(), whole[:, 1:].copy())


def _pieces(tokens: np.ndarray) -> np.ndarray:
    """Cuts tokens into pieces that follow each other, int[pieces, CONTEXT + 1].

    Each piece begins with the last token of the piece before, so that every token but
    the first is a label once.
    """
    starts = np.arange(0, len(tokens) - CONTEXT, CONTEXT)
    return tokens[starts[:, None] + np.arange(CONTEXT + 1)]
