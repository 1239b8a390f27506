"""CIFAR from the original archives and from parquet files, without TensorFlow."""

import io
import os
import pickle
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dimat_jax.data import sources
from dimat_jax.data._dataset import digest
from dimat_jax.data.sources import DataError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
LABELS = np.arange(12) % 10
NAMES = tuple(f"kind{i}" for i in range(10))


def rows(images):
    """Images as rows of 3,072 bytes: red, green and blue pixels, as the authors do."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"folder/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def python_2(value) -> bytes:
    """Pickles as the authors did, with bytes for all texts."""
    return pickle.dumps(value, protocol=2)


def cifar10_python(n_batches: int = 5) -> dict[str, bytes]:
    parts = np.array_split(np.arange(10), 5)[:n_batches] + [np.arange(10, 12)]
    files = [f"data_batch_{i + 1}" for i in range(n_batches)] + ["test_batch"]
    members = {
        file: python_2({b"data": rows(PIXELS[p]), b"labels": LABELS[p].tolist()})
        for file, p in zip(files, parts, strict=True)
    }
    meta = {b"label_names": [name.encode() for name in NAMES]}
    return {**members, "batches.meta": python_2(meta)}


def cifar10_binary() -> dict[str, bytes]:
    records = np.concatenate([LABELS[:, None].astype(np.uint8), rows(PIXELS)], 1)
    parts = {f"data_batch_{i + 1}.bin": records[2 * i : 2 * i + 2] for i in range(5)}
    members = {name: part.tobytes() for name, part in parts.items()}
    members["test_batch.bin"] = records[10:].tobytes()
    return {**members, "batches.meta.txt": ("\n".join(NAMES) + "\n\n").encode()}


def table(images, labels, label, names):
    """A table as Hugging Face writes it."""
    import json

    import pyarrow as pa

    encoded = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    features = {label: {"names": list(names), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    columns = {"img": encoded, label: [int(x) for x in labels]}
    return pa.table(columns).replace_schema_metadata(metadata)


def write_parquet(folder: Path, label: str, splits, names) -> None:
    import pyarrow.parquet

    folder.mkdir(parents=True)
    for split, (images, labels) in splits.items():
        # The training samples are in two files.
        for i, part in enumerate(np.array_split(np.arange(len(labels)), 2)):
            path = folder / f"{split}-{i:05}-of-00002.parquet"
            made = table(images[part], labels[part], label, names)
            pyarrow.parquet.write_table(made, path)


def load(folder: Path, name: str = "cifar10"):
    cache = str(folder.parent / f"cache-{folder.name}")
    return sources.load(name, directory=str(folder), cache_dir=cache)


@pytest.mark.parametrize("kind", ["python", "binary", "file", "parquet", "modern"])
def test_every_form_of_cifar10_is_the_same_data(tmp_path, kind):
    folder = tmp_path / "data"
    folder.mkdir()
    if kind in ("python", "file"):
        path = write_tar(folder / "cifar-10-python.tar.gz", cifar10_python())
        folder = path if kind == "file" else folder
    elif kind == "modern":  # the same dicts, pickled by Python 3
        members = {
            name: pickle.dumps(pickle.loads(content), protocol=5)
            for name, content in cifar10_python().items()
        }
        write_tar(folder / "cifar-10-python.tar.gz", members)
    elif kind == "binary":
        write_tar(folder / "cifar-10-binary.tar.gz", cifar10_binary())
    else:
        splits = {
            "train": (PIXELS[:10], LABELS[:10]),
            "test": (PIXELS[10:], LABELS[10:]),
        }
        write_parquet(folder / "plain_text", "label", splits, NAMES)
    data = load(folder)
    assert data.class_names == NAMES and data.n_classes == 10
    for split, part in ((data.train, slice(10)), (data.test, slice(10, None))):
        np.testing.assert_array_equal(split.images, PIXELS[part])
        np.testing.assert_array_equal(split.labels, LABELS[part])
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32


def test_parquet_files_of_another_data_set_beside_cifar10_are_not_read(tmp_path):
    splits = {"train": (PIXELS[:10], LABELS[:10]), "test": (PIXELS, LABELS)}
    write_parquet(tmp_path / "data" / "svhn", "label", splits, NAMES)
    with pytest.raises(DataError, match="cifar10: no .*dataset_info.json; prepare it"):
        load(tmp_path / "data")


def test_each_split_of_cifar10_may_have_a_folder_of_its_own(tmp_path):
    for split, part in (("train", slice(10)), ("test", slice(10, None))):
        samples = {split: (PIXELS[part], LABELS[part])}
        write_parquet(tmp_path / "data/cifar10" / split, "label", samples, NAMES)
    data = load(tmp_path / "data")
    np.testing.assert_array_equal(data.train.images, PIXELS[:10])
    np.testing.assert_array_equal(data.test.images, PIXELS[10:])


def test_cifar100_has_the_fine_labels(tmp_path):
    fine, names = 7 * np.arange(12), [f"fine{i}".encode() for i in range(100)]
    coarse = np.arange(12) % 3

    def batch(part):
        return {
            b"data": rows(PIXELS[part]),
            b"fine_labels": fine[part].tolist(),
            b"coarse_labels": coarse[part].tolist(),
        }

    folders = [tmp_path / kind for kind in ("python", "binary", "parquet")]
    for folder in folders[:2]:
        folder.mkdir()
    python = {"train": batch(slice(10)), "test": batch(slice(10, None))}
    python["meta"] = {b"fine_label_names": names, b"coarse_label_names": [b"a"]}
    members = {name: python_2(content) for name, content in python.items()}
    write_tar(folders[0] / "cifar-100-python.tar.gz", members)
    both = np.stack([coarse, fine], 1).astype(np.uint8)
    records = np.concatenate([both, rows(PIXELS)], 1)
    members = {
        "train.bin": records[:10].tobytes(),
        "test.bin": records[10:].tobytes(),
        "fine_label_names.txt": b"\n".join(names),
    }
    write_tar(folders[1] / "cifar-100-binary.tar.gz", members)
    splits = {"train": (PIXELS[:10], fine[:10]), "test": (PIXELS[10:], fine[10:])}
    texts = [name.decode() for name in names]
    write_parquet(folders[2] / "cifar100", "fine_label", splits, texts)
    python, *others = (load(folder, "cifar100") for folder in folders)
    assert python.train.labels.tolist() == fine[:10].tolist()
    assert python.class_names == tuple(texts)
    assert all(digest(python) == digest(other) for other in others)
    assert all(python.class_names == other.class_names for other in others)


# Archives that are damaged or dangerous -----------------------------------------------


class Dangerous:
    def __reduce__(self):
        return os.mkdir, ("dangerous",)


class Encoded:
    def __reduce__(self):
        import codecs

        return codecs.encode, ("text", "rot13")


def with_batch(content) -> dict[str, bytes]:
    return {**cifar10_python(), "data_batch_3": content}


BAD = {
    "a call": (
        lambda: with_batch(python_2({b"data": Dangerous()})),
        r"data_batch_3 is refused: its pickle calls posix.mkdir, but only NumPy arrays",
    ),
    "a codec": (
        lambda: with_batch(python_2({b"data": Encoded()})),
        "bytes are pickled as latin1, not as rot13",
    ),
    "no pickle": (lambda: with_batch(b"\x80\x02"), "data_batch_3 cannot be used"),
    "no data": (lambda: with_batch(python_2({})), "data_batch_3 cannot be used: KeyE"),
    "a list": (
        lambda: with_batch(python_2({b"data": [1], b"labels": [1]})),
        "data_batch_3: the pixels are no array of uint8",
    ),
    "short rows": (
        lambda: with_batch(python_2({b"data": rows(PIXELS)[:, 1:], b"labels": [1]})),
        r"data_batch_3: rows must have 3072 bytes, got \(12, 3071\)",
    ),
    "few labels": (
        lambda: with_batch(python_2({b"data": rows(PIXELS), b"labels": [1]})),
        r"data_batch_3: there are 12 images, but labels of shape \(1,\)",
    ),
    "bad label": (
        lambda: with_batch(python_2({b"data": rows(PIXELS[:1]), b"labels": [10]})),
        "training labels reach from 0 to 10, .* first bad one is label 4",
    ),
    "no batch": (lambda: cifar10_python(4), "lacks the file data_batch_5"),
}


@pytest.mark.parametrize("kind", BAD)
def test_archives_that_cannot_be_used_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    members, message = BAD[kind]
    write_tar(tmp_path / "cifar-10-python.tar.gz", members())
    with pytest.raises(DataError, match=message):
        load(tmp_path)
    assert not (tmp_path / "dangerous").exists()


def test_a_damaged_archive_is_named(tmp_path):
    path = write_tar(tmp_path / "cifar-10-binary.tar.gz", cifar10_binary())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cifar-10-binary.tar.gz cannot be used"):
        load(tmp_path)
    records = {**cifar10_binary(), "test_batch.bin": bytes(3072)}
    write_tar(path, records)
    with pytest.raises(DataError, match="test_batch.bin: it has 3072 bytes, which are"):
        load(tmp_path)


@pytest.mark.slow
def test_the_real_cifar100_is_equal_bit_by_bit(data_dir, data_cache, tmp_path):
    directory = data_dir / "tfds"
    if not (directory / "cifar100").is_dir():
        pytest.skip(f"no cifar100 in {directory}")
    real = sources.load("cifar100", directory=str(directory), cache_dir=data_cache)
    records = {
        f"{name}.bin": np.concatenate(
            [np.zeros((len(y), 1), np.uint8), y[:, None].astype(np.uint8), rows(x)], 1
        ).tobytes()
        for name, (x, y) in (("train", real.train), ("test", real.test))
    }
    assert real.class_names is not None
    records["fine_label_names.txt"] = "\n".join(real.class_names).encode()
    write_tar(tmp_path / "cifar-100-binary.tar.gz", records)
    found = load(tmp_path, "cifar100")
    assert digest(found) == digest(real) and found.class_names == real.class_names


# Hugging Face's folders and grain's sources -------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    """Every connection fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("something reaches for the network")

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)


def load_table(folder: Path):
    cache = str(folder.parent / "cache")
    return sources.load("huggingface", directory=str(folder), cache_dir=cache)


def test_a_saved_hugging_face_data_set_is_read_offline(tmp_path, offline):
    import datasets

    images = [Image.fromarray(x) for x in PIXELS]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))}
    )
    columns = {"image": images, "label": LABELS.tolist()}
    whole = datasets.Dataset.from_dict(columns, features)
    splits = {"train": whole.select(range(10)), "test": whole.select([11, 10])}
    datasets.DatasetDict(**splits).save_to_disk(str(tmp_path / "images"))
    data = load_table(tmp_path / "images")
    assert data.class_names == NAMES
    np.testing.assert_array_equal(data.train.images, PIXELS[:10])
    np.testing.assert_array_equal(data.test.images, PIXELS[[11, 10]])
    np.testing.assert_array_equal(data.test.labels, LABELS[[11, 10]])

    series = RNG.normal(size=(12, 3, 2))
    columns = {"features": series.tolist(), "label": LABELS % 2}
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "features"))
    data = load_table(tmp_path / "features")
    assert data.signature.input_shape == (3, 2) and data.n_classes == 2
    every = np.concatenate([data.test.images, data.train.images])
    np.testing.assert_array_equal(
        np.sort(every, axis=None), np.sort(series.astype(np.float32), axis=None)
    )


def test_a_folder_of_parquet_files_is_read(tmp_path, offline):
    grey = PIXELS[..., 0]
    splits = {"train": (grey[:10], LABELS[:10]), "validation": (grey[10:], LABELS[10:])}
    write_parquet(tmp_path / "grey" / "data", "label", splits, NAMES)
    data = load_table(tmp_path / "grey")
    np.testing.assert_array_equal(data.train.images[..., 0], grey[:10])
    np.testing.assert_array_equal(data.test.images[..., 0], grey[10:])
    assert data.signature.input_shape == (32, 32, 1)


def kinds_of_labels():
    """Inputs and labels of the kinds beside classes: numbers, and tokens."""
    tokens = np.arange(20).reshape(4, 5)
    inputs = RNG.normal(size=(4, 3))
    return {
        "one number": (inputs, np.array([0.5, 1.5, -1.0, 2.0])),
        "two numbers": (inputs, RNG.normal(size=(4, 2))),
        "tokens": (tokens, tokens + 1),
    }


@pytest.mark.parametrize("kind", kinds_of_labels())
def test_labels_of_a_source_and_of_a_table_may_be_numbers_or_tokens(tmp_path, kind):
    import pyarrow as pa
    import pyarrow.parquet

    inputs, labels = kinds_of_labels()[kind]
    source = list(zip(inputs, labels, strict=True))
    columns = pa.table({"input_ids": inputs.tolist(), "labels": labels.tolist()})
    for split in ("train", "test"):
        pyarrow.parquet.write_table(columns, tmp_path / f"{split}-0.parquet")
    for data in (sources.make_dataset("own", source, source), load_table(tmp_path)):
        assert data.labels == ("tokens" if kind == "tokens" else "numbers")
        dtype = np.int32 if kind == "tokens" else np.float32
        np.testing.assert_array_equal(data.train.images, inputs.astype(dtype))
        np.testing.assert_array_equal(data.train.labels, labels.astype(dtype))
        assert data.test.labels.dtype == dtype


@pytest.mark.parametrize("n_numbers", [1, 2])
def test_images_with_numbers_as_labels_are_kept_in_the_cache(tmp_path, n_numbers):
    import pyarrow.parquet

    numbers = RNG.normal(size=(12, n_numbers)).astype(np.float32)
    columns = table(PIXELS, LABELS, "label", NAMES).replace_schema_metadata()
    column = pyarrow.array(numbers.tolist() if n_numbers > 1 else numbers[:, 0])
    columns = columns.set_column(1, "label", column)
    (tmp_path / "images").mkdir()
    pyarrow.parquet.write_table(columns, tmp_path / "images" / "train.parquet")
    first = load_table(tmp_path / "images")
    assert first.labels == "numbers" and first.n_classes == n_numbers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dimat_jax.data._tables.decode_all", None)
        again = load_table(tmp_path / "images")
    assert digest(again) == digest(first)


def test_tables_that_cannot_be_used_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    def refused(columns, message):
        pyarrow.parquet.write_table(pa.table(columns), tmp_path / "train.parquet")
        with pytest.raises(DataError, match=message):
            load_table(tmp_path)

    labels = [0, 0, 1, 1]
    refused({"x": [[1.0], [2.0]], "y": [0, None]}, "train: sample 1 has no label")
    refused({"x": [[1.0], [2.0, 3.0]] * 2, "y": labels}, "input 1 is of another size")
    refused({"x": [[1.0], [None]] * 2, "y": labels}, "input 1 lacks a number")
    refused({"z": [[1.0]] * 4, "y": labels}, r"expected one of image, .* got \['y', 'z")
    ragged = {"x": [[1.0]] * 4, "y": [[1.0], [2.0], [3.0, 4.0], [5.0]]}
    refused(ragged, "train: label 2 is of another size than the first one")
    refused({"image": [b"none"] * 4, "label": labels}, "image 0 cannot be used")
    file = {"bytes": None, "path": "a.png"}
    refused({"image": [file] * 4, "label": labels}, "image 0 is not within the files")
    (tmp_path / "train.parquet").write_bytes(b"none")
    with pytest.raises(DataError, match="train.parquet cannot be used"):
        load_table(tmp_path)
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(
        DataError, match="holds no data set; it must be a folder of par"
    ):
        load_table(tmp_path)


def test_a_grain_source_is_read(offline):
    import grain

    pairs = [{"image": x, "label": y} for x, y in zip(PIXELS, LABELS, strict=True)]
    source = grain.MapDataset.source(pairs).map(
        lambda pair: {**pair, "image": pair["image"] / np.float32(255)}
    )
    data = sources.make_dataset("own", source[:10], source[10:])
    np.testing.assert_array_equal(data.train.images, PIXELS[:10] / np.float32(255))
    np.testing.assert_array_equal(data.test.labels, LABELS[10:])
    for bad, message in (
        (source.repeat(), "a source has 1 to 2147483648 samples, got"),
        (
            source.filter(lambda x: x["label"] != 3),
            "sample 3 is a NoneType; expected a",
        ),
        (source.map(lambda x: x["image"][: 9 + x["label"]]), "sample 0 is a ndarray"),
        (
            source.map(lambda x: (x["image"][: 9 + x["label"]], 0)),
            r"sample 1 is float32\[10, 32, 3\], but the first is float32\[9, 32, 3\]",
        ),
        (
            source.map(lambda x: (x["image"], "cat")),
            "sample 0: the label must be of numbers, got cat",
        ),
        (
            source.map(lambda x: (x["image"], [0.5] * (1 + (x["label"] == 4)))),
            r"sample 4: the label is float64\[2\], but the first is float64\[1\]",
        ),
        (
            source.map(lambda x: (x["image"], 0.5 if x["label"] == 4 else 0)),
            r"sample 4: the label is float64\[\], but the first is int64\[\]",
        ),
    ):
        with pytest.raises(DataError, match=message):
            sources.make_dataset("own", bad)
