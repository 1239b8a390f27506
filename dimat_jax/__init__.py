"""Decentralized iterative merging and training of neural networks, in JAX.

Agents live side by side on a leading "agents" axis of every array. They train on their
own data; every few epochs each receives its neighbours' weights, permutes their hidden
units onto its own, and averages (DIMAT, CVPR 2024, arXiv 2404.08079).

The permutation tools (`dimat_jax.permutation`, `dimat_jax.matching`) stand alone: they
take any pytree of weights and need no agents, configs or data sets.

What users call most is here as `dimat_jax.NAME`, and so are all public modules. A name,
and what it needs, is imported when it is first used.
"""

from typing import TYPE_CHECKING

from dimat_jax._lazy import importer, public_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dimat_jax import algorithms as algorithms
    from dimat_jax import callbacks as callbacks
    from dimat_jax import cli as cli
    from dimat_jax import compression as compression
    from dimat_jax import config as config
    from dimat_jax import configs as configs
    from dimat_jax import data as data
    from dimat_jax import errors as errors
    from dimat_jax import evaluate as evaluate
    from dimat_jax import experiment as experiment
    from dimat_jax import export as export
    from dimat_jax import ledger as ledger
    from dimat_jax import matching as matching
    from dimat_jax import merge as merge
    from dimat_jax import mixing as mixing
    from dimat_jax import models as models
    from dimat_jax import network as network
    from dimat_jax import optimizers as optimizers
    from dimat_jax import options as options
    from dimat_jax import permutation as permutation
    from dimat_jax import placement as placement
    from dimat_jax import plugins as plugins
    from dimat_jax import reports as reports
    from dimat_jax import results as results
    from dimat_jax import sweeps as sweeps
    from dimat_jax import tasks as tasks
    from dimat_jax import topology as topology
    from dimat_jax import train as train
    from dimat_jax import tree as tree
    from dimat_jax import workdir as workdir
    from dimat_jax.algorithms import ALGORITHMS as ALGORITHMS
    from dimat_jax.callbacks import CALLBACKS as CALLBACKS
    from dimat_jax.compression import COMPRESSORS as COMPRESSORS
    from dimat_jax.config import default_config as default_config
    from dimat_jax.data.partition import PARTITIONS as PARTITIONS
    from dimat_jax.data.sources import SOURCES as SOURCES
    from dimat_jax.errors import UserError as UserError
    from dimat_jax.export import export_model as export_model
    from dimat_jax.matching import activation_matching as activation_matching
    from dimat_jax.matching import (
        joint_activation_matching as joint_activation_matching,
    )
    from dimat_jax.matching import joint_weight_matching as joint_weight_matching
    from dimat_jax.matching import solve_assignment as solve_assignment
    from dimat_jax.matching import weight_matching as weight_matching
    from dimat_jax.merge import average as average
    from dimat_jax.merge import barrier as barrier
    from dimat_jax.merge import interpolate as interpolate
    from dimat_jax.merge import recalibrate as recalibrate
    from dimat_jax.merge import repair as repair
    from dimat_jax.mixing import MIXINGS as MIXINGS
    from dimat_jax.mixing import spectral_gap as spectral_gap
    from dimat_jax.models import MODELS as MODELS
    from dimat_jax.models import from_torch as from_torch
    from dimat_jax.models import permutation_spec as permutation_spec
    from dimat_jax.models import to_torch as to_torch
    from dimat_jax.optimizers import OPTIMIZERS as OPTIMIZERS
    from dimat_jax.permutation import Concat as Concat
    from dimat_jax.permutation import PermutationSpec as PermutationSpec
    from dimat_jax.permutation import Product as Product
    from dimat_jax.permutation import Stack as Stack
    from dimat_jax.permutation import apply as apply
    from dimat_jax.permutation import compose as compose
    from dimat_jax.permutation import derive as derive
    from dimat_jax.permutation import identity as identity
    from dimat_jax.permutation import invert as invert
    from dimat_jax.permutation import validate as validate
    from dimat_jax.permutation import verify as verify
    from dimat_jax.results import run as run
    from dimat_jax.results import sweep as sweep
    from dimat_jax.tasks import TASKS as TASKS
    from dimat_jax.tasks import TaskRecord as TaskRecord
    from dimat_jax.topology import TOPOLOGIES as TOPOLOGIES
    from dimat_jax.train import load_agents as load_agents
else:
    _HOMES = {
        "algorithms": ["ALGORITHMS"],
        "callbacks": ["CALLBACKS"],
        "compression": ["COMPRESSORS"],
        "config": ["default_config"],
        "data.partition": ["PARTITIONS"],
        "data.sources": ["SOURCES"],
        "errors": ["UserError"],
        "export": ["export_model"],
        "matching": [
            "activation_matching",
            "joint_activation_matching",
            "joint_weight_matching",
            "solve_assignment",
            "weight_matching",
        ],
        "merge": ["average", "barrier", "interpolate", "recalibrate", "repair"],
        "mixing": ["MIXINGS", "spectral_gap"],
        "models": ["MODELS", "from_torch", "permutation_spec", "to_torch"],
        "optimizers": ["OPTIMIZERS"],
        "permutation": [
            "Concat",
            "PermutationSpec",
            "Product",
            "Stack",
            "apply",
            "compose",
            "derive",
            "identity",
            "invert",
            "validate",
            "verify",
        ],
        "results": ["run", "sweep"],
        "tasks": ["TASKS", "TaskRecord"],
        "topology": ["TOPOLOGIES"],
        "train": ["load_agents"],
    }
    __all__ = [name for names in _HOMES.values() for name in names]
    __getattr__ = importer(__name__, _HOMES)


def __dir__() -> list[str]:
    return public_names(__name__)
