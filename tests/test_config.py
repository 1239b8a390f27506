"""Tests configs: their fields, and the checks before any data is loaded."""

from typing import Any

import jax.numpy as jnp
import pytest

from configs import cifar100_resnet20, quickstart
from dimat_jax.algorithms import ALGORITHMS
from dimat_jax.compression import COMPRESSORS
from dimat_jax.config import (
    ConfigError,
    check,
    default_config,
    fields_of,
    model_arguments,
    resolved,
)
from dimat_jax.models import MODELS
from dimat_jax.models.resnet import ResNet
from dimat_jax.network import Absence, parse_absences
from dimat_jax.optimizers import OPTIMIZERS


def config_of(**fields: Any):
    config = default_config()
    config.model.update(fields)
    return config


def model_of(**fields: Any):
    config = config_of(**fields)
    check(config)
    return MODELS[config.model.name](n_classes=7, **model_arguments(fields_of(config)))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_its_own_defaults(name):
    assert model_of(name=name) == MODELS[name](n_classes=7)


def test_settings_reach_the_model():
    model = model_of(
        name="resnet50", width=0.25, norm="group", stem="cifar", dtype="bfloat16"
    )
    assert isinstance(model, ResNet)
    assert model.channels == (16, 32, 64, 128)
    assert (model.norm, model.stem, model.dtype) == ("group", "cifar", jnp.bfloat16)


def test_a_width_may_be_an_integer():
    assert model_of(name="vgg11", width=2) == MODELS["vgg11"](n_classes=7, width=2.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"name": "mlp", "stem": "cifar"},
            "config.model.stem is 'cifar', but model.name='mlp' does not read "
            "it; it is "
            "read where model.name is one of 'resnet18', 'resnet34', ",
        ),
        (
            {"name": "vit", "norm": "batch"},
            "config.model.norm is 'batch', but model.name='vit' does not read "
            "it; .*'mlp'",
        ),
        (
            {"name": "resnet20", "stem": "imagenet"},
            "model.name='resnet20' does not rea",
        ),
        ({"name": "resnet50", "stem": "none"}, "config.model.stem .* cifar, imagenet"),
        ({"name": "resnet20", "norm": "none"}, "config.model: norm .* batch, group"),
        ({"width": 0.3}, "config.model: width 0.3 makes 4.8 units of 16"),
        ({"width": 0}, "config.model.width is 0.0; it must be above 0"),
        ({"width": float("nan")}, "config.model.width is nan; it must be above 0"),
        ({"name": "resnet21"}, "config.model.name is 'resnet21'; allowed: .*vgg16"),
        ({"dtype": "float16"}, "config.model.dtype is 'float16'"),
    ],
)
def test_a_model_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        check(config_of(**fields))


def changed(**fields: Any):
    """Makes the default config with fields changed by dotted path ("__" for ".")."""
    config = default_config()
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in fields.items()}
    )
    return config


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_is_itself_by_default(name):
    config = changed(algorithm=name)
    check(config)
    own = {"cdmsgd": "heavy_ball", "cdadam": "dadam", "dimat": "adam", "d2": "sgd"}
    fields = resolved(fields_of(config))
    if name in own:
        assert fields["optimizer.name"] == own[name]
    lossless = COMPRESSORS[fields["compression.name"]]().lossless
    assert lossless == (name not in ("choco", "compcga"))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_a_learning_rate_that_suits_its_optimizer(name):
    fields = resolved(fields_of(changed(algorithm=name)))
    own = OPTIMIZERS[ALGORITHMS[name].optimizer].learning_rate
    assert fields["optimizer.learning_rate"] == own > 0
    # Agents pre-train with Adam.
    assert fields["pretrain.optimizer.learning_rate"] == 1e-3
    given = changed(algorithm=name, optimizer__learning_rate=0.7)
    assert resolved(fields_of(given))["optimizer.learning_rate"] == 0.7


def test_every_optimizer_has_a_learning_rate():
    rates = {name: record.learning_rate for name, record in OPTIMIZERS.items()}
    assert all(rate > 0 for rate in rates.values())
    config = changed(pretrain__optimizer__name="sgd", optimizer__name="momentum")
    fields = resolved(fields_of(config))
    assert fields["pretrain.optimizer.learning_rate"] == rates["sgd"]
    assert fields["optimizer.learning_rate"] == rates["momentum"]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_bundled_configs_give_an_algorithm_a_rate_for_its_optimizer(name):
    adaptive = ALGORITHMS[name].optimizer in ("adam", "dadam")
    for config in (
        quickstart.get_config(name),
        cifar100_resnet20.get_config(f"paper-{name}"),
    ):
        rate = resolved(fields_of(config))["optimizer.learning_rate"]
        assert rate <= 0.01 if adaptive else rate >= 0.01


def test_between_merges_the_inner_algorithms_optimizer_is_the_default():
    config = changed(algorithm="dimat", merge__inner="cdmsgd")
    check(config)
    assert resolved(fields_of(config))["optimizer.name"] == "heavy_ball"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"algorithm": "cdsdg"},
            "config.algorithm is 'cdsdg'; .* did you mean 'cdsgd'",
        ),
        (
            {"algorithm": "cdmsgd", "optimizer__name": "adam"},
            "config.optimizer.name is 'adam', but cdmsgd is defined with 'heavy_ball' ",
        ),
        ({"algorithm": "d2", "optimizer__name": "momentum"}, "d2 .* with 'sgd' only"),
        (
            {"algorithm": "wa", "merge__inner": "cdadam", "optimizer__name": "sgd"},
            "wa with cdadam between merges is defined with 'dadam' only",
        ),
        (
            {"algorithm": "cdsgd", "merge__inner": "sgp"},
            "config.merge.inner is 'sgp', but algorithm='cdsgd' does not read "
            "it; it is "
            "read where algorithm is one of 'dimat', 'wm', 'wa'",
        ),
        ({"merge__inner": "fedavg"}, "config.merge.inner is 'fedavg'; "),
        (
            {"algorithm": "sgp", "gossip__order": "adapt_then_combine"},
            "config.gossip.order is 'adapt_then_combine', but algorithm='sgp' does not "
            "read it; it is read where algorithm is 'cdsgd'",
        ),
        ({"algorithm": "cdsgd", "gossip__order": "both"}, "config.gossip.order is"),
        (
            {"algorithm": "dimat", "gossip__momentum": 0.5},
            "algorithm='dimat' and merge.inner='local' do not read it; it is "
            "read where "
            "algorithm is 'qgm' or merge.inner is 'qgm'",
        ),
        (
            {"algorithm": "cdsgd", "compression__name": "int8"},
            "config.compression.name is 'int8', but algorithm='cdsgd' does not "
            "read it; "
            "it is read where algorithm is one of 'compcga', 'choco', 'dimat', "
            "'wm', 'wa'",
        ),
        (
            {"compression__name": "top_k", "compression__fraction": 0.0},
            "config.compression.fraction is 0.0; it must be above 0 and at most 1",
        ),
        (
            {"compression__name": "int8", "compression__fraction": 0.5},
            "config.compression.fraction is 0.5, but compression.name='int8' "
            "does not r",
        ),
        (
            {"compression__name": "int8", "merge__opt_state": "merge"},
            r"config.merge: opt_state is 'merge', but the optimizer's moments do not "
            r"survive compression \(.*\); it must be 'keep' or 'reset'",
        ),
        ({"graph__degree": 4}, "config.graph.degree is 4, but topology='ring' does"),
        (
            {"graph__file": "W.npy"},
            "config.graph.file is 'W.npy', but topology='ring' and mixing='uniform' do "
            "not read it; it is read where topology is 'file' or mixing is 'file'",
        ),
        (
            {"data__alpha": 0.1},
            "config.data.alpha is 0.1, but data.partition='iid' and "
            "pretrain.partition='' do not read it",
        ),
        (
            {"data__partition": "dirichlet", "data__classes": 3},
            "config.data.classes is 3",
        ),
        ({"pretrain__partition": "by_clas"}, "config.pretrain.partition is 'by_clas'"),
        ({"topology": "file"}, "config.graph.file is empty"),
        (
            {"algorithm": "fedavg", "faults__edge_loss": 0.1},
            "config.faults.edge_loss is 0.1, but algorithm='fedavg' does not read it",
        ),
        (
            {"algorithm": "centralized", "faults__dropout": 0.1},
            "faults.dropout is 0.1, but algorithm='centralized' does not read it$",
        ),
        (
            {"model__name": "mlp", "batch_norm__samples": 10},
            "config.batch_norm.samples is 10, but nothing reads it: mlp has no Batch",
        ),
        (
            {"algorithm": "cdsgd", "model__norm": "group", "batch_norm__data": "own"},
            "config.batch_norm.data is 'own', but nothing reads it: resnet20 has "
            "no Batch",
        ),
        (
            {"model__name": "mlp", "batch_norm__when": "evaluation"},
            "config.batch_norm.when is 'evaluation', but nothing reads it: mlp has no",
        ),
        (
            {"batch_norm__data": "none", "batch_norm__when": "evaluation"},
            "config.batch_norm.when is 'evaluation', but batch_norm.data='none' does",
        ),
        (
            {"algorithm": "wa", "merge__batch_size": 10},
            "config.merge.batch_size is 10, but nothing reads merge.match_data",
        ),
        ({"algorithm": "fedavg", "topology": "hypercube"}, "config.topology is 'hyper"),
        ({"algorithm": "local", "mixing": "lazy"}, "config.mixing is 'lazy', but"),
        ({"algorithm": "centralized", "topology": "star"}, "config.topology is 'star'"),
        ({"algorithm": "centralized", "agents": 7}, "config.agents is 7, but"),
        ({"algorithm": "centralized", "init": "same"}, "config.init is 'same', but"),
        (
            {"algorithm": "centralized", "data__partition": "by_class"},
            "config.data.partition is 'by_class', but",
        ),
        (
            {"pretrain__epochs": 0, "pretrain__optimizer__learning_rate": 0.1},
            "config.pretrain.optimizer.learning_rate is 0.1, but "
            "pretrain.epochs=0 does "
            "not read it; it is read where pretrain.epochs is not 0",
        ),
        (
            {"pretrain__epochs": 0, "pretrain__partition": "iid"},
            "pretrain.partition is",
        ),
        ({"pretrain__epochs": 0, "pretrain__cache_dir": "x"}, "cache_dir is 'x', but"),
        (
            {"algorithm": "cdsgd", "merge__stay": 0.1},
            "config.merge.stay is 0.1, but alg",
        ),
        ({"algorithm": "wa", "merge__frame": "joint"}, "config.merge.frame is 'joint'"),
        (
            {"algorithm": "wm", "merge__match_samples": 10},
            "config.merge.match_samples is 10, but nothing reads merge.match_data, "
            "which leads to it: algorithm='wm' does not read it; it is read where "
            "algorithm is 'dimat'$",
        ),
        (
            {"algorithm": "dimat", "merge__restarts": 3},
            "config.merge.restarts is 3, bu",
        ),
        (
            {"merge__match_data": "global", "merge__match_samples": 10},
            "config.merge.match_samples is 10, but merge.match_data='global' does not "
            "read it; it is read where merge.match_data is one of 'own', 'proxy'",
        ),
        (
            {"batch_norm__data": "none", "batch_norm__samples": 10},
            "config.batch_norm.samples is 10, but batch_norm.data='none' does not read",
        ),
        (
            {
                "algorithm": "wa",
                "batch_norm__data": "none",
                "batch_norm__batch_size": 10,
            },
            "config.batch_norm.batch_size is 10, but batch_norm.data='none' does not "
            "read it",
        ),
        (
            {"data__name": "digits", "data__dir": "x"},
            "config.data.dir is 'x', but data",
        ),
        (
            {"algorithm": "local", "mixing": "lazy", "topology": "star"},
            "config.topology is 'star', but .*; config.mixing is 'lazy', but ",
        ),
        (
            {"algorithm": "qgm", "optimizer__momentum": 0.5},
            "config.optimizer.momentum is 0.5, but optimizer.name='' does not read it",
        ),
        (
            {"optimizer__decay": 0.5},
            "decay is 0.5, but optimizer.schedule='constant' d",
        ),
        (
            {
                "pretrain__optimizer__name": "momentum",
                "pretrain__optimizer__momentum": 1,
            },
            "config.pretrain.optimizer.momentum is 1.0; it must be at least 0 "
            "and below",
        ),
        (
            {"faults__dropout": 1.0},
            "config.faults.dropout is 1.0; it must be at least 0",
        ),
        (
            {"faults__edge_loss": -0.1},
            "config.faults.edge_loss is -0.1; it must be at ",
        ),
        ({"faults__absences": "3:4-1"}, "config.faults: an absence is"),
        ({"faults__absences": "3-4"}, "expected agent:first-last or agent:first-"),
    ],
)
def test_what_would_be_ignored_or_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        check(changed(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"mixing": "file", "graph__file": "W.npy"},
        {"model__name": "mlp", "batch_norm__data": "none"},
        {"model__name": "mlp", "model__norm": "batch", "batch_norm__samples": 10},
        {"algorithm": "local", "batch_norm__when": "evaluation"},
        {"algorithm": "cdsgd", "batch_norm__data": "own", "batch_norm__samples": 10},
        {"topology": "random_regular", "graph__degree": 4},
        {"data__partition": "dirichlet", "data__alpha": 0.1},
        {
            "data__partition": "by_class",
            "pretrain__partition": "quantity_skew",
            "data__alpha": 0.1,
        },
        {"algorithm": "cdsgd", "gossip__order": "adapt_then_combine"},
        {"merge__inner": "choco", "gossip__gamma": 0.2, "compression__name": "int8"},
    ],
)
def test_what_is_read_may_be_changed(fields):
    check(changed(**fields))


def test_absences_are_written_as_rounds_from_first_to_last():
    assert parse_absences("") == ()
    found = parse_absences("3:1-4, 0:6-")
    assert found == (Absence(3, 1, 5), Absence(0, 6, None))
