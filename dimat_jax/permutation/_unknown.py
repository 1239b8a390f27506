"""Operations without a rule, and the symmetry that they cost."""

from collections.abc import Collection, Mapping, Sequence

from dimat_jax.permutation._causes import Cause, Reason
from dimat_jax.permutation._nodes import fixed_nodes
from dimat_jax.permutation._units import AxisUnits, Units

__all__ = ["UnknownOperations"]


class UnknownOperations:
    """The occurrences of operations without a rule, and the symmetry that they cost."""

    def __init__(self):
        # For each occurrence, by the reason of its results: the axes that it touched.
        self._touched: dict[Reason, Sequence[Units]] = {}

    def add(self, name: str, touched: Sequence[Units]) -> tuple[Cause, Cause]:
        """Notes an occurrence.

        Returns:
            the reason of the touched axes and the reason of the results' axes.
        """
        number = len(self._touched)
        of_result = Cause("unknown", name, number, of_result=True)
        self._touched[of_result] = touched
        return Cause("unknown", name, number), of_result

    def costs(
        self, axes_of: Mapping[str, Sequence[AxisUnits]]
    ) -> dict[str, list[tuple[str, int]]]:
        """For each operation, the pairs (leaf, dimension) fixed for no other reason."""
        anyway = self._fixed_anyway()
        costs: dict[str, set[tuple[str, int]]] = {}
        for path, axes in axes_of.items():
            for d, axis in enumerate(axes):
                for node in fixed_nodes(axis):
                    if not _has_another_reason(node, anyway):
                        for reason in node.fixed:
                            assert isinstance(reason, Cause)
                            costs.setdefault(reason.what, set()).add((path, d))
        return {name: sorted(pairs) for name, pairs in sorted(costs.items())}

    def _fixed_anyway(self) -> set[Reason]:
        """The reasons of results that would be fixed even if derive knew the operation.

        They belong to the occurrences that have touched only axes which are fixed for
        another reason, as the axes of inputs are.
        """
        anyway: set[Reason] = set()
        while True:
            # One occurrence may have touched the results of another.
            more = {
                reason
                for reason, touched in self._touched.items()
                if reason not in anyway
                and touched
                and all(_has_another_reason(axis.root(), anyway) for axis in touched)
            }
            if not more:
                return anyway
            anyway |= more


def _has_another_reason(node: Units, anyway: Collection[Reason]) -> bool:
    """Whether units have a reason besides operations that may have cost a symmetry."""
    return any(
        isinstance(reason, str) or reason.kind != "unknown" or reason in anyway
        for reason in node.fixed
    )
