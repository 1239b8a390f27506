"""Every option of `dimat merge` is documented, checked, and refused where unread."""

from collections.abc import Mapping

import pytest

from dimat_jax import config, options
from dimat_jax._merge_models import OPTIONS, Options, _methods, _options
from dimat_jax.cli._merge import _meaning
from dimat_jax.data.sources import SOURCES
from dimat_jax.errors import UserError
from dimat_jax.options import SEED, OptionError
from tests.test_every_option import another_value

METHODS = _methods.METHODS
# The options that some methods read and others do not.
OPENED = [o.path for o in options.every((_methods.METHOD,)) if o is not _methods.METHOD]
every_option = pytest.mark.parametrize("name", OPTIONS)


def check(tmp_path, **fields) -> None:
    _options.check(Options(("a", "b"), str(tmp_path / "out"), **fields))


@every_option
def test_every_option_is_documented(name):
    option = OPTIONS[name]
    assert option.path == name
    assert option.meaning[0].isupper() and option.meaning.endswith(".")
    if isinstance(option.choices, Mapping):
        for record in option.choices.values():
            assert record.meaning.endswith(".") and record.meaning in _meaning(option)
    for choice in option.choices or ():
        assert choice in _meaning(option)


@every_option
def test_every_default_is_allowed(name):
    if OPTIONS[name].default is not None:
        OPTIONS[name].check(OPTIONS[name].default)
    assert getattr(Options((), ""), name) == OPTIONS[name].default


@every_option
def test_a_value_that_is_not_allowed_is_refused_with_what_is(tmp_path, name):
    option = OPTIONS[name]
    if option.choices is not None:
        wrong, message = "nonsense", f"--{name} is 'nonsense'; allowed: "
    elif option.bounds:
        wrong = -1 if option.default is None else type(option.default)(-1)
        message = f"--{name} is {wrong}; it must be {option.bounds}"
    else:
        pytest.skip("any value is allowed here")
    with pytest.raises(OptionError, match=message):
        check(tmp_path, **{name: wrong})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OPENED)
def test_an_option_is_refused_exactly_where_its_method_does_not_read_it(
    tmp_path, name, method
):
    fields = {"method": method, name: another_value(OPTIONS[name])}
    if OPTIONS[name] in METHODS[method].reads:
        return check(tmp_path, **fields)
    with pytest.raises(UserError) as error:
        check(tmp_path, **fields)
    message = f"--{name} is {fields[name]!r}, but --method={method} does not read it"
    assert message in str(error.value)
    assert "it is read where method is " in str(error.value)


def test_methods_read_what_they_need():
    reads = {name: [o.path for o in METHODS[name].reads] for name in METHODS}
    assert reads == {
        "activation": ["frame", "stay"],
        "weight": ["frame", "stay", "restarts"],
        "none": [],
    }


def test_a_run_and_a_merge_have_the_same_options_of_matching():
    """One declaration is the source of both, so the two cannot differ."""
    of_runs = {option.path: option for option in options.every(config.ROOT)}
    for name in ("stay", "restarts"):
        run, merge = of_runs[f"merge.{name}"], OPTIONS[name]
        assert (run.default, run.meaning, run.bounds) == (
            merge.default,
            merge.meaning,
            merge.bounds,
        )
    assert OPTIONS["seed"] is SEED
    assert list(OPTIONS["data"].choices or ()) == list(SOURCES)
