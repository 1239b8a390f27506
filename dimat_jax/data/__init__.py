"""Data sets, how they are divided among agents, and how batches are drawn from them.

`sources` reads data sets, `partition` divides them, and `pipeline` draws batches. These
modules are imported when they are first used.
"""

from typing import TYPE_CHECKING

from dimat_jax._lazy import importer, public_names

if TYPE_CHECKING:
    from dimat_jax.data import partition as partition
    from dimat_jax.data import pipeline as pipeline
    from dimat_jax.data import selection as selection
    from dimat_jax.data import sources as sources
else:
    __getattr__ = importer(__name__, {})


def __dir__() -> list[str]:
    return public_names(__name__)
