"""What `config.model` asks for, and what is refused before any data is loaded."""

from typing import Any

import jax.numpy as jnp
import pytest

from dimat_jax.arguments import ConfigError, model_arguments
from dimat_jax.config import check, default_config
from dimat_jax.models import MODELS
from dimat_jax.models.resnet import ResNet


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
