"""Tests of a user's own images: folders by class, and .npz files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dimat_jax.data._images import Form, read_images
from dimat_jax.data.sources import DataError

RED, GREY = (255, 0, 0), (90, 90, 90)


def save(path: Path, *shape: int, color=RED) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.broadcast_to(np.uint8(color), (*shape, 3))
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten red squares in the class "b", five grey ones in the class "a"."""
    for i in range(10):
        save(tmp_path / "images" / "b" / f"{i}.png", 4, 4)
        if i < 5:
            save(tmp_path / "images" / "a" / "more" / f"{i}.PNG", 4, 4, color=GREY)
    (tmp_path / "images" / "b" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_a_folder_for_each_class(folder):
    found = read_images(folder, Form())
    assert found.class_names == ("a", "b") and found.n_classes == 2
    assert found.name == str(folder)
    # Every fifth image of a class is for testing.
    assert np.bincount(found.train.labels).tolist() == [4, 8]
    assert np.bincount(found.test.labels).tolist() == [1, 2]
    for split in (found.train, found.test):
        for image, label in zip(split.images, split.labels, strict=True):
            assert (image == (RED if label else GREY)).all()
    pixels = found.train.images.reshape(-1, 3)
    np.testing.assert_allclose(found.mean, pixels.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.std, pixels.std(0), rtol=1e-5)


def test_only_so_many_images_are_read_equally_many_of_each_class(folder):
    (folder / "b" / "broken.png").write_bytes(b"no image")
    found = read_images(folder, Form(train_size=4, test_size=2, seed=3))
    assert np.bincount(found.train.labels).tolist() == [2, 2]
    assert np.bincount(found.test.labels).tolist() == [1, 1]
    with pytest.raises(DataError, match="broken.png"):
        read_images(folder, Form())


@pytest.mark.parametrize("name", ["test", "val"])
def test_folders_for_training_and_testing(tmp_path, name):
    save(tmp_path / "train" / "a" / "1.png", 4, 4)
    save(tmp_path / "train" / "b" / "1.png", 4, 4, color=GREY)
    save(tmp_path / name / "b" / "1.png", 4, 4, color=GREY)
    with pytest.raises(DataError, match="has other classes than"):
        read_images(tmp_path, Form())
    save(tmp_path / name / "a" / "1.png", 4, 4)
    found = read_images(tmp_path, Form())
    assert (len(found.train.labels), len(found.test.labels)) == (2, 2)


def test_images_get_one_size_and_a_mean_that_counts_from_0_to_1(folder):
    save(folder / "b" / "wide.jpg", 6, 9)
    with pytest.raises(DataError, match=r"shape \(6, 9, 3\); choose one with --size"):
        read_images(folder, Form())
    form = Form((3, 5, 3), mean=(0.5,), std=(0.1, 0.2, 0.4))
    found = read_images(folder, form)
    assert found.train.images.shape[1:] == (3, 5, 3)
    np.testing.assert_allclose(found.mean, 3 * [127.5])
    np.testing.assert_allclose(found.std, [25.5, 51, 102], rtol=1e-6)
    grey = read_images(folder, Form((3, 5, 1)))
    assert grey.train.images.shape[1:] == (3, 5, 1)
    assert set(grey.train.images[grey.train.labels == 0].ravel()) == {90}


def test_the_middle_is_cut_out(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = 200
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(2):
            Image.fromarray(pixels).save(tmp_path / label / f"{i}.png")
    found = read_images(tmp_path, Form((4, 4, 3), std=(1,)))
    assert (found.train.images == 200).all()


def arrays(n: int = 10, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(n, 4, 4), dtype=np.uint8)
    return {"images": images, "labels": np.arange(n)[:, None] % 2, **changes}


def test_an_npz_file(tmp_path):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays())
    found = read_images(path, Form((0, 0, 1)))
    assert found.train.images.shape == (8, 4, 4, 1)
    assert found.n_classes == 2 and found.class_names is None
    splits: dict[str, Any] = {
        f"{split}_{name}": array
        for split, n in (("train", 6), ("test", 4))
        for name, array in arrays(n).items()
    }
    np.savez(path, **splits)
    found = read_images(path, Form((0, 0, 1)))
    assert (len(found.train.labels), len(found.test.labels)) == (6, 4)
    np.testing.assert_array_equal(found.test.images[..., 0], splits["test_images"])


BAD = {
    "no images": ({"pixels": np.zeros(3)}, "no array images or train_images, but pix"),
    "no labels": ({"images": arrays()["images"]}, "holds no array labels"),
    "floats": (arrays(images=np.ones((10, 4, 4))), r"got float64\[10, 4, 4\]"),
    "one image": (arrays(images=np.zeros((4, 4), np.uint8)), r"got uint8\[4, 4\]"),
    "two channels": (arrays(images=np.zeros((10, 4, 4, 2), np.uint8)), "have 1 or 3"),
    "few labels": (arrays(labels=np.arange(9)), "labels must be 10 integers"),
    "vectors": (arrays(labels=np.ones((10, 2), int)), "labels must be 10 integers"),
    "negative": (arrays(labels=np.arange(10) - 1), "labels count from 0, got -1"),
    "objects": ({"images": np.array([None])}, "cannot be used"),
    "one of each": (arrays(2), "two images of a class, or more"),
    "no tests": (
        {f"train_{name}": array for name, array in arrays().items()},
        "there is 'train', but none of test, val, validation",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_arrays_that_are_no_images_are_refused(tmp_path, kind):
    content, message = BAD[kind]
    np.savez(tmp_path / "own.npz", **content)
    with pytest.raises(DataError, match=message):
        read_images(tmp_path / "own.npz", Form())


@pytest.mark.parametrize(
    "form, message",
    [
        (Form(mean=(1, 2)), "--mean has 2 numbers for 3 channels"),
        (Form(test_size=50), "test_size: expected 1 to 3 samples, got 50"),
    ],
)
def test_a_form_that_does_not_fit_is_refused(folder, form, message):
    with pytest.raises(DataError, match=message):
        read_images(folder, form)


def test_neither_folder_nor_file(tmp_path):
    (tmp_path / "own.txt").write_text("")
    with pytest.raises(DataError, match="neither a folder of images nor an .npz"):
        read_images(tmp_path / "own.txt", Form())
    with pytest.raises(DataError, match="holds no folders with images"):
        read_images(tmp_path, Form())
