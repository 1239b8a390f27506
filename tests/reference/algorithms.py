"""The second implementations by the names of the algorithms.

A new algorithm needs an entry here: a class with its paper's `step` or `communicate`.
tests/algorithms/test_second_implementation.py compares the two implementations.
"""

from collections.abc import Callable

from tests.reference.agents import Alone
from tests.reference.gossip import D2, Cdadam, Cdmsgd, Cdsgd, Dsgt, Qgm, Sgp
from tests.reference.messages import Cga, Choco, Compcga
from tests.reference.rounds import Centralized, FedAvg, Local, Merging

REFERENCES: dict[str, Callable[..., Alone]] = {
    "local": Local,
    "centralized": Centralized,
    "fedavg": FedAvg,
    "cdsgd": Cdsgd,
    "cdmsgd": Cdmsgd,
    "cdadam": Cdadam,
    "sgp": Sgp,
    "d2": D2,
    "dsgt": Dsgt,
    "qgm": Qgm,
    "cga": Cga,
    "compcga": Compcga,
    "choco": Choco,
    "dimat": Merging,
    "wm": Merging,
    "wa": Merging,
}
"""`REFERENCES[name](x, optimizer, **options)` makes agents that start from x."""
