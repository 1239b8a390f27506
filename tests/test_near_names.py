"""Fields that do not exist lead to those that were probably meant."""

import copy
import pickle

import pytest

from dimat_jax._near_names import no_such_field, probably_meant
from dimat_jax.config import Config, default_config, field_paths
from dimat_jax.errors import nearest

MEANT = {
    # A misspelt name, or a misspelt section.
    "merge.evry": ["merge.every"],
    "optimiser.warmup": ["optimizer.warmup", "pretrain.optimizer.warmup"],
    "topolgy": ["topology"],
    "Batch-Size": ["batch_size", "eval.batch_size", "merge.batch_size"],
    # A missing section, or a wrong one.
    "momentum": ["server.momentum", "gossip.momentum", "optimizer.momentum"],
    "alpha": ["data.alpha"],
    "optimizer.alpha": ["data.alpha"],
    "eval_every": ["eval.every", "pretrain.eval_every"],
    # An abbreviation. The rate that every run reads comes first.
    "lr": [
        "optimizer.learning_rate",
        "server.learning_rate",
        "pretrain.optimizer.learning_rate",
    ],
    "optimizer.lr": ["optimizer.learning_rate", "pretrain.optimizer.learning_rate"],
    # Part of a name, and more than a name.
    "epochs": ["pretrain.epochs"],
    "n_agents": ["agents"],
    "rounds.x": ["rounds"],
    # Nothing at all.
    "zebra": [],
}


@pytest.mark.parametrize("path", MEANT)
def test_the_fields_that_were_probably_meant_are_found(path):
    assert probably_meant(path, field_paths()) == MEANT[path]


def test_fields_are_found_without_its_section_and_with_a_letter_too_many():
    known = field_paths()
    for path in known[::10]:
        name = path.rpartition(".")[2]
        if name not in known:
            same = [other for other in known if other.endswith(f".{name}")]
            assert set(probably_meant(name, known)) & set(same), path
        assert path in probably_meant(f"{path}x", known), path


def test_the_message_names_fields_the_fields_of_a_section_or_where_they_are_listed():
    known = ["rounds", "merge.every", "merge.unit"]
    assert no_such_field("roundz", known) == (
        "there is no field 'roundz'; did you mean 'rounds'?"
    )
    assert no_such_field("merge", known) == (
        "'merge' is a section, which has the fields merge.every, merge.unit"
    )
    assert no_such_field("zebra", known) == (
        "there is no field 'zebra'; `dimat show options` lists all fields"
    )


@pytest.mark.parametrize(
    "copied",
    [lambda config: config, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))],
    ids=["itself", "a copy", "a pickled copy"],
)
def test_a_config_says_which_field_was_meant_however_it_is_reached(copied):
    config = copied(default_config())
    message = "^there is no field 'merge.evry'; did you mean 'merge.every'\\?$"
    with pytest.raises(AttributeError, match=message):
        config.merge.evry = 2
    with pytest.raises(AttributeError, match=message):
        _ = config.merge.evry
    with pytest.raises(KeyError, match=message):
        config["merge.evry"]
    with pytest.raises(KeyError, match=message):
        config.update_from_flattened_dict({"rounds": 3, "merge.evry": 2})
    assert config.rounds == default_config().rounds
    expect_as_before(config)


def expect_as_before(config: Config) -> None:
    assert not hasattr(config, "nothing") and config.get("nothing", 3) == 3
    config.update_from_flattened_dict({"x.every": 7}, "x.merge.")  # of other configs
    config.update_from_flattened_dict({"x.merge.every": 7, "other": 1}, "x.")
    assert config.merge.every == 7


def test_choices_are_near_whatever_their_case_and_however_they_begin():
    assert nearest("RNG", ["ring", "path"]).endswith("; did you mean 'ring'?")
    assert nearest("fully", ["fully_connected", "full_range", "ring"]).endswith(
        "; did you mean 'fully_connected'?"
    )
    assert nearest("zebra", ["ring", "path"]) == "allowed: path, ring"
