"""Tests what a config is refused for, because it would need too much memory."""

import jax
import pytest

from dimat_jax import _needs
from dimat_jax.config import ConfigError, default_config, fields_of, resolved


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
