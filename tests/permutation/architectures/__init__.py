"""Architectures as their publications describe them, with groups counted by hand.

`test_stacked` has more with stacked layers, among them `nn.scan` over a transformer's.
"""

from collections.abc import Callable

from tests.permutation.architectures import (
    _convolutional,
    _graphs_and_sets,
    _haiku,
    _mixtures,
    _sequences,
    _transformers,
)
from tests.permutation.architectures._model import Architecture

__all__ = ["ARCHITECTURES", "Architecture"]

ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    **_convolutional.ARCHITECTURES,
    **_transformers.ARCHITECTURES,
    **_sequences.ARCHITECTURES,
    **_graphs_and_sets.ARCHITECTURES,
    **_mixtures.ARCHITECTURES,
    **_haiku.ARCHITECTURES,
}
