from functools import partial

from dimat_jax.algorithms._merging import merging
from dimat_jax.algorithms._shim import FRAME, OPT_STATE, STAY
from dimat_jax.algorithms.record import GRAPH, MergingRecord
from dimat_jax.compression import COMPRESSOR
from dimat_jax.data.selection import BN_DATA, MATCH_DATA

RECORD = MergingRecord(
    "dimat",
    partial(merging, match="activations"),
    (FRAME, STAY, OPT_STATE),
    leads_to=(*GRAPH, COMPRESSOR, MATCH_DATA, BN_DATA),
    summary="Neighbours' units are matched by their activations, then averaged (Saadati et al. 2024).",
    compressor="none",
    facts=frozenset({"compressor"}),
    merges=True,
    aligns=True,
    matches_activations=True,
)
