"""A sweep's runs have names that say what they read, and no run hides another."""

import pytest

from dimat_jax.config import default_config
from dimat_jax.errors import UserError
from dimat_jax.sweeps import grid, over_seeds


def config(algorithm: str, **fields):
    """A config. In the names of fields, double underscores stand for dots."""
    made = default_config()
    made.algorithm = algorithm
    made.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in fields.items()}
    )
    return made


def test_a_config_has_a_run_for_each_choice_that_it_reads():
    configs = {"wa": config("wa"), "alone": config("local")}
    runs = grid({"data.partition": ("iid", "by_class"), "topology": ("star",)}, configs)
    assert list(runs) == [
        "iid-star-wa",
        "iid-alone",
        "by_class-star-wa",
        "by_class-alone",
    ]
    assert runs["iid-star-wa"].topology == "star"
    assert runs["iid-alone"].topology == "ring"  # the default
    assert configs["wa"].topology == "ring"


def test_an_option_that_changes_no_result_is_a_choice_too():
    runs = grid({"placement.batching": ("vmap", "unroll")}, {"l": config("local")})
    batching = {name: run.placement.batching for name, run in runs.items()}
    assert batching == {"vmap-l": "vmap", "unroll-l": "unroll"}


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        ("optimizer.name", "", "adam-l"),
        ("pretrain.partition", "", "iid-l"),
        ("data.cache_dir", "", "default-l"),
        ("merge.stay", 0.0, "0.0-l"),
    ],
)
def test_an_empty_value_has_a_name(path, value, name):
    assert list(grid({path: (value,)}, {"l": config("dimat")})) == [name]


def test_two_different_runs_of_one_name_are_refused():
    configs = {"b": config("wa", rounds=1), "ring-b": config("local", rounds=2)}
    with pytest.raises(UserError) as error:
        grid({"topology": ("ring",)}, configs)
    message = str(error.value)
    assert "two runs of the sweep get the name 'ring-b'" in message
    assert "algorithm" in message and "rounds" in message


def test_the_same_run_twice_is_one_run():
    choices = {"data.partition": ("iid",), "pretrain.partition": ("", "iid")}
    runs = grid(choices, {"l": config("local")})
    assert list(runs) == ["iid-iid-l"]


def test_a_sweep_may_mix_numbers_and_words():
    choices = {"merge.match_samples": (100, "enough")}
    runs = grid(choices, {"d": config("dimat")})
    found = {name: run.merge.match_samples for name, run in runs.items()}
    assert found == {"100-d": 100, "enough-d": "enough"}


def test_runs_are_repeated_with_seeds():
    runs = over_seeds({"wa": config("wa"), "alone": config("local")}, 3)
    assert {name: run.seed for name, run in runs.items()} == {
        f"{seed}-{name}": seed for seed in range(3) for name in ("wa", "alone")
    }
    assert runs["2-wa"].algorithm == "wa"


def test_runs_that_differ_in_their_seeds_are_not_repeated():
    configs = {"a": config("wa", seed=1), "b": config("wa", seed=4)}
    with pytest.raises(UserError, match=r"different seeds already: \[1, 4\]"):
        over_seeds(configs, 5)
    with pytest.raises(UserError, match="the number of seeds is 0"):
        over_seeds({"a": config("wa")}, 0)
