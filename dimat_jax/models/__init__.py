"""The bundled architectures. Each file holds a module beside its permutation spec.

`MODELS[name](n_classes=..., width=..., dtype=...)` builds a Flax Linen module whose
`__call__(x, *, train, mask=None)` returns logits. `permutation_spec(model)` returns the
spec that the module's file declares. The records at the foot of each file tell which
options an architecture reads.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import flax.linen as nn

from dimat_jax._lazy import importer, public_names
from dimat_jax.models import mlp, resnet, vgg, vit
from dimat_jax.models._settings import ModelError
from dimat_jax.options import Option, Record, registry
from dimat_jax.permutation import PermutationSpec
from dimat_jax.permutation._layers import statistics

__all__ = [
    "MODEL",
    "MODELS",
    "ModelError",
    "from_torch",
    "permutation_spec",
    "to_torch",
]

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
    spec = _SPECS[type(model)](model)
    return replace(spec, statistics=statistics(spec.axes))


if TYPE_CHECKING:
    from dimat_jax.models.torch_import import from_torch as from_torch
    from dimat_jax.models.torch_import import infer_model as infer_model
    from dimat_jax.models.torch_import import to_torch as to_torch
else:
    # That module imports this one; so this one imports it at first use.
    __getattr__ = importer(
        __name__, {"torch_import": ["from_torch", "infer_model", "to_torch"]}
    )


def __dir__() -> list[str]:
    return public_names(__name__)
