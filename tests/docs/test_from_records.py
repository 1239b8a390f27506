"""The lists of options and algorithms say all that the records say."""

import pytest

from dimat_jax import config
from dimat_jax.algorithms import ALGORITHMS
from dimat_jax.options import Option, Record, every, registry
from docs.from_records import algorithms_table, options_page

DEGREE = Option(
    "graph.degree", 0, "Neighbours of each agent.", at_least=1, empty="as on a ring"
)
STAY = Option("merge.stay", 0.0, "What a unit must gain.", at_least=0, below=2)
ROUNDS = Option("rounds", 100, "How often agents merge.", at_least=1, unit="rounds")
FOLDER = Option("data.dir", "", "Where data are.", empty="here", changes_results=False)
FRAMES = ("own", "joint")
FRAME = Option("merge.frame", "own", "Who moves.", choices=FRAMES, opens=(STAY,))


def dimat():
    """Merges matched networks.

    More is said here.
    """


CHOICES = registry(
    Record("dimat", dimat, options=(FRAME,)),
    Record("local", dimat, ignores=(DEGREE,), summary="Merges | nothing."),
)
ALGORITHM = Option("algorithm", "dimat", "Who trains how.", choices=CHOICES)
INNER = Option("merge.inner", "local", "Between merges.", choices=CHOICES)
ROOT = (ROUNDS, ALGORITHM, INNER, DEGREE, FOLDER)


@pytest.fixture(scope="module")
def entries() -> dict[str, str]:
    """The text of each option's entry, by its path."""
    parts = options_page(ROOT).split("\n### ")[1:]
    return {part.split("`")[1]: part for part in parts}


def test_every_option_that_can_be_read_has_an_entry_with_its_meaning(entries):
    options = (*ROOT, FRAME, STAY)
    assert set(entries) == {option.path for option in options}
    for option in options:
        assert option.meaning in entries[option.path]
        assert f"{{ #{option.path} }}" in entries[option.path]


def test_an_entry_has_the_default_the_bounds_and_the_unit(entries):
    assert "Default: `100`" in entries["rounds"]
    assert "Allowed: at least 1\n- Unit: rounds" in entries["rounds"]
    assert "Default: `0` (as on a ring)" in entries["graph.degree"]
    assert "Allowed: at least 0 and below 2" in entries["merge.stay"]
    assert 'Default: `""` (here)' in entries["data.dir"]
    assert "Allowed: `own`, `joint`" in entries["merge.frame"]


def test_an_entry_says_where_the_option_is_read(entries):
    assert "Read: always" in entries["rounds"]
    assert (
        "Read: where [`algorithm`](#algorithm) is `dimat`; or where "
        "[`merge.inner`](#merge.inner) is `dimat`"
    ) in entries["merge.frame"]
    assert "where [`merge.frame`](#merge.frame) is set" in entries["merge.stay"]
    assert (
        "Read: always, but not where [`algorithm`](#algorithm) is `local`"
        in entries["graph.degree"]
    )
    assert "changes no result" in entries["data.dir"]
    assert "changes no result" not in entries["rounds"]


def test_a_registry_is_a_table_that_stands_once(entries):
    assert (
        "| `dimat` | Merges matched networks. | [`merge.frame`](#merge.frame) |"
        in entries["algorithm"]
    )
    assert r"| `local` | Merges \| nothing. |  |" in entries["algorithm"]
    assert "| `dimat` |" not in entries["merge.inner"]
    assert "the values of [`algorithm`](#algorithm)" in entries["merge.inner"]


def test_sections_stand_in_the_order_in_which_options_lead_to_each_other():
    headings = [line for line in options_page(ROOT).splitlines() if line[:3] == "## "]
    assert headings == ["## At the top", "## `merge`", "## `graph`", "## `data`"]


def test_the_list_holds_every_option_that_there_is():
    page = options_page(config.ROOT)
    for option in every(config.ROOT):
        assert page.count(f"{{ #{option.path} }}") == 1
        assert option.meaning in page


def test_the_table_has_a_row_for_every_algorithm():
    rows = algorithms_table(ALGORITHMS).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(ALGORITHMS)
    row = {row.split("`")[1]: row for row in rows}
    assert "[`balanced`][dimat_jax.algorithms.conditions.balanced]" in row["cdsgd"]
    assert "with every step" in row["cdsgd"] and "once a round" in row["wa"]
    assert "| `heavy_ball` only |" in row["cdmsgd"] and "| `sgd` |" in row["cdsgd"]
    assert row["local"].endswith("|  |  | `adam` |")
