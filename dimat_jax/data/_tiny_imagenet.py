"""Reads Tiny ImageNet (200 classes, 64 x 64 pixels) as its authors publish it."""

import collections
import os
import zipfile
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from dimat_jax.data._cache import Decoded, cached
from dimat_jax.data._dataset import (
    DataError,
    Dataset,
    Split,
    decode_image,
    make_split,
)
from dimat_jax.errors import reading

__all__ = ["read"]

# The name of the zip, and of the folder within it.
_NAME = "tiny-imagenet-200"
# The largest lists have 3 MB, and images have a few kB. A file that is larger than this
# does not belong to the data set, and reading it might fill the memory.
_MOST_BYTES = 64 * 2**20


def read(directory: str | None, cache_dir: str | None) -> Dataset:
    """Reads the zip or the unpacked folder. The validation images are the test split.

    Args:
        directory: the authors' zip, the unpacked folder, or a folder that holds one of
            them.
        cache_dir: the folder of the cache, as for `cached`.

    Raises:
        DataError: `directory` is None, or the data are missing or malformed.
    """
    if directory is None:
        raise DataError(
            "tiny_imagenet: `directory` is missing; expected the path of "
            f"{_NAME}.zip (http://cs231n.stanford.edu/{_NAME}.zip) or of its contents"
        )
    path = Path(directory).expanduser()
    places = (path, path / f"{_NAME}.zip", path / _NAME)
    root = next((p for p in places if p.is_file() or (p / "wnids.txt").is_file()), None)
    if root is None:
        raise DataError(
            f"tiny_imagenet: expected {path} to be or hold {_NAME}.zip, or to hold "
            f"wnids.txt or {_NAME}/wnids.txt"
        )
    files = [root] if root.is_file() else sorted(filter(Path.is_file, root.rglob("*")))
    return cached(
        "tiny_imagenet", root.parent, files, cache_dir, lambda: _decode(root, files)
    )


def _decode(root: Path, files: Sequence[Path]) -> Decoded:
    if root.is_dir():
        paths = {file.relative_to(root).as_posix(): file for file in files}

        def read_file(name: str) -> bytes:
            _expect_small(f"{root}: {name}", paths[name].stat().st_size)
            return paths[name].read_bytes()

        return _splits(root, paths, read_file)
    with reading(f"the zip {root}", DataError):
        with zipfile.ZipFile(root) as archive:
            names = {
                name.removeprefix(f"{_NAME}/"): name for name in archive.namelist()
            }

            def read_member(name: str) -> bytes:
                member = archive.getinfo(names[name])
                _expect_small(f"{root}: {name}", member.file_size)
                if member.flag_bits & 1:
                    raise DataError(f"{root}: {name} is encrypted")
                # No more is unpacked than the member says that it has.
                return archive.read(member)

            return _splits(root, names, read_member)


def _expect_small(what: str, size: int) -> None:
    if size > _MOST_BYTES:
        raise DataError(
            f"{what} has {size} bytes; no file of this data set has more than "
            f"{_MOST_BYTES}"
        )


def _splits(
    root: Path, names: Collection[str], read_member: Callable[[str], bytes]
) -> Decoded:
    """Decodes both splits and counts the classes.

    Args:
        root: the zip or the folder, for error messages.
        names: the names of all files, relative to the data set's folder.
        read_member: returns the content of the file with a name.
    """

    def text_of(name: str) -> str:
        with reading(f"{root}: {name}", DataError):
            return read_member(name).decode().strip() if name in names else ""

    def lines(name: str) -> list[str]:
        text = text_of(name)
        if not text:
            raise DataError(f"{root}: {name} is missing or empty")
        return text.splitlines()

    def split(labels: dict[str, int]) -> Split:
        images = np.empty((len(labels), 64, 64, 3), np.uint8)
        for image, name in zip(images, labels, strict=True):
            image[:] = decode_image(read_member(name), image.shape, f"{root}: {name}")
        return make_split(images, np.array(list(labels.values())))

    folders = collections.defaultdict(list)
    for name in sorted(names):
        if name.endswith(".JPEG"):
            folders[os.path.dirname(name)].append(name)
    classes = {wnid.strip(): label for label, wnid in enumerate(lines("wnids.txt"))}
    train, test = {}, {}
    for wnid, label in classes.items():
        if f"train/{wnid}/images" not in folders:
            raise DataError(f"{root}: train/{wnid}/images/*.JPEG is missing")
        train |= dict.fromkeys(folders[f"train/{wnid}/images"], label)
    for line in lines("val/val_annotations.txt"):
        file, wnid, *_ = [*line.split(), "", ""]
        if wnid not in classes:
            raise DataError(
                f"{root}: val/val_annotations.txt: expected '<file> <wnid> ...' with a "
                f"wnid of wnids.txt, got {line!r}"
            )
        if f"val/images/{file}" not in names:
            raise DataError(f"{root}: val/images/{file} is missing")
        test[f"val/images/{file}"] = classes[wnid]
    class_names = _class_names(classes, text_of("words.txt"))
    return split(train), split(test), len(classes), class_names


def _class_names(wnids: Iterable[str], words: str) -> tuple[str, ...] | None:
    """The classes' names: the first of the synonyms that words.txt gives each wnid.

    Args:
        wnids: The WordNet ids of the classes.
        words: The content of words.txt, with lines "wnid<TAB>synonym, synonym, ...".

    Returns:
        None if a class has no name.
    """
    synonyms = dict(line.split("\t", 1) for line in words.splitlines() if "\t" in line)
    names = tuple(synonyms.get(wnid, "").split(",")[0].strip() for wnid in wnids)
    return names if all(names) else None
