import io
import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dimat_jax.data import _cache, _cifar, _tiny_imagenet
from dimat_jax.data.sources import DataError, Dataset, Split, load, make_split

ROOT = Path(__file__).parents[2]


def assert_well_formed(data: Dataset, channels: int) -> None:
    for images, labels in (data.train, data.test):
        assert images.dtype == np.uint8 and labels.dtype == np.int32
        assert images.ndim == 4 and images.shape[-1] == channels
        assert len(images) == len(labels)
        assert not images.flags.writeable and not labels.flags.writeable
        assert 0 <= labels.min() and labels.max() < data.n_classes
    assert data.mean.shape == data.std.shape == (channels,)
    assert data.mean.dtype == data.std.dtype == np.float32


def assert_same(a: Dataset, b: Dataset) -> None:
    pairs = zip((*a.train, *a.test, *a[3:]), (*b.train, *b.test, *b[3:]), strict=True)
    for x, y in pairs:
        np.testing.assert_array_equal(x, y)


def encode(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


# Digits and subsets


def test_digits_are_split_evenly_in_every_class():
    data = load("digits")
    assert_well_formed(data, channels=1)
    assert data.name == "digits" and data.n_classes == 10
    assert data.class_names == tuple("0123456789")
    assert data.train.images.shape[1:] == (8, 8, 1) and data.train.images.max() == 16
    train, test = (np.bincount(s.labels, minlength=10) for s in (data.train, data.test))
    assert train.sum() + test.sum() == 1797
    assert np.all(np.abs(test - (train + test) / 5) < 1)
    pixels = [s.images.reshape(-1, 64) for s in (data.train, data.test)]
    both = np.concatenate(pixels)
    assert len(np.unique(both, axis=0)) == 1797  # no sample is in both splits


def test_random_images_have_the_sizes_of_cifar_and_are_always_the_same():
    data = load("random")
    assert_well_formed(data, channels=3)
    assert data.n_classes == 100 and data.train.images.shape[1:] == (32, 32, 3)
    assert len(data.train.labels) == 10_000 and len(data.test.labels) == 2_000
    assert set(np.bincount(data.train.labels)) == {100}
    assert_same(data, load("random"))
    with pytest.raises(DataError, match="random comes without files"):
        load("random", directory="somewhere")


def test_statistics_are_those_of_the_full_training_split():
    full = load("digits")
    pixels = full.train.images.astype(np.float64)
    np.testing.assert_allclose(full.mean, [pixels.mean()], rtol=1e-6)
    np.testing.assert_allclose(full.std, [pixels.std()], rtol=1e-6)
    part = load("digits", train_size=7)
    np.testing.assert_array_equal(part.mean, full.mean)
    np.testing.assert_array_equal(part.std, full.std)


@given(size=st.integers(1, 1433), seed=st.integers(0, 2**32))
def test_a_subset_takes_from_every_class_while_it_lasts(size, seed):
    full = load("digits").train
    part = load("digits", train_size=size, seed=seed).train
    available = np.bincount(full.labels, minlength=10)
    taken = np.bincount(part.labels, minlength=10)
    assert taken.sum() == size == len(part.images)
    assert np.all((taken == available) | (taken >= taken.max() - 1))


def test_the_seed_decides_on_a_subset():
    a, b, c = (
        load("digits", train_size=100, test_size=50, seed=seed) for seed in (0, 0, 1)
    )
    assert_same(a, b)
    assert not np.array_equal(a.train.images, c.train.images)
    assert not np.array_equal(a.test.images, c.test.images)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train_size": 0}, "digits: train_size: expected 1 to 1433 samples, got 0"),
        ({"test_size": 365}, "digits: test_size: expected 1 to 364 samples, got 365"),
    ],
)
def test_a_size_out_of_range_is_refused(sizes, message):
    with pytest.raises(DataError, match=message):
        load("digits", **sizes)


def test_an_unknown_name_gets_the_nearest_and_all():
    message = (
        r"'cifar-100'; allowed: cifar10, cifar100, digits, huggingface, image_folder, "
        r"mnist_5k, npz, random, text, tiny_imagenet; did you mean 'cifar100'"
    )
    with pytest.raises(DataError, match=message):
        load("cifar-100")


# CIFAR: a small CIFAR-10 as tfds would prepare it, and the real CIFAR-100


LABELS = ("sea plane", *(f"kind {i}" for i in range(1, 10)))


def write_tfds(data_dir: Path, version: str = "3.0.2", n: int = 12) -> Path:
    """Writes a data set of random pixels in the format of tfds, without TensorFlow."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    # The type is Any, because protobuf makes the messages at import time.
    example_proto: Any = tf_example_pb2
    proto: Any = tf_feature_pb2

    folder = data_dir / "cifar10" / version
    folder.mkdir(parents=True)
    module = "tensorflow_datasets.core.features."
    features = {
        "image": {
            "pythonClassName": f"{module}image_feature.Image",
            "image": {
                "dtype": "uint8",
                "shape": {"dimensions": ["32", "32", "3"]},
            },
        },
        "label": {
            "pythonClassName": f"{module}class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "10"},
        },
    }
    features = {
        "pythonClassName": f"{module}features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }
    (folder / "features.json").write_text(json.dumps(features))
    (folder / "label.labels.txt").write_text("\n".join(LABELS) + "\n")
    splits = []
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        path = folder / f"cifar10-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        pixels = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        np.save(data_dir / f"{split}.npy", pixels)
        for i in range(n):
            image = proto.BytesList(value=[encode(pixels[i], "PNG")])
            label = proto.Int64List(value=[i % 10])
            feature = {
                "image": proto.Feature(bytes_list=image),
                "label": proto.Feature(int64_list=label),
            }
            example = example_proto.Example(features=proto.Features(feature=feature))
            writer.write(example.SerializeToString())
        writer.close()
        splits.append(
            {
                "name": split,
                "numBytes": "1",
                "shardLengths": [str(n)],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {
        "name": "cifar10",
        "version": version,
        "fileFormat": "array_record",
        "splits": splits,
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def test_cifar_is_read_in_order_and_lossless(tmp_path):
    write_tfds(tmp_path)
    data = load("cifar10", directory=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert_well_formed(data, channels=3)
    assert data.n_classes == 10 and data.class_names == LABELS
    for split in ("train", "test"):
        images, labels = getattr(data, split)
        np.testing.assert_array_equal(images, np.load(tmp_path / f"{split}.npy"))
        np.testing.assert_array_equal(labels, np.arange(12) % 10)
    pixels = data.train.images.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(data.mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(data.std, pixels.std(0), rtol=1e-6)


def test_cifar_needs_neither_tensorflow_nor_jax(tmp_path):
    write_tfds(tmp_path)
    code = (
        "import sys\n"
        "from dimat_jax.data import sources\n"
        "sources.load('digits')\n"
        "sources.load('cifar10', directory=sys.argv[1], cache_dir=sys.argv[1])\n"
        "assert 'tensorflow_datasets' in sys.modules\n"
        "print({'tensorflow', 'jax'} & set(sys.modules))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stderr


def test_labels_without_a_name_for_each_class_have_none(tmp_path):
    path = tmp_path / "label.labels.txt"
    assert _cifar._class_names(path, 2) is None
    for text, expected in (("", None), ("cat\n", None), ("cat\ndog", ("cat", "dog"))):
        path.write_text(text)
        assert _cifar._class_names(path, 2) == expected


def test_tfds_default_folder_is_looked_in(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    write_tfds(tmp_path)
    assert len(load("cifar10", cache_dir=str(tmp_path / "c")).train.labels) == 12
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(DataError, match="home/tensorflow_datasets/cifar10"):
        load("cifar10")


def test_the_newest_complete_version_is_read(tmp_path):
    write_tfds(tmp_path, "3.0.2", n=5)
    write_tfds(tmp_path, "3.0.10", n=6)
    shutil.copytree(tmp_path / "cifar10/3.0.2", tmp_path / "cifar10/4.0.0.incompleteA")
    (tmp_path / "cifar10/4.0.0").mkdir()
    data = load("cifar10", directory=str(tmp_path), cache_dir=str(tmp_path / "c"))
    assert len(data.train.labels) == 6


def test_missing_cifar_says_where_and_how_to_prepare_it(tmp_path):
    prepare = (
        rf"{tmp_path}/cifar10/<version>/dataset_info.json.*dimat_jax\[prepare\].*"
        rf"`tfds build cifar10 --file_format=array_record --data_dir={tmp_path}`"
    )
    with pytest.raises(DataError, match=prepare):
        load("cifar10", directory=str(tmp_path))

    # This is how TFRecord, the default format of tfds, would look.
    folder = write_tfds(tmp_path)
    test = folder / "cifar10-test.array_record-00000-of-00001"
    test.rename(folder / "cifar10-test.tfrecord-00000-of-00001")
    with pytest.raises(DataError, match=r"no .*cifar10-test.array_record\*; prepare"):
        load("cifar10", directory=str(tmp_path))


def test_a_data_set_is_read_from_arrays_where_there_are_no_records(tmp_path):
    write_tfds(tmp_path)
    original = load("cifar10", directory=str(tmp_path), cache_dir=str(tmp_path / "c"))
    arrays = tmp_path / "elsewhere/cifar10/arrays"
    decoded = (original.train, original.test, 10, original.class_names)
    _cache.write_arrays(arrays, decoded)
    copy = load("cifar10", directory=str(tmp_path / "elsewhere"))
    assert_well_formed(copy, channels=3)
    assert_same(copy, original)

    (arrays / "test_labels.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=f"^cifar10: {arrays}/test_labels.npy ca"):
        load("cifar10", directory=str(tmp_path / "elsewhere"))


def test_damaged_records_are_named(tmp_path):
    folder = write_tfds(tmp_path)
    (folder / "cifar10-test.array_record-00000-of-00001").write_bytes(b"no records")
    with pytest.raises(DataError, match=rf"test in {folder} cannot be used: "):
        load("cifar10", directory=str(tmp_path), cache_dir=str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def cifar100(data_dir, data_cache) -> Dataset:
    directory = data_dir / "tfds"
    if not (directory / "cifar100").is_dir():
        pytest.skip(f"no cifar100 in {directory}")
    return load("cifar100", directory=str(directory), cache_dir=data_cache)


@pytest.mark.slow
def test_cifar100_is_complete_with_the_known_statistics(cifar100):
    assert_well_formed(cifar100, channels=3)
    assert cifar100.train.images.shape == (50_000, 32, 32, 3)
    assert cifar100.test.images.shape == (10_000, 32, 32, 3)
    assert cifar100.class_names[:2] == ("apple", "aquarium_fish")
    assert len(set(cifar100.class_names)) == 100
    assert np.all(np.bincount(cifar100.train.labels) == 500)
    assert np.all(np.bincount(cifar100.test.labels) == 100)
    mean, std = [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]
    np.testing.assert_allclose(cifar100.mean / 255, mean, atol=6e-5)
    np.testing.assert_allclose(cifar100.std / 255, std, atol=6e-5)


@pytest.mark.slow
def test_cached_cifar100_is_not_decoded_again(
    cifar100, data_dir, data_cache, monkeypatch
):
    monkeypatch.setattr(_cifar, "decode_image", None)
    again = load(
        "cifar100",
        directory=str(data_dir / "tfds"),
        cache_dir=data_cache,
        train_size=1000,
    )
    assert np.all(np.bincount(again.train.labels) == 10)
    np.testing.assert_array_equal(again.test.labels, cifar100.test.labels)


# Tiny ImageNet: a tiny copy of its layout, and the real images

TINY = "tiny-imagenet-200"
WNIDS = ["n02", "n01"]


def tiny_members() -> dict[str, bytes]:
    """Two classes with two training images each (one greyscale) and a test image."""
    rng = np.random.default_rng(0)
    members = {"wnids.txt": "\n".join(WNIDS).encode()}
    for wnid in WNIDS:
        colour = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        grey = rng.integers(0, 256, (64, 64), dtype=np.uint8)
        images = f"train/{wnid}/images"
        members[f"{images}/{wnid}_0.JPEG"] = encode(colour, "JPEG")
        members[f"{images}/{wnid}_1.JPEG"] = encode(grey, "JPEG")
        members[f"train/{wnid}/{wnid}_boxes.txt"] = b""
    members["val/images/val_0.JPEG"] = encode(np.full((64, 64), 7, np.uint8), "JPEG")
    members["val/val_annotations.txt"] = b"val_0.JPEG\tn01\t0\t32\t44\t62\n"
    members["test/images/test_0.JPEG"] = b"unlabelled, so never read"
    return members


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{TINY}/{name}", content)


@pytest.fixture
def tiny(tmp_path) -> Path:
    path = tmp_path / "data" / f"{TINY}.zip"
    path.parent.mkdir()
    write_zip(path, tiny_members())
    return path


def load_tiny(path: Path, cache: Path) -> Dataset:
    return load("tiny_imagenet", directory=str(path), cache_dir=str(cache))


def test_tiny_imagenet_is_rgb_with_the_classes_of_wnids(tiny, tmp_path):
    data = load_tiny(tiny, tmp_path / "cache")
    assert_well_formed(data, channels=3)
    assert data.n_classes == 2
    assert data.train.images.shape == (4, 64, 64, 3)
    np.testing.assert_array_equal(data.train.labels, [0, 0, 1, 1])
    np.testing.assert_array_equal(data.test.labels, [1])
    np.testing.assert_array_equal(data.test.images, np.full((1, 64, 64, 3), 7))
    grey = data.train.images[1]
    np.testing.assert_array_equal(grey, np.repeat(grey[..., :1], 3, axis=-1))
    assert np.any(data.train.images[0] != data.train.images[0][..., :1])


def test_tiny_imagenet_reads_alike_from_zip_and_folder(tiny, tmp_path):
    expected = load_tiny(tiny, tmp_path / "cache")
    assert_same(load_tiny(tiny.parent, tmp_path / "cache"), expected)
    with zipfile.ZipFile(tiny) as archive:
        archive.extractall(tmp_path / "unpacked")
    assert_same(load_tiny(tmp_path / "unpacked", tmp_path / "cache2"), expected)
    assert_same(load_tiny(tmp_path / "unpacked" / TINY, tmp_path / "cache3"), expected)


WORDS = "n00\tentity\nn01\tgoldfish, Carassius auratus\nn02\tlion\nn03\ttoad, frog\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (None, None),
        (WORDS, ("lion", "goldfish")),
        (WORDS.replace("n02", "n05"), None),
        (WORDS.replace("lion", " "), None),
        ("n01 goldfish", None),
    ],
)
def test_tiny_imagenets_classes_are_called_by_their_first_word(
    tmp_path, words, expected
):
    path, members = tmp_path / "words.zip", tiny_members()
    if words is not None:
        members["words.txt"] = words.encode()
    write_zip(path, members)
    data = load_tiny(path, tmp_path / "cache")
    assert data.class_names == expected
    # They come from the cache, too.
    assert load_tiny(path, tmp_path / "cache").class_names == expected


def test_tiny_imagenet_must_be_found(tmp_path):
    with pytest.raises(DataError, match=r"`directory` is missing.*zip \(http://cs231n"):
        load("tiny_imagenet")
    with pytest.raises(
        DataError, match=f"expected {tmp_path} to be or hold {TINY}.zip"
    ):
        load_tiny(tmp_path, tmp_path)


SMALL = encode(np.zeros((32, 32, 3), np.uint8), "JPEG")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("wnids.txt", None, "wnids.txt is missing or empty"),
        ("wnids.txt", b"n01\nn02\nn03", r"train/n03/images/\*.JPEG is missing"),
        ("val/val_annotations.txt", None, "val/val_annotations.txt is missing"),
        ("val/val_annotations.txt", b"\n", "val/val_annotations.txt is missing"),
        (
            "val/val_annotations.txt",
            b"val_0.JPEG\tn9",
            r"<wnid> .*got 'val_0.JPEG\\tn9",
        ),
        ("val/val_annotations.txt", b"val_0.JPEG", r"<wnid> .*got 'val_0.JPEG'"),
        ("val/images/val_0.JPEG", None, "val/images/val_0.JPEG is missing"),
        ("val/images/val_0.JPEG", b"JFIF", "val_0.JPEG cannot be used: "),
        ("val/images/val_0.JPEG", SMALL, r"val_0.JPEG: .*\(64, 64, 3\), got \(32, 32,"),
    ],
)
def test_a_malformed_member_is_named(name, content, message, tmp_path):
    members = tiny_members() | {name: content}
    members = {
        name: content for name, content in members.items() if content is not None
    }
    path = tmp_path / "copy.zip"
    write_zip(path, members)
    with pytest.raises(DataError, match=f"{path}: .*{message}"):
        load_tiny(path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def encrypted(content: bytearray) -> None:
    """Marks all members of a zip as encrypted."""
    for start, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.find(start)
        while place >= 0:
            content[place + offset] |= 1
            place = content.find(start, place + 1)


def bomb(width: int, height: int) -> bytes:
    """A PNG file of a few bytes that says how large its image is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    parts = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("val/images/val_0.JPEG", bomb(40_000, 40_000), "val_0.JPEG cannot be used: "),
        ("val/images/val_0.JPEG", bomb(9000, 9000), r"got \(9000, 9000, 3\)"),
        ("val/images/val_0.JPEG", bytes(2**26 + 1), "val_0.JPEG has 67108865 bytes"),
        ("wnids.txt", b"n01\n\xe9\n", "wnids.txt cannot be used: 'utf-8' codec"),
        ("words.txt", b"n01\t\xe9\n", "words.txt cannot be used: 'utf-8' codec"),
    ],
    ids=["40000 pixels", "9000 pixels", "64 MiB", "no utf-8 ids", "no utf-8 words"],
)
@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_a_hostile_member_is_named(name, content, message, kind, tmp_path):
    members = tiny_members() | {name: content}
    path = tmp_path / "data"
    if kind == "zip":
        path = tmp_path / "data.zip"
        write_zip(path, members)
    else:
        for member, data in members.items():
            (path / member).parent.mkdir(parents=True, exist_ok=True)
            (path / member).write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_tiny(path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_an_encrypted_zip_is_refused(tiny, tmp_path):
    content = bytearray(tiny.read_bytes())
    encrypted(content)
    tiny.write_bytes(content)
    with pytest.raises(DataError, match="is encrypted"):
        load_tiny(tiny, tmp_path / "cache")


@pytest.mark.parametrize(
    ("field", "array", "message"),
    [
        ("train_labels", np.full(6, 1000, np.int32), "labels reach from 1000 to 1000"),
        (
            "train_labels",
            np.array([0, 1, -1, -1, 2, 3], np.int32),
            "training labels reach from -1 to 3, but the classes are 0 to 9; the first "
            "bad one is label 2",
        ),
        ("train_labels", np.zeros(3, np.int32), "images and 3 labels"),
        ("train_images", np.zeros((6, 8, 8, 3), np.uint8), "expected (32, 32, 3)"),
        ("n_classes", np.array(-5), "the classes are 0 to -6"),
        ("n_classes", np.arange(3), "expected whole numbers with 0 axes"),
        (
            "train_images",
            np.zeros((6, 32, 32, 3)),
            "expected bytes (uint8) with 4 axes",
        ),
        ("train_images", np.array(3, np.uint8), "expected bytes (uint8) with 4 axes"),
        (
            "test_labels",
            np.array(["a"] * 6),
            "expected whole numbers or floats with 1 or 2 axes",
        ),
        ("train_labels", np.zeros(6, np.float32), "training labels are float32[6]"),
        ("mean", np.full(3, np.nan, np.float32), "the means of the channels are [nan,"),
        ("std", np.ones(7, np.float32), "expected 3 finite number(s)"),
        ("std", np.array([1, 0, 1], np.float32), "all must be above 0"),
        ("class_names", np.array(["a", "b"]), "there are 2 names of 10 classes"),
        ("class_names", np.arange(10), "expected texts with 1 axes"),
    ],
)
def test_arrays_that_are_no_data_set_are_refused(tmp_path, field, array, message):
    images = np.arange(6 * 32 * 32 * 3, dtype=np.uint8).reshape(6, 32, 32, 3)
    split = make_split(images, np.arange(6))
    folder = tmp_path / "cifar10" / "arrays"
    _cache.write_arrays(folder, (split, split, 10, None))
    np.save(folder / f"{field}.npy", array)
    with pytest.raises(DataError) as raised:
        load("cifar10", directory=str(tmp_path))
    assert message in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"junk", b"\x93NUMPY\x01\x00v\x00{'descr'"])
def test_a_damaged_array_is_named_by_its_file(tmp_path, content):
    split = make_split(np.zeros((6, 32, 32, 3), np.uint8), np.arange(6))
    folder = tmp_path / "cifar10" / "arrays"
    _cache.write_arrays(folder, (split, split, 10, None))
    (folder / "std.npy").write_bytes(content)
    with pytest.raises(DataError) as raised:
        load("cifar10", directory=str(tmp_path))
    path = folder / "std.npy"
    assert f"{path} cannot be used: it is damaged, or no .npy file" in str(raised.value)
    assert "pickle" not in str(raised.value)


def test_a_truncated_zip_is_refused(tiny, tmp_path):
    tiny.write_bytes(tiny.read_bytes()[:-100])
    with pytest.raises(DataError, match=f"the zip {tiny} cannot be used: "):
        load_tiny(tiny, tmp_path / "cache")


def test_the_real_tiny_imagenet_is_read(data_dir, data_cache):
    if not (data_dir / f"{TINY}.zip").exists():
        pytest.skip(f"no {TINY}.zip in {data_dir}")
    data = load_tiny(data_dir, data_cache)
    assert_well_formed(data, channels=3)
    assert data.n_classes == 200 and data.train.images.shape[1:] == (64, 64, 3)
    assert data.class_names is not None and "goldfish" in data.class_names
    for labels in (data.train.labels, data.test.labels):
        counts = np.bincount(labels, minlength=200)
        assert np.all(counts == counts[0])


# The cache


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Records the decoded images, with one entry for each."""
    images = []
    decode = _tiny_imagenet.decode_image

    def decode_and_record(data, shape, where):
        images.append(where)
        return decode(data, shape, where)

    monkeypatch.setattr(_tiny_imagenet, "decode_image", decode_and_record)
    return images


def test_a_second_load_decodes_nothing(tiny, tmp_path, decoded):
    first = load_tiny(tiny, tmp_path / "cache")
    assert len(decoded) == 5
    assert_same(load_tiny(tiny, tmp_path / "cache"), first)
    assert len(decoded) == 5
    (folder,) = (tmp_path / "cache").iterdir()  # no partial folder is left behind
    images = np.load(folder / "train_images.npy", mmap_mode="r")
    np.testing.assert_array_equal(images, first.train.images)


def test_the_default_cache_is_the_users(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load("tiny_imagenet", directory=str(tiny))
    assert len(list((tmp_path / "xdg" / "dimat_jax").iterdir())) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    load("tiny_imagenet", directory=str(tiny))
    assert len(list((tmp_path / ".cache" / "dimat_jax").iterdir())) == 1


def test_data_that_move_with_their_times_stay_cached(tiny, tmp_path, decoded):
    first = load_tiny(tiny, tmp_path / "cache")
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copy2(tiny, tmp_path / "elsewhere")
    assert_same(load_tiny(Path(moved), tmp_path / "cache"), first)
    assert len(decoded) == 5


def test_changed_data_are_decoded_anew(tiny, tmp_path, decoded):
    load_tiny(tiny, tmp_path / "cache")
    stat = tiny.stat()
    os.utime(tiny, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    load_tiny(tiny, tmp_path / "cache")
    assert len(decoded) == 10
    with zipfile.ZipFile(tiny) as archive:
        archive.extractall(tmp_path)
    load_tiny(tmp_path / TINY, tmp_path / "cache")
    one = tmp_path / TINY / "train/n01/images/n01_0.JPEG"
    one.write_bytes(encode(np.zeros((64, 64), np.uint8), "JPEG"))
    data = load_tiny(tmp_path / TINY, tmp_path / "cache")
    assert not data.train.images[2].any()


@pytest.mark.parametrize(
    "field", ["train_images", "train_labels", "mean", "n_classes", "class_names"]
)
@pytest.mark.parametrize("damage", ["deleted", "empty", "truncated", "garbage"])
def test_a_damaged_cache_is_rebuilt(tiny, tmp_path, decoded, caplog, field, damage):
    first = load_tiny(tiny, tmp_path / "cache")
    expected = first._replace(train=Split(*map(np.copy, first.train)))
    (path,) = (tmp_path / "cache").glob(f"*/{field}.npy")
    content = path.read_bytes()
    path.unlink()  # `first` still maps it
    if damage != "deleted":
        damaged = {"empty": b"", "truncated": content[:-1], "garbage": b"x" * 200}
        path.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING):
        assert_same(load_tiny(tiny, tmp_path / "cache"), expected)
    assert "which is unreadable" in caplog.text
    assert len(decoded) == 10
    load_tiny(tiny, tmp_path / "cache")
    assert len(decoded) == 10


def test_an_unwritable_cache_costs_only_a_warning(tiny, tmp_path, decoded, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        data = load_tiny(tiny, blocked)
    assert "Cannot keep the decoded tiny_imagenet" in caplog.text
    assert_well_formed(data, channels=3)
    assert_same(load_tiny(tiny, blocked), data)
    assert len(decoded) == 10


def test_a_failed_write_leaves_nothing(tiny, tmp_path, monkeypatch, caplog):
    def full(file, array):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", full)
    with caplog.at_level(logging.WARNING):
        data = load_tiny(tiny, tmp_path / "cache")
    assert "No space left on device" in caplog.text
    assert_well_formed(data, channels=3)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_faster_process_wins(tiny, tmp_path, decoded, monkeypatch, caplog):
    expected = load_tiny(tiny, tmp_path / "cache")
    read, asked = _cache._read, []

    def miss_once(folder):
        asked.append(folder)
        return None if len(asked) == 1 else read(folder)

    monkeypatch.setattr(_cache, "_read", miss_once)
    with caplog.at_level(logging.WARNING):
        assert_same(load_tiny(tiny, tmp_path / "cache"), expected)
    assert caplog.text == "" and len(decoded) == 10
    assert len(list((tmp_path / "cache").iterdir())) == 1
