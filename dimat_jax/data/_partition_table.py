"""Shows in the terminal which agent has how many samples of each class."""

import numpy as np
from jaxtyping import Int64
from tabulate import tabulate

__all__ = ["table"]

# The largest number of classes for which a table has a column for each class. More
# columns do not fit into a terminal of 80 characters.
_CLASSES_IN_A_TABLE = 10


def table(counts: Int64[np.ndarray, "agents classes"]) -> str:
    """Formats `partition.class_counts` as a table with a row for each agent.

    If there are too many classes for a column each, the table shows how many classes an
    agent holds, and which is its largest one.
    """
    n_agents, n_classes = counts.shape
    totals = counts.sum(axis=1)
    if n_classes <= _CLASSES_IN_A_TABLE:
        columns = {str(label): counts[:, label] for label in range(n_classes)}
    else:
        columns = {
            "classes": (counts > 0).sum(axis=1),
            "largest class": counts.argmax(axis=1),
            "its samples": counts.max(axis=1),
        }
    return tabulate({"agent": range(n_agents), "samples": totals, **columns}, "keys")
