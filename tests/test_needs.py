"""Tests what a config is refused for, because it would need too much memory."""

import jax
import numpy as np
import pytest

from dimat_jax import _needs
from dimat_jax.config import ConfigError, default_config, fields_of, resolved
from dimat_jax.data.sources import make_dataset


def fields(**changes):
    config = default_config()
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return resolved(fields_of(config))


def test_a_model_must_fit_into_the_memory_of_the_cpu_but_not_of_a_gpu(monkeypatch):
    small = fields(data__name="digits", model__name="mlp", agents=2, batch_size=4)
    monkeypatch.setattr(_needs, "memory", lambda: 2**20)
    _needs.check_model({**small, "model.width": 0.25})
    with pytest.raises(ConfigError, match="2 agent.* mlp .* would need at least"):
        _needs.check_model({**small, "model.width": 10.0})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    _needs.check_model({**small, "model.width": 10.0})


def test_a_graph_must_fit_into_the_memory_of_the_host(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_needs, "memory", lambda: 2**20)
    _needs.check_graph_and_steps(fields(agents=100))
    with pytest.raises(ConfigError, match="config.agents is 1000: the graph"):
        _needs.check_graph_and_steps(fields(agents=1000))


def test_what_a_source_declares_is_checked_before_its_data_are_loaded():
    read = []

    def read_data(name, directory, cache_dir):
        read.append(name)
        return make_dataset("npz", (np.zeros((4, 6)), np.array([0.5, 1.0, 1.5, 2.0])))

    def load(name, **changes):
        config = default_config()
        config.update_from_flattened_dict({"data.name": name, **changes})
        _needs.load_checked(config, resolved(fields_of(config)), read_data)

    with pytest.raises(ConfigError, match="the inputs of text are no images"):
        load("text", **{"augmentation.flip": True})
    assert not read
    # Nothing is declared of an .npz file.
    with pytest.raises(ConfigError, match="those of npz are numbers"):
        load("npz")
    assert read == ["npz"]
