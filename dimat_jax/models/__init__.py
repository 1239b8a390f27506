"""Bundled architectures. Each file holds a module and its permutation spec.

`MODELS[name](n_classes=..., width=..., dtype=...)` builds a Flax Linen module whose
`__call__(x, *, train, mask=None)` returns logits; `permutation_spec(model)` finds the
spec that its file declares.
"""

from collections.abc import Callable

import flax.linen as nn

from dimat_jax.models import mlp, resnet
from dimat_jax.permutation import PermutationSpec

__all__ = ["MODELS", "permutation_spec"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp.mlp,
    "resnet20": resnet.resnet20,
}

_SPECS: dict[type[nn.Module], Callable[..., PermutationSpec]] = {
    mlp.MLP: mlp.permutation_spec,
    resnet.ResNet: resnet.permutation_spec,
}


def permutation_spec(model: nn.Module) -> PermutationSpec:
    """The declared symmetry of a bundled architecture.

    Raises:
        KeyError: `model` is not one of the bundled modules.
    """
    return _SPECS[type(model)](model)
