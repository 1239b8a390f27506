"""Decodes encoded images of one size into one array."""

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from dimat_jax.data._dataset import DataError, decode_image, opened

__all__ = ["decode_all", "with_equal_channels"]

# Modes of Pillow with one channel of 8 bits, and those with more bits than uint8 has.
_GREY = ("1", "L")
_DEEP = ("I", "F")


def decode_all(
    n: int, content: Callable[[int], bytes], name: Callable[[int], str]
) -> UInt8[np.ndarray, "samples height width channels"]:
    """Decodes images. They get one channel if all of them are grey, else three (RGB).

    Args:
        n: the number of images.
        content: returns an image's file by its index.
        name: returns the name of an image for error messages.

    Raises:
        DataError: an image cannot be read, has pixels of more than 8 bits, or is of
            another size than the first.
    """
    modes = set()
    size = (0, 0)
    for i in range(n):
        mode, found = _header(content(i), name(i))
        size = found if i == 0 else size
        if found != size:
            raise DataError(
                f"{name(i)} has {found[0]} x {found[1]} pixels, but {name(0)} has "
                f"{size[0]} x {size[1]}; all images must be of one size"
            )
        modes.add(mode)
    channels = 1 if modes <= set(_GREY) else 3
    images = np.empty((n, *size, channels), np.uint8)
    for i in tqdm(range(n), "reading images", unit="", leave=False, disable=None):
        # Grey images have the same value in all channels of RGB.
        images[i] = decode_image(content(i), (*size, 3), name(i))[..., :channels]
    return images


def with_equal_channels(
    splits: list[tuple[np.ndarray, np.ndarray]],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Gives the images of a grey split three channels if another split has colours."""
    most = max(images.shape[-1] for images, _ in splits)
    return [
        (images if images.shape[-1] == most else np.repeat(images, most, -1), labels)
        for images, labels in splits
    ]


def _header(data: bytes, where: str) -> tuple[str, tuple[int, int]]:
    """The mode of an image, and its height and width."""
    with opened(data, where) as image:  # No pixel is decoded here.
        if image.mode.startswith(_DEEP):
            raise DataError(
                f"{where} has pixels of more than 8 bits (mode {image.mode}); "
                "convert it, or give float arrays instead"
            )
        return image.mode, (image.height, image.width)
