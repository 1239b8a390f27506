"""Who gets which training images, and what images that all agents need cost."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dimat_jax import _division, train
from dimat_jax._metrics import read_evaluations
from dimat_jax.config import ConfigError, fields_of, resolved
from dimat_jax.errors import UserError
from dimat_jax.experiment import Experiment
from dimat_jax.models import classifier
from tests.sweeping.small import small

PIXELS = 64  # bytes of a digit, one for each pixel
HELD_OUT = {"merge__match_data": "held_out", "data__held_out": 40}


def own(**changes):
    """A config that matches units by activations, without a shared sample."""
    return small("dimat", merge__match_samples=30, **changes)


def images_of(experiment: Experiment) -> set[int]:
    """All images that the devices hold for training."""
    return set(np.concatenate(experiment._holdings.of_device).tolist())


@pytest.mark.parametrize("partition", ["iid", "by_class", "dirichlet"])
def test_every_image_has_one_use(partition):
    experiment = Experiment(
        own(
            data__partition=partition,
            pretrain__partition="iid",
            data__validation=0.2,
            **HELD_OUT,
        )
    )
    division = experiment.division
    parts = [*division.shards, *division.validation, division.held_out]
    assert sorted(itertools.chain(*map(np.ndarray.tolist, parts))) == list(range(300))
    assert len(division.held_out) == 40
    trained_on = set(np.concatenate(division.shards).tolist())
    # Pre-training divides the images anew, and does not train on others.
    alone = np.concatenate(division.pretrain_shards).tolist()
    assert set(alone) == trained_on == images_of(experiment)
    assert len(alone) == len(trained_on)
    assert experiment.sampler.steps_per_epoch == -(
        -max(map(len, division.shards)) // experiment.config.batch_size
    )


def test_validation_images_are_divided_like_the_others():
    experiment = Experiment(own(data__partition="by_class", data__validation=60))
    labels = experiment.dataset.train.labels
    division = experiment.division
    for shard, kept_back in zip(division.shards, division.validation, strict=True):
        assert set(labels[kept_back]) == set(labels[shard])
    assert sum(map(len, division.validation)) == pytest.approx(60, abs=2)


def test_an_agent_whose_images_of_pretraining_are_all_set_aside_is_refused(monkeypatch):
    rest = np.arange(40)
    config = small(data__validation=0.2, pretrain__partition="dirichlet")
    fields = fields_of(config)

    def partition(name: str, labels: np.ndarray, n_agents: int, **options: Any) -> Any:
        if name == "dirichlet":
            return [rest[rest != image], np.array([image])]
        return [rest[::2], rest[1::2]]

    monkeypatch.setattr(_division, "partition", partition)
    labels, image = rest % 10, -1
    image = int(_division.divide(labels, 2, fields).validation[0][0])
    with pytest.raises(UserError, match="leaves agent 1 only images that"):
        _division.divide(labels, 2, fields)


def divided(**changes: Any):
    """The division of a config's images, and the images themselves."""
    config = own(data__partition="dirichlet", data__validation=0.2, **changes)
    dataset, fields = _division.load_data(config), resolved(fields_of(config))
    division = _division.divide(dataset.train.labels, config.agents, fields)
    labels = _division.with_wrong_labels(dataset, division, fields).labels
    parts = [*division.shards, *division.pretrain_shards, *division.validation, labels]
    return [dataset.train.images, *parts]


def equal(a: list[np.ndarray], b: list[np.ndarray]) -> list[bool]:
    return [np.array_equal(x, y) for x, y in zip(a, b, strict=True)]


def test_a_seed_of_the_data_keeps_them_while_the_seed_varies():
    fixed = [divided(seed=seed, data__seed=7, data__label_noise=0.3) for seed in (0, 1)]
    assert all(equal(*fixed))
    # Without it they follow the seed. A number means the same as that seed.
    assert not any(equal(divided(seed=0), divided(seed=1)))
    assert all(equal(divided(seed=7), divided(seed=0, data__seed=7)))


def test_agents_train_on_wrong_labels_and_validate_on_true_ones(monkeypatch):
    def with_wrong_labels(dataset, division, fields):
        split = _division.with_wrong_labels(dataset, division, fields)
        # The noise leaves the kept-back images alone. Here they get wrong labels, too.
        # So a validator that used the labels for training would be noticed.
        labels = np.array(split.labels)
        labels[np.concatenate(division.validation)] = 99
        return split._replace(labels=labels)

    monkeypatch.setattr("dimat_jax.experiment.with_wrong_labels", with_wrong_labels)
    config = own(data__label_noise=0.5, data__validation=0.2)
    experiment = Experiment(config)
    division, labels = experiment.division, experiment.dataset.train.labels
    held = np.asarray(experiment.train_pool.labels)[0]
    rows = zip(division.shards, experiment._rows, strict=True)
    for shard, places in rows:
        wrong = held[places] != labels[shard]
        assert wrong.sum() == round(0.5 * len(shard))
    validator = experiment.validator
    assert validator is not None
    seen = np.concatenate([np.asarray(batch.labels) for batch in validator._samples])
    kept_back = np.concatenate(division.validation)
    mask = validator._samples.mask.ravel()
    assert sorted(seen[mask]) == sorted(labels[kept_back])


def test_agents_with_one_sample_are_named_if_the_model_has_batch_norm(caplog):
    few = {"data__train_size": 4, "pretrain__epochs": 0, "agents": 3}
    for norm, expected in (("batch", True), ("none", False)):
        caplog.clear()
        train._warn(Experiment(small("local", model__norm=norm, **few)))
        assert ("agents [1, 2] have a single training" in caplog.text) == expected
    caplog.clear()
    train._warn(Experiment(small("local", model__norm="batch", agents=3)))
    assert not caplog.text


def test_held_out_images_have_all_classes_equally_often():
    experiment = Experiment(own(data__partition="by_class", **HELD_OUT))
    labels = experiment.dataset.train.labels[experiment.division.held_out]
    assert np.bincount(labels).tolist() == [4] * 10


def test_without_options_all_images_are_trained_on():
    division = Experiment(own()).division
    assert len(division.trained_on) == 300 and not len(division.held_out)
    assert not any(map(len, division.validation))


def test_more_images_than_there_are_cannot_be_held_out():
    with pytest.raises(ConfigError, match="held_out is 300, but there are only 300 tr"):
        Experiment(own(merge__match_data="held_out", data__held_out=300))
    with pytest.raises(ConfigError, match="match_samples is 50, but there are only 40"):
        Experiment(small("dimat", merge__match_samples=50, **HELD_OUT))
    with pytest.raises(UserError, match="validation is 300, but there are only 300 sa"):
        Experiment(own(data__validation=300))


@pytest.mark.every_nth(8)
@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({}, 0),  # of their own
        # Each of three agents lacks what is not in its own shard.
        ({"merge__match_data": "proxy"}, 2 * 30),
        ({"merge__match_data": "global", "merge__match_samples": 1000}, 2 * 300),
        (HELD_OUT, 3 * 30),
        ({"algorithm": "wm"}, 0),
        ({"algorithm": "wa"}, 0),
    ],
)
def test_shared_images_are_booked_once(tmp_path, changes, images):
    fields = {"merge__match_samples": 30, "checkpoint__every": 1, **changes}
    config = small(fields.pop("algorithm", "dimat"), **fields)
    train.run(config, tmp_path, lambda line: None)
    rows = read_evaluations(tmp_path)
    booked = [row["bytes_sent_by_kind"].get("images", 0) for row in rows]
    assert booked == [0] + [images * PIXELS] * 4
    for row in rows:
        by_link = sum(row["bytes_sent_by_agent"])
        assert row["bytes_sent_total"] - by_link == row["bytes_sent_by_kind"].get(
            "images", 0
        )


@pytest.mark.slow
def test_a_run_that_resumes_does_not_book_images_again(tmp_path):
    config = small("dimat", merge__match_data="proxy", merge__match_samples=30)

    class Killed(Exception):
        pass

    def die(line: str) -> None:
        if "round   2     merged" in line:
            raise Killed

    with pytest.raises(Killed):
        train.run(config, tmp_path, die)
    summary = train.run(config, tmp_path, lambda line: None)
    assert summary["bytes_sent_by_kind"]["images"] == 2 * 30 * PIXELS


def test_a_proxy_is_drawn_from_images_that_agents_train_on():
    experiment = Experiment(own(merge__match_data="proxy", data__validation=0.3))
    samples = experiment.merge_data(1).match
    (chosen,) = experiment.examples._sent.values()
    assert samples is not None
    assert set(chosen) <= set(experiment.division.trained_on)
    assert samples.shared and samples.n_examples(10) == 30


def test_validation_accuracy_is_that_of_validation_images(tmp_path):
    config = small("local", data__validation=0.25)
    train.run(config, tmp_path, lambda line: None)
    experiment, agents = train.load_agents(tmp_path)
    assert experiment.validator is not None
    last = read_evaluations(tmp_path)[-1]
    images = experiment.dataset.train
    chosen = np.concatenate(experiment.division.validation)
    inputs = (images.images[chosen].astype(np.float32) - experiment.dataset.mean) / (
        experiment.dataset.std
    )
    for agent in range(3):
        variables = {
            "params": {
                layer: {name: leaf[agent] for name, leaf in weights.items()}
                for layer, weights in agents["params"].items()
            }
        }
        logits = classifier.forward(experiment.model)(variables, jnp.asarray(inputs))
        accuracy = np.mean(np.asarray(logits).argmax(axis=1) == images.labels[chosen])
        assert last["validation_accuracy"][agent] == pytest.approx(accuracy, abs=1e-6)
    mean = np.mean(last["validation_accuracy"])
    assert last["validation_accuracy_mean"] == pytest.approx(mean)
    assert "validation_loss_mean" in last


def test_without_validation_images_no_such_column_is_written(tmp_path):
    train.run(small("local", rounds=1), tmp_path, lambda line: None)
    rows = read_evaluations(tmp_path)
    assert not [c for row in rows for c in row if "validation" in c]
