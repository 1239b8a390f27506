"""The README's examples run, and the files that it names exist."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dimat_jax.models import MODELS
from dimat_jax.models._torch_import import to_torch
from dimat_jax.models.classifier import init

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_examples():
    assert EXAMPLES


@pytest.fixture
def torch_files(tmp_path, monkeypatch):
    """Two narrow ResNet-18s, as files that PyTorch could have written."""
    safetensors = pytest.importorskip("safetensors.numpy")
    model = MODELS["resnet18"](n_classes=3, width=1 / 16)
    start = jax.jit(partial(init, model))
    for seed, name in enumerate("ab"):
        variables = start(jax.random.key(seed), jnp.ones((1, 64, 64, 3)))
        state_dict = to_torch("resnet18", variables)
        safetensors.save_file(state_dict, tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_run(example, torch_files):
    if "equinox" in example:
        pytest.importorskip("equinox")
    exec(compile(example, "README.md", "exec"), {})


def test_the_files_it_names_exist():
    named = set(re.findall(r"(?:configs|experiments|docs|tests)/[\w/]+\.\w+", README))
    assert "configs/quickstart.py" in named
    missing = [path for path in sorted(named) if not (ROOT / path).exists()]
    assert not missing
