"""The benchmark that aligns a GPT-2, with a small one."""

import math
from collections.abc import Iterator

import jax
import pytest

from dimat_jax import permutation
from dimat_jax._bench import gpt2
from dimat_jax._bench._gpt2 import GPT2, forward, shapes
from tests import promotion


@pytest.fixture(autouse=True, scope="module")
def promotion_as_users_have_it() -> Iterator[None]:
    """The model stands for those of users, which broadcast."""
    with promotion.allow():
        yield


SMALL = GPT2(layers=2, width=12, heads=3, vocabulary=40, places=10)


def test_the_smallest_gpt2_has_124_million_parameters():
    n_params = sum(math.prod(shape) for shape in shapes(GPT2()).values())
    assert n_params == 124_439_808


def test_a_gpt2_has_a_stream_and_four_groups_in_each_block():
    abstract = {n: jax.ShapeDtypeStruct(s, "float32") for n, s in shapes(SMALL).items()}
    text = jax.ShapeDtypeStruct((2, 10), "int32")
    spec = permutation.derive(forward(SMALL), abstract, text, strict=True)
    # The stream; in each block the heads, the dimensions of queries and keys, those of
    # values, and the hidden units.
    assert sorted(permutation.group_sizes(spec, abstract).values()) == sorted(
        [12, *2 * [3, 4, 4, 48]]
    )


@pytest.mark.slow
def test_what_is_planted_in_a_gpt2_is_recovered():
    facts = gpt2.alignment(SMALL._asdict()).call()
    assert facts["recovered"] == 1 and facts["units"] == 12 + 2 * (3 + 4 + 4 + 48)
    assert facts["groups"] == 9
    assert all(facts[f"{phase}_seconds"] > 0 for phase in ("derive", "verify", "match"))
