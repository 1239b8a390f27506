"""Registries know who has added an entry, and refuse names that are taken."""

import sys
from types import ModuleType

import pytest

from dimat_jax import plugins
from dimat_jax._registries import RegistrationError
from dimat_jax.options import (
    Option,
    OptionError,
    Record,
    Together,
    every,
    origin_of,
    registry,
)

SIZE = Option("tree.size", 3, "The size.", at_least=1)


def build(size=SIZE.default):
    return size


@pytest.fixture
def trees():
    return registry(Record("oak", build), Record("elm", build, (SIZE,)))


def run_as(module: str, code: str, trees) -> None:
    """Runs code as that of a module of this name."""
    made = ModuleType(module)
    made.__dict__.update(trees=trees, Record=Record, build=build)
    exec(code, made.__dict__)


def test_an_entry_that_is_added_is_known_with_its_origin(trees, monkeypatch):
    added = trees.add(Record("yew", build))
    assert trees["yew"] is added
    assert trees.origin("yew") == __name__ and trees.origin("oak") == ""
    trees["fir"] = Record("fir", build)
    assert trees.origin("fir") == __name__
    monkeypatch.setitem(trees, "oak", added)
    assert trees.origin("oak")
    monkeypatch.undo()
    assert trees.origin("oak") == ""


def test_a_file_that_runs_under_two_names_may_add_its_entries_twice(trees, tmp_path):
    """As a config file does that a script and this library load."""
    for name in ("config", "config_config"):
        made = ModuleType(name)
        made.__dict__.update(trees=trees, Record=Record, build=build)
        made.__file__ = str(tmp_path / "config.py")
        exec("trees.add(Record('yew', build))", made.__dict__)
    assert trees.origin("yew") == str(tmp_path / "config.py")


def test_a_name_is_taken_only_from_another_module(trees):
    run_as("grove", "trees.add(Record('yew', build))", trees)
    # A cell of a notebook may run twice.
    run_as("grove", "trees.add(Record('yew', build))", trees)
    message = "'yew' is taken by a Record of grove; choose another name"
    with pytest.raises(RegistrationError, match=message):
        trees.add(Record("yew", build))
    with pytest.raises(RegistrationError, match="'oak' is taken by a Record of dimat"):
        trees.add(Record("oak", build))
    with pytest.raises(RegistrationError, match="expected a Record to register"):
        trees.add(build)
    with pytest.raises(RegistrationError, match="without a name"):
        trees.add(Record("", build))


def test_the_origin_of_a_file_is_its_path(trees, tmp_path):
    path = tmp_path / "grove.py"
    path.write_text(
        "import sys\n"
        "from dimat_jax.options import Record\n"
        "sys.modules['the_trees'].trees.add(Record('yew', print))\n"
    )
    sys.modules["the_trees"] = ModuleType("the_trees")
    sys.modules["the_trees"].__dict__["trees"] = trees
    try:
        plugins.load(str(path))
        first = trees["yew"]
        plugins.load(str(path))
    finally:
        del sys.modules["the_trees"]
        plugins._loaded.discard(path.resolve())
    assert trees.origin("yew") == str(path.resolve())
    assert trees["yew"] is first, "the file has run twice"


def test_registries_together_show_what_is_added_later(trees):
    shrubs = registry(Record("box", build))
    both = Together(trees, shrubs)
    inner = Option("kind", "oak", "The kind.", choices=both).under("inner")
    assert list(both) == ["oak", "elm", "box"] and len(both) == 3
    shrubs.add(Record("ivy", build, (SIZE,)))
    assert both["ivy"] is shrubs["ivy"] and "ivy" in both and "fir" not in both
    assert inner.entry("ivy") is inner.entry("ivy")
    assert [option.path for option in inner.opened_by("ivy")] == ["inner.tree.size"]
    assert origin_of(inner.choices, "ivy") == __name__
    assert origin_of(inner.choices, "oak") == "" == origin_of(("oak",), "oak")
    shrubs["ivy"] = Record("ivy", build)
    assert not inner.opened_by("ivy")


def test_several_names_are_one_value():
    trees = registry(Record("oak", build), Record("elm", build, (SIZE,)))
    option = Option("trees", "", "Trees.", choices=trees, several=True, empty="none")
    option.check("")
    option.check("oak, elm")
    assert option.opened_by("oak,elm") == (SIZE,)
    for value, message in {
        "oak,elf": "trees is 'oak,elf'; allowed: elm, oak; did you mean 'elm'",
        "elm,elm": "trees is 'elm,elm', which has 'elm' twice",
        "oak,": "trees is 'oak,'; allowed",
    }.items():
        with pytest.raises(OptionError, match=message):
            option.check(value)


def test_options_of_one_path_have_one_default(trees):
    roots = [Option("tree", "oak", "The tree.", choices=trees), SIZE]
    assert [option.path for option in every(roots)] == ["tree", "tree.size"]
    trees.add(Record("yew", build, (Option("tree.size", 4, "Another."),)))
    with pytest.raises(OptionError, match="'tree.size', with the defaults 3 and 4"):
        list(every(roots))
