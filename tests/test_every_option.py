"""Every option is documented, checked, and refused where nothing reads it."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from absl import flags
from ml_collections import config_flags

from dimat_jax import options
from dimat_jax.algorithms import ALGORITHMS
from dimat_jax.config import (
    ROOT,
    ConfigError,
    check,
    copy_of,
    default_config,
    drop_unread,
    fields_of,
    fields_read,
    resolved,
    set_if_read,
    settle_overrides,
)
from dimat_jax.options import Option, OptionError, Record
from experiments.soak._mistakes import another_value

OPTIONS = {option.path: option for option in options.every(ROOT)}
READERS = options.readers(ROOT)
every_option = pytest.mark.parametrize("path", OPTIONS)


def test_a_default_config_holds_every_option_and_nothing_else():
    assert fields_of(default_config()) == {p: o.default for p, o in OPTIONS.items()}


@every_option
def test_every_option_is_documented(path):
    option = OPTIONS[path]
    assert option.meaning[0].isupper() and option.meaning.endswith(".")
    assert path in fields_of(default_config())
    for name, record in registry_of(option).items():
        assert record.meaning.endswith("."), f"{path}={name} has no summary"


@every_option
def test_every_default_is_allowed_where_the_option_is_read(path):
    option = OPTIONS[path]
    if path == "graph.file":  # a config that reads it has to set it
        with pytest.raises(options.OptionError, match="file is empty"):
            option.check(option.default)
    else:
        option.check(option.default)


@every_option
def test_every_option_is_one_object_wherever_it_is_read(path):
    """A second declaration of the same path would be a second default."""
    found = [o for o in walk(ROOT) if o.path == path]
    if not path.startswith("pretrain."):  # these are copies in another section
        assert all(o is found[0] for o in found)
    assert {(o.default, o.meaning, o.bounds) for o in found} == {
        (found[0].default, found[0].meaning, found[0].bounds)
    }


def registry_of(option: Option) -> Mapping[str, Record]:
    """The records that an option chooses among; none if it chooses among names."""
    return option.choices if isinstance(option.choices, Mapping) else {}


def walk(roots):
    for option in roots:
        yield option
        yield from walk(option.opens)
        for record in registry_of(option).values():
            yield from walk(record.reads)


def reading(path: str) -> dict[str, Any] | None:
    """Fields with which a config reads an option: choices that lead to it."""
    if path in {option.path for option in ROOT}:
        return {}
    for opener, values in READERS[path]:
        before = reading(opener.path)
        if before is not None:
            return {**before, opener.path: values[0] or another_value(opener)}
    return None


def not_reading(path: str) -> dict[str, Any] | None:
    """Fields with which a config does not read an option; None: all configs do."""
    if path in {o.path for o in ALGORITHMS["centralized"].ignores}:
        return {"algorithm": "centralized"}
    if path in {option.path for option in ROOT}:
        return None
    fields = {}
    for opener, values in READERS[path]:
        if values == [""]:
            fields[opener.path] = type(opener.default)()
            continue
        others = [name for name in registry_of(opener) if name not in values]
        if not others:
            return not_reading(opener.path)  # every entry of the registry reads it
        fields.setdefault(opener.path, others[0])
    return fields


def config_with(fields: dict[str, Any]):
    config = default_config()
    config.update_from_flattened_dict(fields)
    return drop_unread(config)


@every_option
def test_every_option_may_be_changed_where_it_is_read(path):
    fields = reading(path)
    assert fields is not None
    config = config_with(fields)
    assert OPTIONS[path].path in options.read(ROOT, resolved(fields_of(config)))
    value = another_value(OPTIONS[path])
    config.update_from_flattened_dict({path: value})
    if OPTIONS[path].changes_results:
        assert fields_read(fields_of(config))[path] == value
    else:
        assert path not in fields_read(fields_of(config))


@every_option
def test_every_option_is_refused_where_it_is_not_read(path):
    fields = not_reading(path)
    if fields is None:
        pytest.skip("every run reads it")
    config = config_with({"algorithm": "wa", **fields})
    if path in options.read(ROOT, resolved(fields_of(config))):
        config = config_with({"algorithm": "local", **fields})
    check_unless_it_lacks_a_file(config)
    config.update_from_flattened_dict({path: another_value(OPTIONS[path])})
    with pytest.raises(ConfigError, match=rf"config\.{path} is .* not read it"):
        check(config)


def check_unless_it_lacks_a_file(config) -> None:
    try:
        check(config)
    except ConfigError as error:
        assert "graph.file is empty" in str(error)


@every_option
def test_a_value_that_is_not_allowed_is_refused_with_what_is(path):
    option = OPTIONS[path]
    if option.choices is not None:
        wrong, message = "nonsense", "'nonsense'; allowed: "
    elif option.bounds:
        wrong, message = type(option.default)(-1), "-1.*; it must be "
    else:
        pytest.skip("any value is allowed")
    config = config_with(reading(path) or {})
    config.update_from_flattened_dict({path: wrong})
    with pytest.raises(ConfigError, match=f"config.{path} is {message}"):
        check(config)


def test_what_is_not_read_goes_back_to_its_default():
    config = default_config()
    config.update_from_flattened_dict(
        {"algorithm": "local", "merge.stay": 0.5, "topology": "star", "rounds": 3}
    )
    assert drop_unread(config) is config
    assert (config.merge.stay, config.topology, config.rounds) == (0.0, "ring", 3)
    check(config)


def test_what_an_ignored_option_leads_to_is_not_read_either():
    config = default_config()
    fields = {"data.partition": "dirichlet", "data.alpha": 0.3}
    config.update_from_flattened_dict({"algorithm": "centralized", **fields})
    with pytest.raises(ConfigError, match="config.data.partition is 'dirichlet'"):
        check(config)
    drop_unread(config)
    check(config)
    assert (config.data.partition, config.data.alpha) == ("iid", 0.5)
    assert "data.alpha" not in fields_read(fields_of(config))


def test_programs_set_only_what_a_config_reads():
    config = default_config()
    config.data.name = "digits"
    set_if_read(config, "data.dir", "somewhere")
    assert config.data.dir == ""
    config.data.name = "cifar100"
    set_if_read(config, "data.dir", "somewhere")
    assert config.data.dir == "somewhere"


def test_an_override_drops_what_it_leaves_unread_and_no_more():
    original = default_config()
    original.merge.stay, original.merge.frame = 0.3, "joint"
    config = original.copy_and_resolve_references()
    config.algorithm, config.merge.frame = "cdsgd", "reference"
    found = settle_overrides(config, original, {"algorithm", "merge.frame"})
    assert found is config and config.merge.stay == 0.0
    with pytest.raises(ConfigError, match="config.merge.frame is 'reference', but"):
        check(config)


def test_what_a_file_sets_without_reading_it_is_refused_after_overrides_too():
    original = default_config()
    original.algorithm, original.merge.stay = "wa", 0.3
    config = original.copy_and_resolve_references()
    config.topology = "star"
    settle_overrides(config, original, {"topology"})
    with pytest.raises(ConfigError, match="config.merge.stay is 0.3, but"):
        check(config)


@pytest.mark.parametrize("value", ["a", None, True])
def test_a_value_of_another_type_is_refused_like_any_other(value):
    with pytest.raises(options.OptionError, match="it must be a number, at least 1"):
        OPTIONS["agents"].check(value)


# Numbers or words =====================================================================


@pytest.mark.parametrize("value", ["enough", 0, 1, 10**6])
def test_a_number_of_samples_may_be_a_word(value):
    config = default_config()
    config.merge.match_samples = value
    check(config)
    assert fields_read(fields_of(config))["merge.match_samples"] == value
    again = default_config()
    again.update(json.loads(json.dumps(config.to_dict())))
    assert fields_of(again) == fields_of(config)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("some", "is 'some'; it must be a number, at least 0 or 'enough'"),
        (-1, "is -1; it must be at least 0 or 'enough'"),
        (1.5, "is 1.5; it must be a whole number, at least 0 or 'enough'"),
        (True, "is True; it must be a number, at least 0 or 'enough'"),
        (None, "is None; it must be a number, at least 0 or 'enough'"),
        (["enough"], "it must be a number, at least 0 or 'enough'"),
    ],
)
def test_other_words_and_numbers_of_samples_are_refused(value, message):
    config = default_config()
    config.merge.match_samples = value
    with pytest.raises(ConfigError, match=f"config.merge.match_samples.*{message}"):
        check(config)


def test_a_number_without_limits_may_be_a_word_too():
    option = Option("steps", 5, "A number or a word.", words=("enough", "all"))
    assert option.bounds == "'enough' or 'all'"
    for value in ("all", 3, -3):
        option.check(value)
    for value, message in {
        1.5: "steps is 1.5; it must be a whole number or 'enough' or 'all'",
        "some": "steps is 'some'; it must be a number or 'enough' or 'all'",
    }.items():
        with pytest.raises(OptionError, match=f"^{message}$"):
            option.check(value)


@pytest.mark.parametrize(("given", "value"), [("enough", "enough"), ("70", 70)])
def test_a_number_or_a_word_is_given_on_the_command_line(given, value):
    values, command = flags.FlagValues(), f"--config.merge.match_samples={given}"
    config_flags.DEFINE_config_dict(
        "config", default_config(), flag_values=values, sys_argv=[command]
    )
    values(["program", command])
    config = values.config
    assert config.merge.match_samples == value
    check(config)


def test_a_copy_of_a_config_takes_what_the_config_takes():
    original = default_config()
    copy = copy_of(original)
    copy.merge.match_samples = "enough"
    assert original.merge.match_samples == 1000 and copy.is_locked
    check(copy)


def test_only_matching_takes_a_word_for_the_number_of_samples():
    config = default_config()
    with pytest.raises(TypeError):
        config.batch_norm.samples = "enough"
    for algorithm in ("wm", "wa"):
        config = default_config()
        config.algorithm, config.merge.match_samples = algorithm, "enough"
        with pytest.raises(ConfigError, match="match_samples is 'enough', but nothing"):
            check(config)
