"""Checkpoints, written by Orbax. A crash never leaves half a checkpoint."""

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
    """A checkpoint whose arrays do not have the expected shapes."""


class Checkpoints:
    """A directory of checkpoints, each a tree of host arrays and a JSON record.

    Args:
        directory: The directory.
        keep: The number of checkpoints to keep. Saving another one removes the oldest.
        create: Whether to make the directory if it is missing. With `False`, and if
            nothing is saved, the directory stays as it is.
    """

    def __init__(
        self, directory: Path, keep: int = KEEP.default, *, create: bool = True
    ):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create)
        self._manager = ocp.CheckpointManager(
            Path(directory).resolve(), options=options
        )

    def save(self, number: int, tree: PyTree, record: dict[str, Any]) -> None:
        """Saves a checkpoint in the background.

        Args:
            number: The checkpoint's number, above those of the others.
            tree: The arrays. They may be changed once this function has returned.
            record: What is saved beside them, as JSON content.
        """
        self._manager.save(
            number,
            args=ocp.args.Composite(
                tree=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(record)
            ),
        )

    def read_record(self) -> dict[str, Any] | None:
        """Reads the record of the newest checkpoint; None if there is none."""
        number = self._manager.latest_step()
        return None if number is None else self._read_record(number)

    def restore(
        self, like: Callable[[dict[str, Any]], PyTree]
    ) -> tuple[PyTree, dict[str, Any]] | None:
        """Reads the newest checkpoint.

        Args:
            like: `like(record)` is the expected tree. Its leaves are
                `jax.ShapeDtypeStruct`s.

        Returns:
            The tree of NumPy arrays, and the record. None if there is no checkpoint.

        Raises:
            CheckpointError: A leaf's shape is not the expected one.
            ValueError: The tree's structure is not the expected one.
        """
        number = self._manager.latest_step()
        if number is None:
            return None
        record = self._read_record(number)
        expected = like(record)
        tree = self._manager.restore(
            number, args=ocp.args.Composite(tree=ocp.args.StandardRestore(expected))
        )["tree"]

        def check(path, leaf, expected_leaf):
            # Orbax does not compare shapes itself.
            if leaf.shape != expected_leaf.shape:
                raise CheckpointError(
                    f"checkpoint {number} in {self._manager.directory}: {path} is of "
                    f"shape {leaf.shape}, expected {expected_leaf.shape}"
                )

        map_with_path(check, tree, expected)
        return tree, record

    def wait(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is on disk, and closes the directory."""
        self.wait()
        self._manager.close()

    def _read_record(self, number: int) -> dict[str, Any]:
        return self._manager.restore(
            number, args=ocp.args.Composite(record=ocp.args.JsonRestore())
        )["record"]
