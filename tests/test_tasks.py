"""What agents learn: losses and metrics of every task, and what does not fit a task."""

import dataclasses
import json

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from dimat_jax import reports
from dimat_jax._pretrain import pretraining_fields
from dimat_jax._tuning import tune
from dimat_jax._without_data import ExperimentWithoutData, Form
from dimat_jax.config import ConfigError, check, default_config
from dimat_jax.data import _text
from dimat_jax.data._labels import check_labels
from dimat_jax.data.partition import partition
from dimat_jax.data.pipeline import Batch, Samples
from dimat_jax.data.sources import (
    SOURCES,
    DataError,
    Source,
    Split,
    load,
    make_dataset,
)
from dimat_jax.evaluate import Evaluator
from dimat_jax.experiment import Experiment
from dimat_jax.models import MODELS, ModelRecord
from dimat_jax.placement import place
from dimat_jax.reports._curves import chart
from dimat_jax.reports._read import find_runs
from dimat_jax.tasks import TASKS, TaskError, TaskRecord, metric_of, output_shape
from dimat_jax.train import run
from tests.reports.made_up import write_run

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(size=(4, 6, 5)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(0, 5, (4, 6)), jnp.int32)


# The records ==========================================================================


def nats(logits, label) -> float:
    exact = np.asarray(logits, np.float64)
    return float(np.log(np.exp(exact).sum()) - exact[label])


def test_the_loss_of_a_class_is_its_cross_entropy_and_its_score_whether_it_is_first():
    task, labels = TASKS["classification"], TOKENS[:, 0]
    expected = [
        nats(row, label) for row, label in zip(LOGITS[:, 0], labels, strict=True)
    ]
    np.testing.assert_allclose(task(LOGITS[:, 0], labels), expected, rtol=1e-5)
    scores = task.scores(LOGITS[:, 0], labels)
    np.testing.assert_array_equal(scores, LOGITS[:, 0].argmax(1) == labels)


def test_the_loss_of_a_text_is_the_mean_over_its_tokens_and_the_metric_its_perplexity():
    task = TASKS["language_modelling"]
    expected = [
        np.mean([nats(logits, token) for logits, token in zip(*pair, strict=True)])
        for pair in zip(LOGITS, TOKENS, strict=True)
    ]
    np.testing.assert_allclose(task(LOGITS, TOKENS), expected, rtol=1e-5)
    np.testing.assert_array_equal(task.scores(LOGITS, TOKENS), task(LOGITS, TOKENS))
    assert task.metric_of(np.log(7.0)) == pytest.approx(7)
    assert task.metric_of(np.float64(1e4)) == np.inf  # without a warning


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3)])
def test_the_loss_of_numbers_is_the_mean_squared_error_and_the_metric_its_root(shape):
    task, labels = TASKS["regression"], jnp.asarray(RNG.normal(size=shape), jnp.float32)
    outputs = jnp.asarray(RNG.normal(size=(4, labels.size // 4)), jnp.float32)
    errors = (outputs.reshape(shape) - labels).reshape(4, -1)
    expected = np.square(np.asarray(errors, np.float64)).mean(axis=1)
    np.testing.assert_allclose(task(outputs, labels), expected, rtol=1e-5)
    assert task.metric_of(9.0) == 3


def test_outputs_have_a_place_for_each_token_and_otherwise_for_each_class_or_number():
    shapes = {name: output_shape(task, 5, (8,)) for name, task in TASKS.items()}
    assert shapes.pop("language_modelling") == (8, 5)
    assert set(shapes.values()) == {(5,)}


@pytest.mark.parametrize(
    "wrong", [{"metric": "loss"}, {"metric": "a b"}, {"metric": "x", "better": "more"}]
)
def test_a_record_whose_metric_cannot_be_in_rows_is_refused(wrong):
    with pytest.raises(TaskError):
        TaskRecord("mine", TASKS["regression"].build, labels="numbers", **wrong)


def test_a_row_tells_its_metric_also_of_a_task_that_is_not_there():
    row = {"test_loss_mean": 1.0, "test_perplexity": [2.0], "test_perplexity_mean": 2.0}
    assert metric_of(row) == TASKS["language_modelling"].shown
    unknown = metric_of(
        {"test_mean_error_mean": 1.0, "test_mean_error_local_mean": 2.0}
    )
    assert unknown.name == "mean_error" and not unknown.better
    assert metric_of({"test_loss_mean": 1.0}).name == "accuracy"


@pytest.mark.parametrize("name", ["regression", "language_modelling"])
def test_evaluation_adds_up_batches_and_leaves_masked_examples_out(name):
    """Two agents whose outputs are multiples of a constant."""
    task, placement = TASKS[name], place(2)
    tokens = name == "language_modelling"
    labels = TOKENS if tokens else jnp.asarray(RNG.normal(size=(4,)), jnp.float32)
    outputs = LOGITS if tokens else LOGITS[:, 0, :1]
    mask = np.array([[True, True], [True, False]])

    def read(indices, mask):
        return Batch(outputs[indices], labels[indices], jnp.asarray(mask))

    samples = Samples(read, np.array([[0, 1], [2, 3]]), mask, shared=True)

    def forward(variables, inputs):
        return variables["params"]["scale"] * inputs

    evaluate = Evaluator(forward, samples, placement, task)
    factors = np.array([1.0, -0.5], np.float32)
    found = evaluate({"params": {"scale": placement.put(factors)}})
    for agent, factor in enumerate(factors):
        losses = np.asarray(task(factor * outputs[:3], labels[:3]))
        assert found.loss[agent] == pytest.approx(losses.mean(), rel=1e-5)
        expected = task.metric_of(np.float64(losses.mean()))
        assert found.metric[agent] == pytest.approx(expected, rel=1e-5)
    assert found.accuracy_by_class is None and found.disagreement is None


# Labels ===============================================================================


@pytest.mark.parametrize(
    "labels, kind, message",
    [
        (np.zeros(3, np.float32), "classes", "labels are float32.3.; expected a whole"),
        (np.zeros((3, 2), np.int32), "classes", "labels are int32.3, 2."),
        (np.full(3, 5, np.int32), "classes", "reach from 5 to 5, but the classes are"),
        (np.zeros(3, np.int32), "numbers", "are int32.3.; expected 2 float number"),
        (np.zeros(3, np.float32), "numbers", "expected 2 float number"),
        (
            np.array([[0, 1], [0, np.nan], [1, 1]], np.float32),
            "numbers",
            "label 1 is not",
        ),
        (
            np.zeros((3, 4), np.int32),
            "tokens",
            "labels are int32.3, 4.; expected a whole",
        ),
        (
            np.full((3, 6), 2, np.int32),
            "tokens",
            "reach from 2 to 2, but the tokens are",
        ),
        (np.zeros(2, np.int32), "classes", "3 images and 2 labels"),
        (np.zeros(3, np.int32), "words", "must be one of classes, numbers, tokens"),
    ],
)
def test_labels_that_are_not_of_the_kind_are_refused(labels, kind, message):
    split = Split(np.zeros((3, 6), np.int32), labels)
    with pytest.raises(DataError, match=f"mine: training.*{message}"):
        check_labels("mine: training", split, 2, kind)


@pytest.mark.parametrize("shape", [(20,), (20, 3)])
def test_arrays_with_float_labels_make_a_data_set_of_numbers(shape):
    inputs = RNG.normal(size=(20, 4)).astype(np.float32)
    labels = RNG.normal(size=shape)
    dataset = make_dataset("mine", (inputs, labels))
    assert dataset.labels == "numbers" and dataset.n_classes == (*shape, 1)[1]
    whole = np.concatenate([dataset.train.labels, dataset.test.labels])
    assert whole.dtype == np.float32
    assert sorted(whole.ravel()) == sorted(labels.astype(np.float32).ravel())
    assert not dataset.train.classes.any() and len(dataset.test.classes) == 4


def test_partitions_that_need_no_classes_split_examples_without_classes():
    classes = np.zeros(11, np.int32)
    for name in ("iid", "quantity_skew", "contiguous"):
        shards = partition(name, classes, 3, seed=0)
        assert sorted(np.concatenate(shards)) == list(range(11)), name
    pieces = partition("contiguous", classes, 3, seed=0)
    assert [piece.tolist() for piece in pieces] == [
        [*range(4)],
        [*range(4, 8)],
        [8, 9, 10],
    ]


# Texts ================================================================================


def test_a_text_is_cut_so_that_each_character_but_the_first_ones_is_a_label_once():
    text = "".join(RNG.choice(list("abcdeß\n"), 13_000))
    dataset = _text.dataset_of(text)
    assert "".join(dataset.class_names or ()) == "\nabcdeß"
    assert dataset.labels == "tokens" and dataset.n_classes == 7
    for split in (dataset.train, dataset.test):
        assert split.images.shape == split.labels.shape
        np.testing.assert_array_equal(split.images[:, 1:], split.labels[:, :-1])
    names = np.array(dataset.class_names)
    spans = [text[i * 1300 : (i + 1) * 1300] for i in range(10)]
    trained = names[dataset.train.labels].reshape(10, -1)
    tested = names[dataset.test.labels].reshape(10, -1)
    for span, train, test in zip(spans, trained, tested, strict=True):
        assert "".join(train) == span[1 : 1 + len(train)]
        assert "".join(test) == span[1171 : 1171 + len(test)]
        # What is left over at the end of a part is less than one example.
        assert 1169 - len(train) < _text.CONTEXT and 129 - len(test) < _text.CONTEXT


def test_a_text_of_ones_own_is_read_as_utf8_and_other_files_are_refused(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("Größe 👍\r\n" * 2000, "utf-8")
    dataset = load("text", directory=str(path))
    assert set(dataset.class_names or ()) == set("Größe 👍\n")
    for content, message in {
        b"\xff\xfe" * 20_000: "is no text in UTF-8",
        b"short": "has 5 characters; it must have at least 12800",
        b"": "has 0 characters",
    }.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            load("text", directory=str(path))
    with pytest.raises(DataError, match="there is no file"):
        load("text", directory=str(tmp_path / "none.txt"))


def test_the_text_that_comes_with_python_is_long_and_of_few_characters():
    dataset = load("text")
    assert dataset.train.labels.size > 300_000
    assert dataset.n_classes <= _text.MOST_CHARACTERS


# Configs ==============================================================================


def text_config(**fields):
    config = default_config()
    config.task = "language_modelling"
    config.data.name = "text"
    config.model.name = "gpt"
    config.update_from_flattened_dict(fields)
    return config


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"task": "classification"}, "for labels that are classes, but those of text"),
        ({"task": "clasification"}, "'classification'"),
        ({"data.name": "digits"}, "labels that are tokens, but those of digits are"),
        ({"data.partition": "by_class"}, "splits examples by their classes"),
        ({"pretrain.partition": "dirichlet"}, "splits examples by their classes"),
        ({"data.label_noise": 0.1}, "it changes classes, and the labels of text"),
        ({"model.depth": 0}, "depth"),
    ],
)
def test_what_does_not_fit_a_task_is_refused_before_any_work(fields, message):
    with pytest.raises(ConfigError, match=message):
        check(text_config(**fields))


class Pooled(nn.Module):
    """A model that has one output for a whole text."""

    n_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Embed(self.n_classes, self.n_classes)(x).mean(axis=1)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model.name": "mlp"}, "is 'mlp', which"),
        ({"model.name": "pooled"}, r"'pooled', which returns .* shape \(1, 128\) for"),
        ({"task": "classification", "data.name": "digits"}, "'gpt', which cannot take"),
    ],
)
def test_a_model_without_suitable_outputs_is_refused_before_data_are_read(
    fields, message, monkeypatch
):
    monkeypatch.setitem(MODELS, "pooled", ModelRecord("pooled", Pooled))
    monkeypatch.setattr("dimat_jax._needs.load_data", None)
    with pytest.raises(ConfigError, match=message):
        Experiment(text_config(**fields))


# Runs =================================================================================


def read_lines(directory, cache_dir):
    """Two features, and a number that is linear in them."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(120, 2)).astype(np.float32)
    return make_dataset("lines", (inputs, inputs @ [2.0, -1.0] + 0.5))


@pytest.fixture
def regression(monkeypatch):
    monkeypatch.setitem(SOURCES, "lines", Source("lines", read_lines))
    config = default_config()
    config.task = "regression"
    config.agents = 3
    config.data.name = "lines"
    config.data.validation = 0.2
    config.model.name = "mlp"
    config.model.width = 0.125
    config.algorithm = "wa"
    config.rounds = 2
    config.pretrain.epochs = 1
    config.batch_size = config.pretrain.batch_size = 16
    return config


def test_numbers_are_learnt_and_rows_and_lines_show_their_metric(regression, tmp_path):
    lines = []
    run(regression, tmp_path / "run", lines.append)
    written = (tmp_path / "run" / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in written.splitlines()]
    last = rows[-1]
    assert last["test_rmse_mean"] == pytest.approx(np.mean(last["test_rmse"]))
    roots = np.sqrt(last["test_loss"])
    np.testing.assert_allclose(last["test_rmse"], roots, rtol=1e-5)
    assert last["test_rmse_mean"] < rows[1]["test_rmse_mean"]
    assert not any("accuracy" in name for row in rows for name in row)
    assert any("test RMSE" in line and "training RMSE" in line for line in lines)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    best = min(r["validation_rmse_mean"] for r in rows if r["phase"] == "trained")
    assert summary["best_trained"]["validation_rmse_mean"] == best
    reported = reports.load(tmp_path)
    assert "Mean test RMSE of the agents" in reports.tables(reported)
    assert chart(reported).y_label == "test RMSE"
    assert chart(reported, "loss").y_label == "test loss"
    partition = json.loads((tmp_path / "run" / "partition.json").read_text())
    assert partition["classes"] is None and np.shape(partition["counts"]) == (3, 1)
    form = Form.read(tmp_path / "run")
    assert form is not None
    without = ExperimentWithoutData(regression, form, "away")
    assert without.signature == Experiment(regression).signature


def test_a_large_squared_error_is_no_divergence(tmp_path):
    for name, huge in (("rmse", False), ("accuracy", True)):
        folder = tmp_path / name
        write_run(folder, algorithm="wa")
        text = (folder / "metrics.jsonl").read_text().replace("accuracy", name)
        rows = [json.loads(line) for line in text.splitlines()]
        rows[-1]["test_loss_mean"] = 1e5
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
        (found,) = find_runs([folder])
        assert (found.state == "diverged") == huge, found.reason


def test_agents_are_not_shared_by_runs_of_different_tasks(regression):
    names = set()
    for task in ("regression", "mine"):
        with pytest.MonkeyPatch.context() as patch:
            record = dataclasses.replace(TASKS["regression"], name="mine", metric="mae")
            patch.setitem(TASKS, "mine", record)
            regression.task = task
            names.add(json.dumps(pretraining_fields(regression)))
    assert len(names) == 2


@pytest.mark.slow
def test_tuning_prefers_the_smaller_error(regression, tmp_path):
    for rate in (1e-2, 1e-6):
        regression.optimizer.learning_rate = rate
        run(regression, tmp_path / str(rate))
    tuned = tune([tmp_path], "optimizer.learning_rate")
    assert [line.best for line in tuned.lines] == [0.01]
    assert "`validation_rmse_mean`, the RMSE on images" in tuned.report()
    written = {path.name for path in reports.write([tmp_path], tmp_path / "report")}
    assert "rmse.png" in written and "accuracy.png" not in written
