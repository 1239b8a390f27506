"""The bundled architectures. Each file holds a module beside its permutation spec.

`MODELS[name](n_classes=..., width=..., dtype=...)` builds a Flax Linen module whose
`__call__(x, *, train, mask=None)` returns logits. `permutation_spec(model)` returns the
spec that the module's file declares. The records at the foot of each file tell which
options an architecture reads.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from dimat_jax.models import mlp, resnet, vgg, vit
from dimat_jax.models._settings import ModelError
from dimat_jax.options import Option, Record, registry
from dimat_jax.permutation import PermutationSpec

__all__ = ["MODEL", "MODELS", "ModelError", "permutation_spec"]

MODELS: dict[str, Record[Any]] = registry(
    *mlp.RECORDS, *resnet.RECORDS, *vgg.RECORDS, *vit.RECORDS
)
"""`MODELS[name](n_classes=..., **options)` builds a Flax Linen module."""

MODEL = Option("model.name", "resnet20", "The architecture.", choices=MODELS)

_SPECS: dict[type[nn.Module], Callable[..., PermutationSpec]] = {
    mlp.MLP: mlp.permutation_spec,
    resnet.ResNet: resnet.permutation_spec,
    vgg.VGG: vgg.permutation_spec,
    vit.ViT: vit.permutation_spec,
}


def permutation_spec(model: nn.Module) -> PermutationSpec:
    """The declared symmetry of a bundled architecture.

    Raises:
        KeyError: `model` is not one of the bundled modules.
    """
    return _SPECS[type(model)](model)
