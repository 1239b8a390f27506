"""The training benchmark measures all of its sides, and its plain models are equal."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dimat_jax._bench import _plain_flax, _plain_torch, train
from dimat_jax._bench._plain import Plain
from dimat_jax._bench._worker import Unavailable
from dimat_jax.cli._bundled import load_config
from dimat_jax.models import MODELS, classifier

ROOT = Path(__file__).parents[2]
MLP = Plain(0, (16, 8), 10, (8, 8, 1), 20)
RESNET = Plain(3, (4, 8, 16), 10, (8, 8, 3), 20)


def bench(tmp_path: Path, *arguments: str) -> tuple[dict, str]:
    out = tmp_path / "bench.json"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.bench",
            "train",
            f"--out={out}",
            *arguments,
        ],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


@pytest.mark.slow
def test_every_side_is_measured_and_every_pair_compared(tmp_path):
    config = "--config=configs/quickstart.py"
    result, text = bench(tmp_path, config, "--repeats=2", "--steps=2", "--full")
    named = {name for pair in train.PAIRS for name in pair}
    assert named < result["sides"].keys()
    for name, side in result["sides"].items():
        assert len(side["seconds"]) == 2 and min(side["seconds"]) > 0
        assert side["first_call_seconds"] > 0
        # A process that has loaded JAX or PyTorch holds more than 50 MiB.
        assert side["host_peak_bytes"] > 50 * 2**20
        if not name.startswith(train.MATMUL):
            assert side["images_per_second"] > 0 and side["utilisation"] > 0
    assert len(result["ratios"]) == len(train.PAIRS)
    for pair, values in result["ratios"].items():
        assert 0 < values["least"] <= values["median"] <= values["most"]
        assert f"| {pair} " in text
    # The MLP has 64 x 128 + 128 x 128 + 128 x 10 weights. The gradient takes three
    # products for each, less that of the first layer's inputs; a product is 2 FLOPs.
    products = 3 * (64 * 128 + 128 * 128 + 128 * 10) - 64 * 128
    assert result["flops_per_image"] == pytest.approx(2 * products, rel=0.1)


@pytest.mark.slow
def test_an_algorithm_with_a_single_agent_is_measured(tmp_path):
    config = "--config=quickstart:centralized"
    result, _ = bench(tmp_path, config, "--repeats=1", "--steps=1")
    assert result["agents"] == 1
    together = result["sides"][train.AGENTS_TOGETHER]["step_seconds"]
    alone = result["sides"][train.ONE_AGENT]["step_seconds"]
    ratio = result["ratios"][f"{train.AGENTS_TOGETHER} / {train.ONE_AGENT}"]
    assert ratio["median"] == pytest.approx(alone / together)


@pytest.mark.every_nth(2)
@pytest.mark.parametrize("plain", [MLP, RESNET], ids=["mlp", "resnet"])
def test_the_plain_models_have_the_weights_of_the_package_s_own(plain):
    if plain.blocks:
        own = MODELS["resnet20"](n_classes=10, width=0.25)
    else:
        own = MODELS["mlp"](n_classes=10, hidden=(16, 8))
    image = np.zeros((1, *plain.image), np.float32)
    variables = classifier.init(own, jax.random.key(0), image)
    flax = _plain_flax.build(plain).init(jax.random.key(0), image, False)
    torch = _plain_torch.build(plain)
    weights = sorted(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert sorted(x.size for x in jax.tree.leaves(flax["params"])) == weights
    assert sorted(x.numel() for x in torch.parameters()) == weights


@pytest.mark.every_nth(2)
@pytest.mark.parametrize("plain", [MLP, RESNET], ids=["mlp", "resnet"])
def test_the_plain_flax_loop_learns_its_batches(plain):
    model, tx = _plain_flax.build(plain), optax.adam(1e-2)
    images, labels = (jnp.asarray(x[0]) for x in plain.batches(1))
    variables = model.init(jax.random.key(0), images, False)
    params = variables["params"]
    state = (params, variables.get("batch_stats", {}), tx.init(params))
    step = _plain_flax.make_step(model, tx)
    losses = []
    for _ in range(30):
        *state, loss = step(*state, images, labels)
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2


@pytest.mark.slow
@pytest.mark.parametrize("plain", [MLP, RESNET], ids=["mlp", "resnet"])
@pytest.mark.parametrize("memory_format", ["contiguous_format", "channels_last"])
def test_the_plain_torch_loop_learns_its_batches(plain, memory_format):
    fields = json.loads(json.dumps(plain._replace(learning_rate=1e-2)._asdict()))
    program = _plain_torch.torch_loop(fields, 2, memory_format)
    first = program.call()["losses"]
    last = [program.call()["losses"] for _ in range(30)][-1]
    assert len(first) == 2 and math.fsum(last) < math.fsum(first) / 2


def test_without_pytorch_the_loop_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(Unavailable, match=r"pip install 'dimat_jax\[torch\]'"):
        _plain_torch.torch_loop(MLP._asdict(), 1, "channels_last")


def test_a_model_without_a_plain_loop_is_named():
    config = load_config("cifar100_resnet20:bench")
    assert train._plain(config) == Plain(3, (16, 32, 64), 100, (32, 32, 3), 100)
    config.model.norm = "layer"
    assert "resnet20" in str(train._plain(config))
