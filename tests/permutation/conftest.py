"""The programs whose symmetries are traced here stand for those of users."""

from collections.abc import Iterator

import pytest

from tests import promotion


@pytest.fixture(autouse=True, scope="module")
def promotion_as_users_have_it() -> Iterator[None]:
    """Users' models broadcast and promote, and `derive` has to follow them."""
    with promotion.allow():
        yield
