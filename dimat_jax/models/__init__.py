"""The bundled architectures. Each file holds a module beside its permutation spec.

`MODELS[name](n_classes=..., width=..., dtype=...)` builds a Flax Linen module whose
`__call__(x, *, train, mask=None)` returns logits. `permutation_spec(model)` returns the
spec that the module's file declares. The records at the foot of each file tell which
options an architecture reads.

`MODELS.add(ModelRecord(name, build, options))` adds a model of your own, of which
nothing is declared; see `ModelRecord`.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import flax.linen as nn

from dimat_jax._lazy import importer, public_names
from dimat_jax.models import gpt, mlp, resnet, vgg, vit
from dimat_jax.models._own import OwnModel
from dimat_jax.models._record import ModelRecord
from dimat_jax.models._settings import DTYPE, ModelError
from dimat_jax.options import Option, Registry, registry
from dimat_jax.permutation import PermutationSpec
from dimat_jax.permutation._layers import statistics

__all__ = [
    "DTYPE",
    "MODEL",
    "MODELS",
    "ModelError",
    "ModelRecord",
    "from_torch",
    "permutation_spec",
    "to_torch",
]

MODELS: Registry[ModelRecord] = registry(
    *mlp.RECORDS,
    *resnet.RECORDS,
    *vgg.RECORDS,
    *vit.RECORDS,
    *gpt.RECORDS,
    kind=ModelRecord,
)
"""`MODELS[name](n_classes=..., **options)` builds a model; see `ModelRecord`."""

MODEL = Option("model.name", "resnet20", "The architecture.", choices=MODELS)


def permutation_spec(model: nn.Module | OwnModel) -> PermutationSpec:
    """The symmetry of a model that a record of `MODELS` has built.

    It is the declared one, or is derived from the model where none is declared.

    Raises:
        KeyError: no record in `MODELS` declares a spec for modules of this kind.
        PermutationSpecError: the model cannot be traced.
    """
    if isinstance(model, OwnModel):
        return model.symmetry[0]
    for record in MODELS.values():
        if record.spec is not None and record.module is type(model):
            spec = record.spec(model)
            return replace(spec, statistics=statistics(spec.axes))
    raise KeyError(type(model))


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
