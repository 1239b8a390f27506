from functools import partial

from dimat_jax.algorithms._merging import merging
from dimat_jax.algorithms._shim import FRAME, OPT_STATE, RESTARTS, STAY
from dimat_jax.algorithms.record import GRAPH, MergingRecord
from dimat_jax.compression import COMPRESSOR
from dimat_jax.data.selection import BN_DATA

RECORD = MergingRecord(
    "wm",
    partial(merging, match="weights"),
    (FRAME, STAY, OPT_STATE, RESTARTS),
    leads_to=(*GRAPH, COMPRESSOR, BN_DATA),
    summary="Neighbours' units are matched by their weights, then averaged.",
    compressor="none",
    facts=frozenset({"compressor"}),
    merges=True,
    aligns=True,
)
