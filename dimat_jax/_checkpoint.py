"""Checkpoints, by Orbax: whole or not at all, the newest few kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from dimat_jax.errors import UserError
from dimat_jax.options import Option
from dimat_jax.tree import PyTree, map_with_path

__all__ = ["CheckpointError", "Checkpoints"]


EVERY = Option(
    "checkpoint.every",
    1,
    "The number of rounds between two checkpoints. The last round always has one.",
    at_least=1,
    unit="rounds",
    changes_results=False,
)
KEEP = Option(
    "checkpoint.keep",
    2,
    "The number of checkpoints that are kept.",
    at_least=1,
    unit="checkpoints",
    changes_results=False,
)


class CheckpointError(UserError):
    """A checkpoint that holds something else than what is to be restored."""


class Checkpoints:
    """A directory of checkpoints, each a tree of host arrays and a JSON record.

    Arrays are saved as the agents' own, without the slots that fill up devices, so that
    a run may resume on another number of devices.

    Args:
        directory: of checkpoints.
        keep: how many to keep.
        create: whether to make the directory if it is missing. If not, one that is only
            restored from stays as it is, even while a run writes to it.
    """

    def __init__(
        self, directory: Path, keep: int = KEEP.default, *, create: bool = True
    ):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create)
        self._manager = ocp.CheckpointManager(
            Path(directory).resolve(), options=options
        )

    def save(self, number: int, tree: PyTree, record: dict[str, Any]) -> None:
        """Saves in the background; returns once `tree` may be changed."""
        self._manager.save(
            number,
            args=ocp.args.Composite(
                tree=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(record)
            ),
        )

    def restore(
        self, like: Callable[[dict[str, Any]], PyTree]
    ) -> tuple[PyTree, dict[str, Any]] | None:
        """The newest checkpoint: its tree of NumPy arrays, and its record.

        Args:
            like: the structure, shapes and dtypes of the tree, given the record; its
                leaves are `jax.ShapeDtypeStruct`s.

        Returns:
            None if there is no checkpoint.

        Raises:
            CheckpointError: a leaf's shape is not the expected one.
            ValueError: the structure is not the expected one.
        """
        number = self._manager.latest_step()
        if number is None:
            return None
        record = self._manager.restore(
            number, args=ocp.args.Composite(record=ocp.args.JsonRestore())
        )["record"]
        expected = like(record)
        tree = self._manager.restore(
            number, args=ocp.args.Composite(tree=ocp.args.StandardRestore(expected))
        )["tree"]

        def check(path, leaf, expected_leaf):
            # Orbax reads whatever shape it finds.
            if leaf.shape != expected_leaf.shape:
                raise CheckpointError(
                    f"checkpoint {number} in {self._manager.directory}: {path} is of "
                    f"shape {leaf.shape}, expected {expected_leaf.shape}"
                )

        map_with_path(check, tree, expected)
        return tree, record

    def wait(self) -> None:
        """Returns once everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the directory."""
        self.wait()
        self._manager.close()
