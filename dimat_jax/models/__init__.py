"""Bundled architectures. Each file holds a module and its permutation spec.

`MODELS[name](n_classes=..., width=..., dtype=...)` builds a Flax Linen module whose
`__call__(x, *, train, mask=None)` returns logits; `permutation_spec(model)` finds the
spec that its file declares. What else an architecture can be told, its signature says.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import flax.linen as nn

from dimat_jax._lazy import importer, public_names
from dimat_jax.models import mlp, resnet, vgg, vit
from dimat_jax.models._settings import ModelError
from dimat_jax.permutation import PermutationSpec

__all__ = ["MODELS", "ModelError", "from_torch", "permutation_spec", "to_torch"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp.mlp,
    "resnet18": resnet.resnet18,
    "resnet20": resnet.resnet20,
    "resnet32": resnet.resnet32,
    "resnet34": resnet.resnet34,
    "resnet44": resnet.resnet44,
    "resnet50": resnet.resnet50,
    "resnet56": resnet.resnet56,
    "resnet101": resnet.resnet101,
    "vgg11": vgg.vgg11,
    "vgg13": vgg.vgg13,
    "vgg16": vgg.vgg16,
    "vgg19": vgg.vgg19,
    "vit": vit.vit,
}

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


if TYPE_CHECKING:
    from dimat_jax.models._torch_import import from_torch as from_torch
    from dimat_jax.models._torch_import import to_torch as to_torch
else:
    # That module imports this one; so this one imports it at first use.
    __getattr__ = importer(__name__, {"_torch_import": ["from_torch", "to_torch"]})


def __dir__() -> list[str]:
    return public_names(__name__)
