"""Tests the cost model of `dimat bench scale` on made-up times, and by hand."""

import json

import numpy as np
import pytest

from configs import quickstart
from dimat_jax._bench import _paper, _timing, scale
from dimat_jax._bench._hardware import Hardware
from dimat_jax._bench._paper import Fit, Merge, Model, Sizes
from dimat_jax._bench._record import Settings
from dimat_jax._bench._worker import made, timed
from dimat_jax.algorithms._traffic import MatchingSizes
from dimat_jax.topology import TOPOLOGIES

# A gigabyte takes one second, and a message one millisecond.
HARDWARE = Hardware(bandwidth=8.0, latency=1.0)
NO_MATCHING = MatchingSizes(perms=0, scores=0, weights=0)
GIGABYTE = 10**9
STEP = Sizes({"params": GIGABYTE}, {}, NO_MATCHING)
ROUND = Sizes({}, {"params": GIGABYTE}, MatchingSizes(4, 40, 400))
NOTHING = Fit(0.0, 0.0)


def test_a_fit_finds_the_constant_and_the_share():
    found = _paper.fit([1, 2, 5, 10], [3.0 + 2 * n for n in (1, 2, 5, 10)])
    assert found == pytest.approx((3, 2))
    assert found.seconds(40) == pytest.approx(83)
    # A time that shrinks is fitted by a constant: no share is negative.
    assert _paper.fit([1, 2, 4], [4.0, 3.0, 2.0]).per_unit == 0


@pytest.mark.parametrize(
    ("topology", "neighbours"), [("ring", 2), ("exponential", 6), ("star", 39)]
)
def test_the_busiest_device_decides_how_long_an_exchange_takes(topology, neighbours):
    by_link = GIGABYTE * TOPOLOGIES[topology](40).astype(np.int64)
    seconds = HARDWARE.exchange_seconds(by_link)
    assert seconds == pytest.approx(neighbours * (1 + 0.001))


def test_agents_on_one_device_need_no_network():
    by_link = GIGABYTE * TOPOLOGIES["ring"](10).astype(np.int64)
    # Five devices form a ring, and one link goes in each direction.
    shared = HARDWARE._replace(agents_per_device=2).exchange_seconds(by_link)
    assert shared == pytest.approx(2 * (1 + 0.001))
    # The last of four devices has a single agent.
    uneven = HARDWARE._replace(agents_per_device=3).exchange_seconds(by_link)
    assert uneven == pytest.approx(2 * (1 + 0.001))
    assert HARDWARE._replace(agents_per_device=10).exchange_seconds(by_link) == 0


def test_merges_are_predicted_from_smaller_ones():
    def seconds(frame: str, topology: str, n: int) -> dict[str, float]:
        edges = int(TOPOLOGIES[topology](n).sum())
        # All edges are matched up to 9 agents, and then 4 pairs for each.
        pairs = edges // 2 if frame == "own" or n < 10 else 4 * n
        mixed = edges if frame == "own" else n
        return {"activations": n, "assignment": 0.5 * pairs, "mix": 0.1 * mixed}

    for frame in ("own", "joint"):
        measured = [
            Merge(frame, "fully_connected", n, seconds(frame, "fully_connected", n))
            for n in (3, 5, 8)
        ]
        fits = _paper.fit_merges(measured)[frame]
        for topology in ("fully_connected", "ring"):
            expected = seconds(frame, topology, 20)
            if (frame, topology) == ("joint", "ring"):
                expected["assignment"] = 0.5 * 20
            to_do = _paper.work(frame, TOPOLOGIES[topology](20))
            found = _paper.merge_seconds(fits, frame, to_do)
            assert found == pytest.approx(sum(expected.values()), rel=1e-6)


def model(**changes) -> Model:
    fits = {frame: {"mix": NOTHING} for frame in ("own", "joint", "reference")}
    still = Model(NOTHING, NOTHING, fits, 5, STEP, ROUND)
    return still._replace(**changes)


def test_a_round_of_gossip_exchanges_with_every_step():
    found = _paper.predict(model(), HARDWARE, "ring", 64, None)
    assert found["compute_seconds"] == 0
    assert found["exchange_seconds"] == pytest.approx(5 * 2 * 1.001)
    assert found["bytes_per_round"] == 5 * 64 * 2 * GIGABYTE
    assert found["rounds_per_hour"] == pytest.approx(3600 / (10 * 1.001))


def test_faster_devices_compute_faster_and_full_ones_slower():
    steps = model(step=Fit(0.0, 2.0), gossip=Fit(0.0, 0.5))
    for hardware, seconds in (
        # Five steps of 2 s, and of two neighbours that are averaged in .5 s each.
        (HARDWARE, 5 * (2 + 2 * 0.5)),
        (HARDWARE._replace(speed=10.0), 5 * (2 + 2 * 0.5) / 10),
        (HARDWARE._replace(agents_per_device=4), 4 * 5 * (2 + 2 * 0.5)),
    ):
        found = _paper.predict(steps, hardware, "ring", 64, None)
        assert found["compute_seconds"] == pytest.approx(seconds)


def test_the_bytes_of_a_merge_are_those_that_the_ledger_books():
    own = _paper.predict(model(), HARDWARE, "ring", 64, "own")
    assert own["bytes_per_round"] == 64 * 2 * GIGABYTE
    joint = _paper.predict(model(), HARDWARE, "ring", 64, "joint")
    # Permutations go to all neighbours, and scores and permutations along the tree.
    hops = sum(min(agent, 64 - agent) for agent in range(64))
    agreed = 4 * (64 * 2 + hops)
    assert joint["bytes_per_round"] >= own["bytes_per_round"] + agreed


def test_permutations_that_agree_are_found_on_one_machine():
    fits = {
        "joint": {"assignment": Fit(0.0, 1.0)},
        "own": {"assignment": Fit(0.0, 1.0)},
    }
    for frame, seconds in (("own", 63 / 2), ("joint", 64 * 4)):
        found = _paper.predict(
            model(merges=fits), HARDWARE, "fully_connected", 64, frame
        )
        assert found["compute_seconds"] == pytest.approx(seconds)


class WorkerHere(_timing._Worker):
    """A side that runs in this process, because a process takes seconds to start."""

    def __enter__(self) -> "WorkerHere":
        self._program = made(self.side.program, as_json(self.side.arguments))
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def wait(self) -> None:
        pass

    def call(self) -> None:
        self._replies.append(as_json(timed(self._program)))


def as_json(content):
    return json.loads(json.dumps(content))


@pytest.mark.slow
@pytest.mark.parametrize("here", [True, False])
def test_a_run_measures_fits_checks_and_predicts(monkeypatch, here):
    if here:
        monkeypatch.setattr(_timing, "_Worker", WorkerHere)
        # JAX has started in this process.
        monkeypatch.setattr("dimat_jax.placement.request_cpu_devices", lambda n: None)
    monkeypatch.setattr(scale, "COUNTS", (1, 2, 3))
    monkeypatch.setattr(scale, "FITTED_UP_TO", 2)
    monkeypatch.setattr(scale, "MERGES", (("joint", "fully_connected"),))
    monkeypatch.setattr(scale, "MANY", (64,))
    monkeypatch.setattr(scale, "PREDICTED", {"ring": (None, "joint")})
    config = quickstart.get_config()
    config.data.train_size = 100
    config.model.width = 0.25
    settings = Settings(repeats=1, steps=1, hardware=HARDWARE)
    result = scale.BENCH.run(config, settings)
    assert list(result["sides"]) == ["1", "2", "3"]
    assert list(result["sides"]["3"]) == ["steps", "gossip", "joint, fully_connected"]
    for sides in result["sides"].values():
        for timing in sides.values():
            assert timing["first_call_seconds"] > 0 and timing["host_peak_bytes"] > 0
    phases = result["model"]["merges"]["joint"].keys()
    assert phases >= {"activations", "assignment", "mix"}
    checked = [(row["agents"], row["side"]) for row in result["checks"]]
    assert checked == [(3, "steps"), (3, "joint, fully_connected")]
    gossip, merge = result["predictions"]
    assert gossip["exchange"] == "gossip" and merge["exchange"] == "merge, joint frame"
    # Gossip sends the params at every step, and a merge once and in addition the data
    # of the matching.
    steps = result["model"]["steps_per_round"]
    assert steps > 1
    params = gossip["bytes_per_round"] / (steps * 128)
    assert merge["bytes_per_round"] > 128 * params
    for row in result["predictions"]:
        assert row["rounds_per_hour"] > 0
    text = scale.BENCH.show(result)
    assert "rounds an hour" in text and "predicted" in text
    json.dumps(result)
