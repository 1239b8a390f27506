"""What configs ask for, and what is refused before any data is loaded."""

from typing import Any

import jax.numpy as jnp
import pytest

from dimat_jax.algorithms import ALGORITHMS
from dimat_jax.arguments import (
    ConfigError,
    absences,
    compressor,
    faults,
    model_arguments,
    optimizer_name,
)
from dimat_jax.config import check, default_config
from dimat_jax.models import MODELS
from dimat_jax.models.resnet import ResNet
from dimat_jax.network import Absence


def config_of(**fields: Any):
    config = default_config()
    config.model.update(fields)
    return config


def model_of(**fields: Any):
    config = config_of(**fields)
    check(config)
    return MODELS[config.model.name](n_classes=7, **model_arguments(config))


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
            "config.model.stem is 'cifar', but 'mlp' has none; it can be given: "
            "dtype, norm, width$",
        ),
        ({"name": "vit", "norm": "batch"}, "norm .* it can be given: dtype, width$"),
        ({"name": "resnet20", "stem": "imagenet"}, "'resnet20' has none"),
        ({"name": "resnet50", "stem": "none"}, "config.model: stem .* cifar, imagenet"),
        ({"name": "resnet20", "norm": "none"}, "config.model: norm .* batch, group"),
        ({"width": 0.3}, "config.model: width 0.3 makes 4.8 units of 16"),
        ({"width": 0}, "config.model: width is 0; it must be positive"),
        ({"width": float("nan")}, "config.model: width is nan"),
        ({"name": "resnet21"}, "config.model.name is 'resnet21'; allowed: .*vgg16"),
        ({"dtype": "float16"}, "config.model.dtype is 'float16'"),
    ],
)
def test_a_model_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        check(config_of(**fields))


def changed(**fields: Any):
    """The default config with fields changed by dotted path ("__" for ".")."""
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
    if name in own:
        assert optimizer_name(config) == own[name]
    assert compressor(config).lossless == (name not in ("choco", "compcga"))


def test_between_merges_the_inner_algorithms_optimizer_is_the_default():
    config = changed(algorithm="dimat", merge__inner="cdmsgd")
    check(config)
    assert optimizer_name(config) == "heavy_ball"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"algorithm": "cdsdg"},
            "config.algorithm is 'cdsdg'; .* did you mean 'cdsgd'",
        ),
        (
            {"algorithm": "cdmsgd", "optimizer__name": "adam"},
            "config.optimizer.name is 'adam', but cdmsgd is what it is with 'heavy_b",
        ),
        ({"algorithm": "d2", "optimizer__name": "momentum"}, "d2 .* with 'sgd' only"),
        (
            {"algorithm": "wa", "merge__inner": "cdadam", "optimizer__name": "sgd"},
            "wa with cdadam between merges is what it is with 'dadam' only",
        ),
        ({"algorithm": "cdsgd", "merge__inner": "sgp"}, "cdsgd does not merge"),
        ({"merge__inner": "fedavg"}, "config.merge.inner is 'fedavg'; "),
        (
            {"algorithm": "sgp", "gossip__order": "adapt_then_combine"},
            "config.gossip.order is 'adapt_then_combine', but sgp does not read it",
        ),
        ({"algorithm": "cdsgd", "gossip__order": "both"}, "config.gossip.order is"),
        ({"algorithm": "dimat", "gossip__momentum": 0.5}, "dimat does not read it"),
        (
            {"algorithm": "cdsgd", "compression__name": "int8"},
            "cdsgd sends everything as it is; choco, compcga, dimat, wa, wm compress",
        ),
        (
            {"compression__name": "top_k", "compression__fraction": 0.0},
            "config.compression: the fraction that is kept",
        ),
        (
            {"compression__name": "int8", "compression__fraction": 0.5},
            "config.compression.fraction is 0.5, but int8 does not read it",
        ),
        (
            {"compression__name": "int8", "merge__opt_state": "merge"},
            "moments do not survive; it must be 'keep' or 'reset'",
        ),
        ({"graph__degree": 4}, "config.graph.degree is 4, but topology='ring' does"),
        ({"graph__file": "W.npy"}, "config.graph.file is 'W.npy', but topology='ring'"),
        ({"data__alpha": 0.1}, "config.data.alpha is 0.1, but partition='iid' does"),
        (
            {"data__partition": "dirichlet", "data__classes": 3},
            "config.data.classes is 3",
        ),
        ({"pretrain__partition": "by_clas"}, "config.pretrain.partition is 'by_clas'"),
        ({"topology": "file"}, "config.graph.file is empty"),
        (
            {"algorithm": "fedavg", "faults__edge_loss": 0.1},
            "fedavg sends nothing along the edges of a graph",
        ),
        ({"algorithm": "centralized", "faults__dropout": 0.1}, "centralized has none"),
        (
            {"algorithm": "qgm", "optimizer__momentum": 0.5},
            "config.optimizer.momentum is 0.5, but sgd with a constant schedule does",
        ),
        ({"optimizer__decay": 0.5}, "config.optimizer.decay is 0.5, but adam"),
        (
            {
                "pretrain__optimizer__name": "momentum",
                "pretrain__optimizer__momentum": 1,
            },
            "config.pretrain.optimizer.momentum is 1.0; it must be from 0 to below 1",
        ),
        ({"faults__dropout": 1.0}, "config.faults: dropout is a probability"),
        ({"faults__edge_loss": -0.1}, "config.faults: edge_loss is a probability"),
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
    assert absences("") == ()
    assert absences("3:1-4, 0:6-") == (Absence(3, 1, 5), Absence(0, 6, None))
    drawn = faults(changed(faults__absences="1:2-2", faults__dropout=0.2, seed=3))
    assert drawn.absences == (Absence(1, 2, 3),)
    assert (drawn.dropout, drawn.seed) == (0.2, 3)
