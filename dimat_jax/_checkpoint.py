"""Checkpoints, written by Orbax. A crash never leaves half a checkpoint.

With several processes, each writes and reads the parts of the arrays that are on its
own devices. The directory must be one that all processes see.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from dimat_jax.errors import UserError
from dimat_jax.options import Option
from dimat_jax.tree import PyTree, flatten, map_with_path

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
    """A directory of checkpoints, each a tree of arrays and a JSON record.

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
            tree: NumPy or JAX arrays. They may be changed or donated once this function
                has returned.
            record: What is saved beside them, as JSON content.
        """
        leaves = jax.tree.leaves(tree)
        if any(isinstance(leaf, jax.Array) and _is_on_cpu(leaf) for leaf in leaves):
            # On a CPU Orbax would write from the arrays' own memory, in the background.
            tree = _copied(tree)
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
        self, like: Callable[[dict[str, Any]], PyTree], rows: int | None = None
    ) -> tuple[PyTree, dict[str, Any]] | None:
        """Reads the newest checkpoint.

        Args:
            like: `like(record)` is the expected tree. Its leaves are
                `jax.ShapeDtypeStruct`s. Those with a sharding become JAX arrays, the
                others NumPy arrays.
            rows: The number of entries of the leading axes that must be there. The
                arrays may have been saved with more or fewer further entries than are
                expected; those that are missing become 0. None: the shapes are equal.

        Returns:
            The tree and the record. None if there is no checkpoint.

        Raises:
            CheckpointError: A leaf's shape is not the expected one.
            ValueError: The tree's structure is not the expected one.
        """
        number = self._manager.latest_step()
        if number is None:
            return None
        record = self._read_record(number)
        expected = like(record)
        self._check_shapes(number, expected, rows)
        restore = ocp.args.StandardRestore(expected, strict=rows is None)
        tree = self._manager.restore(number, args=ocp.args.Composite(tree=restore))
        return tree["tree"], record

    def _check_shapes(self, number: int, expected: PyTree, rows: int | None) -> None:
        """Compares the shapes on disk, which Orbax does not do."""
        directory = self._manager.directory / str(number) / "tree"
        saved = flatten(ocp.StandardCheckpointHandler().metadata(directory).tree)

        def check(path, expected_leaf):
            if path not in saved:
                return  # Orbax tells how the structures differ.
            shape, wanted = tuple(saved[path].shape), expected_leaf.shape
            same = shape == wanted
            if rows is not None and shape:
                same = shape[1:] == wanted[1:] and shape[0] >= rows
                wanted = (rows, *wanted[1:])
            if not same:
                raise CheckpointError(
                    f"checkpoint {number} in {self._manager.directory}: {path} is of "
                    f"shape {shape}, expected {wanted}"
                )

        map_with_path(check, expected)

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


def _is_on_cpu(array: jax.Array) -> bool:
    return next(iter(array.devices())).platform == "cpu"


@jax.jit
def _copied(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)
