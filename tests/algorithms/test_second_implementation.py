"""Tests that every algorithm equals its second implementation, in every scenario.

The problem is least squares. See tests/algorithms/twofold.py for what is compared, and
tests/algorithms/test_second_merging.py for merging with matched units.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimat_jax.algorithms import ALGORITHMS
from dimat_jax.network import Links
from tests.algorithms.cases import Case, case_of
from tests.algorithms.problems import CONVEX, N_AGENTS, START, convex_variables
from tests.algorithms.scenarios import (
    INPUTS,
    SCENARIOS,
    SIZES,
    TARGETS,
    batches,
)
from tests.algorithms.twofold import (
    First,
    Problem,
    Variant,
    assert_agree,
    assert_same,
    merging,
    networks_of,
    second,
)
from tests.reference import gossip, messages, optimizers, servers
from tests.reference.algorithms import REFERENCES


def gradient(x: np.ndarray, examples: np.ndarray, weights: np.ndarray) -> np.ndarray:
    error = INPUTS[examples] @ x - TARGETS[examples]
    return INPUTS[examples].T @ (weights * error)


LEAST_SQUARES = Problem(
    CONVEX,
    START,
    convex_variables,
    INPUTS.astype(np.float32),
    TARGETS.astype(np.float32),
    gradient,
)


# The draws of compressors are the same for every message, and in both implementations.
UNIFORM, ORDER = np.array([0.3, 0.8, 0.55]), np.array([2, 0, 1])


@pytest.fixture(autouse=True)
def known_draws(monkeypatch):
    def uniform(key, shape):
        del key
        assert shape == UNIFORM.shape
        return jnp.asarray(UNIFORM, jnp.float32)

    def permutation(key, n):
        del key
        assert n == len(ORDER)
        return jnp.asarray(ORDER)

    monkeypatch.setattr(jax.random, "uniform", uniform)
    monkeypatch.setattr(jax.random, "permutation", permutation)


COMPRESSORS = {
    "float16": messages.float16,
    "bfloat16": messages.bfloat16,
    "sign": messages.sign,
    "top_k": messages.top_k,
    "int8": functools.partial(messages.int8, uniform=UNIFORM),
    "random_k": functools.partial(messages.random_k, order=ORDER),
}
GAMMA = 0.3


def choco(compressor: str, changing: bool = True) -> Variant:
    case = case_of("choco", compressor=compressor, gamma=GAMMA)
    options = {"compress": COMPRESSORS[compressor], "gamma": GAMMA}
    return Variant(case._replace(changing=changing), options)


def nesterov():
    return optimizers.HeavyBall(nesterov=True)


VARIANTS: dict[str, Variant] = {
    **{
        name: Variant(merging(name) if record.merges else Case(name))
        for name, record in ALGORITHMS.items()
        if name != "choco"
    },
    "local, plain mean": Variant(Case("local"), plain_mean=True),
    "fedavg, by examples": Variant(Case("fedavg", examples=SIZES), {"examples": SIZES}),
    "fedprox": Variant(case_of("fedprox", proximal=2.0), {"mu": 2.0}),
    "scaffold, half of the way": Variant(
        case_of("scaffold", learning_rate=0.5), {"eta": 0.5}
    ),
    "fedavg, momentum": Variant(
        Case("fedavg", server="momentum"),
        {"server": lambda: servers.momentum(1.0, 0.9)},
    ),
    **{
        f"fedavg, {name}": Variant(
            Case("fedavg", server=name),
            {
                "server": functools.partial(
                    servers.adaptive, name, 0.01, 0.9, 0.99, 1e-3
                )
            },
        )
        for name in ("adagrad", "adam", "yogi")
    },
    "fedavg with adam": Variant(Case("fedavg", "adam"), {"optimizer": optimizers.Adam}),
    "cdsgd, plain mean": Variant(Case("cdsgd"), plain_mean=True),
    "cdsgd, adapt then combine": Variant(
        case_of("cdsgd", order="adapt_then_combine"),
        reference=gossip.AdaptThenCombine,
    ),
    "cdmsgd, nesterov": Variant(
        Case("cdmsgd", of_optimizer=(("form", "nesterov"),)), {"optimizer": nesterov}
    ),
    "sgp with momentum": Variant(
        Case("sgp", "momentum"), {"optimizer": optimizers.Momentum}
    ),
    "qgm, momentum 0.5": Variant(case_of("qgm", momentum=0.5), {"beta": 0.5}),
    "cga with sgd": Variant(Case("cga", "sgd"), {"optimizer": optimizers.Sgd}),
    "compcga, top_k": Variant(
        Case("compcga", compressor="top_k"), {"compress": messages.top_k}
    ),
    "choco": choco("int8"),
    **{f"choco, {name}": choco(name) for name in ("sign", "top_k", "random_k")},
    "choco, reliable": choco("top_k", changing=False),
    "wa, adam is kept": Variant(merging("wa", opt_state="keep"), {"opt_state": "keep"}),
    "wa, adam is merged": Variant(
        merging("wa", opt_state="merge"), {"opt_state": "merge"}
    ),
    "wa, a heavy ball is merged": Variant(
        merging("wa", "local", "heavy_ball", opt_state="merge"),
        {"optimizer": optimizers.HeavyBall, "opt_state": "merge"},
    ),
    **{
        f"wa, {name}": Variant(
            merging("wa", "local", "sgd", name),
            {"optimizer": optimizers.Sgd, "compress": COMPRESSORS[name]},
        )
        for name in ("float16", "bfloat16", "int8")
    },
    "wa, gradient before the merge": Variant(
        merging("wa", gradient="before_merge"), {"before_merge": True}
    ),
    **{
        f"wa over {inner}": Variant(
            merging("wa", inner, opt_state="keep"),
            {"inner": REFERENCES[inner], "opt_state": "keep"},
        )
        for inner in ("sgp", "d2", "dsgt", "qgm")
    },
    "wa over choco": Variant(
        merging("wa", "choco", compressor="top_k", gamma=GAMMA),
        {
            "inner": functools.partial(
                messages.Choco, compress=messages.top_k, gamma=GAMMA
            ),
            "compress": messages.top_k,
        },
    ),
}
# CGA's quadratic program compiles slowly.
SLOW = {"cga with sgd", "compcga, top_k"}


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_algorithm_has_a_second_implementation(name):
    assert name in REFERENCES, f"add {name} to tests/reference/algorithms.py"
    assert name in VARIANTS


@functools.cache
def implementation(name: str) -> First:
    alone = VARIANTS[name].case.record.single
    start = START[:1] if alone else START
    return First(VARIANTS[name], LEAST_SQUARES._replace(start=start))


RUNS = [
    (name, scenario)
    for name, variant in VARIANTS.items()
    for scenario in SCENARIOS
    if not variant.case.record.single
    and variant.accepts(variant.fitting(SCENARIOS[scenario]))
]


@pytest.mark.every_nth(6)
@pytest.mark.parametrize(
    ("name", "scenario"),
    [
        pytest.param(*run, marks=[pytest.mark.slow] if run[0] in SLOW else [])
        for run in RUNS
    ],
)
def test_both_implementations_agree(name, scenario):
    variant = VARIANTS[name]
    fitting = variant.fitting(SCENARIOS[scenario])
    assert_agree(implementation(name), variant, LEAST_SQUARES, fitting)


@pytest.mark.parametrize("examples", ["full", "ragged"])
def test_both_implementations_of_one_agent_agree(examples):
    links = Links(np.zeros((1, 1), bool), np.ones((1, 1)))
    networks = networks_of(links, 1)
    one = [x[:, -1:] for x in batches(examples)]
    expected = second(
        VARIANTS["centralized"],
        LEAST_SQUARES._replace(start=START[:1]),
        networks,
        *one,
        adjacency=links.adjacency,
        rule="uniform",
    )
    assert_same(implementation("centralized").run(networks, *one), expected)


# The scenarios ========================================================================


# Some algorithms are not meant for a directed graph, and some need more than that.
DIRECTED = {name for name in SCENARIOS if "directed" in name}
CHANGING = {"agents drop out", "links fail", "the graph changes", "everything at once"}
REFUSED = {"d2": CHANGING, "relaysgd": {"the graph changes", "everything at once"}}


@pytest.mark.parametrize("name", sorted(ALGORITHMS.keys() - {"centralized"}))
def test_no_scenario_is_left_out_but_those_that_an_algorithm_refuses(name):
    ran = {scenario for other, scenario in RUNS if other == name}
    refused = REFUSED.get(name, set())
    assert ran - DIRECTED == SCENARIOS.keys() - DIRECTED - refused


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenarios_are_what_they_are_called(scenario):
    setting = SCENARIOS[scenario]
    links = setting.links(setting.mixing)
    rounds, steps = networks_of(links, N_AGENTS)
    faults = setting.faults
    present = np.stack([network.present for network in steps])
    assert present.any(axis=1).all()
    assert present.all() == (faults.dropout == 0)
    lost = [
        (setting.adjacency[t % len(setting.adjacency)] & ~now.active_edges)[
            np.ix_(now.present, now.present)
        ].any()
        for t, now in enumerate(steps)
    ]
    assert any(lost) == (faults.edge_loss > 0)
    assert any(network.active_edges.any() for network in rounds)
    _, mask = batches(setting.examples)
    full, empty = mask.all(axis=2), ~mask.any(axis=2)
    assert full.all() == (setting.examples in ("full", "repeat"))
    assert empty.any() == (setting.examples in ("ragged", "idle"))
