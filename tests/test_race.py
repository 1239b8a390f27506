"""The layout of a run: chosen by a rule or by a race, stored, and read on resume."""

import json
from collections.abc import Callable

import jax
import numpy as np
import pytest

from dimat_jax import _race, train
from dimat_jax._layout_choice import LayoutChoice
from dimat_jax._layouts import PlacementError, automatic
from dimat_jax._race import candidates, race, racers
from dimat_jax.errors import UserError
from dimat_jax.experiment import Experiment
from tests.test_train import quiet, small, without_times

VMAP, CHUNKS, IM2COL = (
    LayoutChoice("vmap", 1, ""),
    LayoutChoice("chunks", 4, ""),
    LayoutChoice("im2col", 1, ""),
)


def tiny(**changes):
    """Makes the config of a run of MLPs that takes a second."""
    return small("local", **{"rounds": 1, "pretrain__epochs": 1, **changes})


def convolutional(**changes):
    """Makes the same for a model with convolutions, which takes minutes."""
    return tiny(**{"model__name": "vgg11", **changes})


# The race =============================================================================


def test_the_fastest_layout_wins_and_its_reason_holds_all_times():
    seconds = {VMAP: 0.5, CHUNKS: 0.01, IM2COL: 0.02}
    winner = race(list(seconds), seconds.__getitem__, "a GPU")
    assert winner[:2] == ("chunks", 4)
    assert winner.reason == (
        "a training step takes chunks of 4 10 ms, im2col 20 ms, vmap 500 ms"
    )


@pytest.mark.parametrize(
    "error", [PlacementError, jax.errors.JaxRuntimeError], ids=["refused", "memory"]
)
def test_a_layout_that_fails_drops_out_with_a_note(error):
    def seconds(choice: LayoutChoice) -> float:
        if choice == VMAP:
            raise error("RESOURCE_EXHAUSTED: out of memory\nand a trace")
        return 1.0

    winner = race([VMAP, IM2COL], seconds, "a GPU")
    assert winner.batching == "im2col"
    assert winner.reason == (
        "a training step takes im2col 1000 ms, vmap fails (RESOURCE_EXHAUSTED: out of "
        "memory)"
    )


def test_if_every_layout_fails_one_message_says_so():
    def seconds(choice: LayoutChoice) -> float:
        raise PlacementError(f"{choice.batching} is too large")

    message = r"no layout runs on a GPU: vmap fails \(vmap is too large\); im2col fails"
    with pytest.raises(PlacementError, match=message):
        race([VMAP, IM2COL], seconds, "a GPU")


def test_an_error_of_the_program_ends_the_race():
    def seconds(choice: LayoutChoice) -> float:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        race([VMAP, IM2COL], seconds, "a GPU")


@pytest.mark.parametrize("layout", ["vmap", "chunks"])
def test_a_step_of_a_real_run_is_timed(layout):
    experiment = Experiment(tiny(), LayoutChoice(layout, 2, ""))
    assert experiment.placement.batching == layout
    assert _race._step_seconds(experiment) > 0


# The rule =============================================================================


def test_on_a_cpu_convolutions_run_in_chunks_and_other_models_batched():
    for config, batching in ((convolutional(), "chunks"), (small("local"), "vmap")):
        experiment = Experiment(config)
        assert experiment.layout.batching == experiment.placement.batching == batching
        assert "convolutions on cpu" in experiment.layout.reason
        assert candidates(experiment) == [experiment.layout]


@pytest.mark.parametrize(
    ("platform", "convolves", "layout"),
    [
        ("gpu", True, "grouped"),
        ("gpu", False, "vmap"),
        ("tpu", True, "vmap"),
        ("cpu", True, "chunks"),
        ("cpu", False, "vmap"),
    ],
)
def test_the_rule_names_a_layout_for_each_platform(platform, convolves, layout):
    assert automatic(platform, convolves) == layout


@pytest.mark.parametrize(("agents", "apart"), [(2, "unroll"), (9, "chunks of 4")])
def test_the_layouts_that_race_include_the_rule_and_compile_in_bounded_time(
    agents, apart
):
    on_gpu = [choice.name for choice in racers("gpu", agents)]
    assert on_gpu == [automatic("gpu"), apart]
    on_tpu = [choice.name for choice in racers("tpu", agents)]
    assert automatic("tpu") in on_tpu and apart in on_tpu


def test_the_config_overrides_the_choice():
    config = convolutional(placement__batching="chunks", placement__chunk=2)
    experiment = Experiment(config)
    assert experiment.layout[:3] == ("chunks", 2, "placement.batching says so")
    assert experiment.placement.chunk == 2


def test_a_chunk_is_an_option_of_chunks_alone():
    with pytest.raises(UserError, match="placement.chunk"):
        Experiment(convolutional(placement__batching="vmap", placement__chunk=2))


# The run ==============================================================================


@pytest.fixture
def racing(monkeypatch, tmp_path) -> list[str]:
    """Lets runs race on the CPU, with a clock of their own.

    Returns:
        the layouts that were timed.
    """
    timed = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_race, "candidates", lambda experiment: [VMAP, CHUNKS, IM2COL])
    monkeypatch.setattr(_race, "_LONG", 1)

    def seconds(experiment: Experiment) -> float:
        timed.append(experiment.layout.batching)
        if experiment.layout.batching == "vmap":
            raise PlacementError("no such kernel")
        return {"chunks": 0.2, "im2col": 0.1}[experiment.layout.batching]

    monkeypatch.setattr(_race, "_step_seconds", seconds)
    return timed


def logged(config, workdir) -> tuple[dict, list[str]]:
    lines: list[str] = []
    return train.run(config, workdir, lines.append), lines


@pytest.mark.slow
def test_a_run_says_what_it_has_chosen_and_another_one_needs_no_race(racing, tmp_path):
    summary, lines = logged(tiny(), tmp_path / "one")
    assert racing == ["vmap", "chunks", "im2col"]
    reason = (
        "a training step takes im2col 100 ms, chunks of 4 200 ms, vmap fails (no such "
        "kernel)"
    )
    assert f"agents on a device run as im2col: {reason}" in lines
    chosen = {"batching": "im2col", "chunk": 1, "reason": reason, "device": "cpu"}
    assert summary["layout"] == chosen
    assert json.loads((tmp_path / "one" / "layout.json").read_text()) == chosen

    summary, _ = logged(tiny(seed=1), tmp_path / "two")
    assert racing == ["vmap", "chunks", "im2col"]
    assert summary["layout"] == chosen
    # Another batch size is a run of another kind.
    logged(tiny(batch_size=10), tmp_path / "three")
    assert len(racing) == 6


@pytest.mark.slow
def test_a_short_run_follows_the_rule_unless_a_long_one_has_raced(
    racing, monkeypatch, tmp_path
):
    steps = Experiment(tiny()).pretrain_steps + Experiment(tiny()).local_steps
    monkeypatch.setattr(_race, "_LONG", steps + 1)
    summary, _ = logged(tiny(), tmp_path / "short")
    assert racing == [] and summary["layout"]["batching"] == "vmap"

    monkeypatch.setattr(_race, "_LONG", steps)
    logged(tiny(), tmp_path / "long")
    assert racing == ["vmap", "chunks", "im2col"]
    monkeypatch.setattr(_race, "_LONG", steps + 1)
    summary, _ = logged(tiny(seed=1), tmp_path / "again")
    assert len(racing) == 3 and summary["layout"]["batching"] == "im2col"


@pytest.mark.slow
def test_a_cache_that_cannot_be_read_is_measured_again(racing, tmp_path):
    logged(tiny(), tmp_path / "one")
    (stored,) = (tmp_path / "cache" / "dimat_jax" / "layouts").iterdir()
    stored.write_text("{")
    logged(tiny(), tmp_path / "two")
    assert len(racing) == 6
    assert json.loads(stored.read_text())["batching"] == "im2col"


class Killed(Exception):
    pass


def killed_after(n_lines: int) -> Callable[[str], None]:
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        if len(lines) == n_lines:
            raise Killed

    return log


@pytest.mark.slow
def test_a_run_that_resumes_keeps_its_layout_and_its_results(monkeypatch, tmp_path):
    config = tiny(rounds=2)
    monkeypatch.setattr(_race, "candidates", lambda experiment: [VMAP, IM2COL])
    monkeypatch.setattr(_race, "_LONG", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seconds = {"vmap": 0.2, "im2col": 0.1}
    monkeypatch.setattr(_race, "_step_seconds", lambda e: seconds[e.layout.batching])
    whole = train.run(config, tmp_path / "whole", quiet)
    assert whole["layout"]["batching"] == "im2col"

    log = killed_after(6)
    with pytest.raises(Killed):
        train.run(config, tmp_path / "killed", log)
    # Now another layout would win, and the cache is gone.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    seconds["im2col"] = 1.0
    resumed = train.run(config, tmp_path / "killed", quiet)
    assert resumed["layout"] == whole["layout"]
    (one,), (other,) = (
        without_times([run["last_trained"]]) for run in (whole, resumed)
    )
    np.testing.assert_equal(one, other)


def test_a_run_whose_layout_is_refused_ends_with_one_message(monkeypatch, tmp_path):
    def refuse(*args):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no such kernel")

    monkeypatch.setattr("dimat_jax._trainer.Trainer.train", refuse)
    config = tiny(placement__batching="grouped")
    with pytest.raises(
        UserError, match="the layout grouped does not run on cpu: UNIMP"
    ):
        train.run(config, tmp_path / "run", quiet)
