"""A server that draws a fixed number of agents for each round."""

import jax
import numpy as np
import pytest

from configs import quickstart
from dimat_jax._metrics import read_evaluations
from dimat_jax.config import ConfigError, check, drop_unread
from dimat_jax.errors import UserError
from dimat_jax.experiment import Experiment
from dimat_jax.ledger import Ledger, Messages
from dimat_jax.mixing import uniform
from dimat_jax.network import Absence, Faults, Links
from dimat_jax.topology import TOPOLOGIES
from dimat_jax.train import run
from dimat_jax.tree import nbytes
from tests.algorithms.cases import Case, case_of
from tests.algorithms.problems import N_AGENTS
from tests.algorithms.scenarios import Scenario
from tests.algorithms.test_second_implementation import LEAST_SQUARES
from tests.algorithms.twofold import First, Variant, assert_agree
from tests.reference import servers

DRAWN = 2


def links_of(n_agents: int, **options) -> Links:
    return Links(TOPOLOGIES["disconnected"](n_agents), uniform, Faults(**options))


def test_every_round_has_exactly_so_many_agents_and_the_seed_says_which():
    links = links_of(20, sampled=6, seed=3)
    drawn = np.stack([links.present(number) for number in range(1, 301)])
    assert (drawn.sum(axis=1) == 6).all()
    # Every agent is drawn about equally often: three standard deviations are 0.08.
    np.testing.assert_allclose(drawn.mean(axis=0), 6 / 20, atol=0.1)
    again = [links_of(20, sampled=6, seed=3).present(number) for number in (7, 120)]
    np.testing.assert_array_equal(again, drawn[[6, 119]])
    others = [links_of(20, sampled=6, seed=4).present(n) for n in range(1, 301)]
    assert (np.stack(others) != drawn).any(axis=1).sum() > 250
    assert links.present(0).all() and links.changes


def test_agents_are_drawn_from_those_that_are_not_absent():
    away = (Absence(0, 2), Absence(3, 2), Absence(1, 3))
    links = links_of(5, sampled=3, absences=away)
    np.testing.assert_array_equal(links.present(2), [False, True, True, False, True])
    # There are fewer than three left, and all of them take part.
    np.testing.assert_array_equal(links.present(3), [False, False, True, False, True])


def test_more_agents_than_there_are_cannot_be_drawn():
    with pytest.raises(
        UserError, match=r"server.sampled is 6, but there are only 5 ag"
    ):
        links_of(5, sampled=6)
    with pytest.raises(UserError, match=r"sampled is -1; it must be at least 0"):
        links_of(5, sampled=-1)


VARIANTS = {
    "fedavg, momentum": Variant(
        Case("fedavg", server="momentum", options=(("sampled", DRAWN),)),
        {"server": lambda: servers.momentum(1.0, 0.9), "sampled": True},
    ),
    "scaffold": Variant(case_of("scaffold", sampled=DRAWN), {"sampled": True}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_both_implementations_agree_on_what_the_drawn_agents_do(name):
    """In the papers, the clients of a round are those that trained in it."""
    implementation = First(VARIANTS[name], LEAST_SQUARES)
    for seed in (1, 5):
        # An agent delivers what it has trained also if it is absent from then on.
        faults = Faults(sampled=DRAWN, seed=seed, absences=(Absence(1, 3),))
        scenario = Scenario("disconnected", faults=faults)
        there = [scenario.links("uniform").present(number) for number in (1, 2, 3)]
        assert len({tuple(present) for present in there}) == 3
        assert_agree(implementation, VARIANTS[name], LEAST_SQUARES, scenario)


def config(algorithm: str = "fedavg", **changes):
    fields = {
        "agents": N_AGENTS,
        "rounds": 3,
        "local_epochs": 0,
        "local_steps": 2,
        "batch_size": 10,
        "data.train_size": 60,
        "data.test_size": 50,
        "model.width": 0.25,
        "pretrain.epochs": 0,
        "server.sampled": DRAWN,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    config = quickstart.get_config(algorithm)
    config.update_from_flattened_dict(fields)
    return drop_unread(config)


@pytest.mark.parametrize("algorithm", ["cdsgd", "dimat"])
def test_algorithms_without_a_server_draw_no_agents(algorithm):
    other = config(algorithm)
    other.server.sampled = DRAWN
    with pytest.raises(ConfigError, match=r"server.sampled is 2, but .* not read it"):
        check(other)


def test_a_run_books_what_drawn_agents_send(tmp_path):
    whole = run(config(data__validation=0.2), tmp_path / "whole", lambda line: None)
    experiment = Experiment(config())
    variables = experiment.abstract_variables()
    size = nbytes(variables) // experiment.placement.slots
    # Two agents send and two receive in each of the three rounds.
    assert whole["bytes_sent_total"] == 3 * 2 * DRAWN * size
    assert whole["comm_rounds_total"] == pytest.approx(3 * DRAWN / N_AGENTS)
    rows = read_evaluations(tmp_path / "whole")
    for row in (row for row in rows if row["round"] > 0):
        drawn = np.array(row["present"])
        accuracy = np.array(row["test_accuracy"])[drawn]
        assert drawn.sum() == DRAWN
        assert row["test_accuracy_of_sampled"] == pytest.approx(accuracy.mean())
        validated = np.array(row["validation_accuracy"])[drawn].mean()
        assert row["validation_accuracy_of_sampled"] == pytest.approx(validated)
        if row["phase"] == "merged":
            assert np.ptp(accuracy) == 0  # they have the server's model


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_agents(tmp_path):
    whole = run(config(), tmp_path / "whole", log=lambda line: None)
    run(config(rounds=2), tmp_path / "part", log=lambda line: None)
    on = run(config(), tmp_path / "part", log=lambda line: None)
    assert on["test_accuracy"] == whole["test_accuracy"]
    assert on["present"] == whole["present"]
    assert on["bytes_sent_total"] == whole["bytes_sent_total"]


def test_a_server_answers_others_than_those_that_send():
    ledger, links = Ledger(4), links_of(4, sampled=1, seed=0)
    message = {"params": jax.ShapeDtypeStruct((8,), np.uint8)}
    senders = np.array([True, True, False, False])
    network = links.at_round(1, 4)
    ledger.record_round(Messages(server=message), network, links.edges, None, senders)
    assert ledger.by_kind == {"params": (2 + 1) * 8}
    assert ledger.server_bytes == ledger.bytes_sent
