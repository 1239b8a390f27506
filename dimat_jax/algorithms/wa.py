from functools import partial

from dimat_jax.algorithms._merging import merging
from dimat_jax.algorithms._shim import OPT_STATE
from dimat_jax.algorithms.record import GRAPH, MergingRecord
from dimat_jax.compression import COMPRESSOR
from dimat_jax.data.selection import BN_DATA

RECORD = MergingRecord(
    "wa",
    partial(merging, match=None),
    (OPT_STATE,),
    leads_to=(*GRAPH, COMPRESSOR, BN_DATA),
    summary="Neighbours' weights are averaged as they are.",
    compressor="none",
    facts=frozenset({"compressor"}),
    merges=True,
)
