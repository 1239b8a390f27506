"""Checkpoints, written by Orbax. Half a checkpoint, or a damaged one, is never used.

A checkpoint is a folder whose name is a number:

    tree/           the arrays
    record/         the record, as JSON
    digests.json    a digest of each of these files, and of the attached ones

Orbax writes all of it under another name, and renames the folder at last. So a crash
leaves no folder whose name is a number without digests. The digests are verified before
anything is read, and the newest checkpoint that is as it was written is used.

With several processes, each writes and reads the parts of the arrays that are on its
own devices, and verifies its part of the files. The directory must be one that all
processes see, and all processes make the same calls.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging

from dimat_jax._digests import DIGESTS, damage, sync, write_digests
from dimat_jax._empty_leaves import with_empty, without_empty
from dimat_jax._processes import everywhere, from_main, is_main
from dimat_jax.errors import UserError, first_line, writing
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
EVERY_MINUTES = Option(
    "checkpoint.every_minutes",
    15.0,
    "The minutes after which a checkpoint is due, in the middle of a round or of "
    "pre-training too.",
    at_least=0,
    unit="minutes",
    empty="only rounds and epochs count",
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

KEEP_EVERY = Option(
    "checkpoint.keep_every",
    0,
    "The number of rounds between two checkpoints that are kept for good, beside the "
    "newest ones.",
    at_least=0,
    unit="rounds",
    empty="only the newest ones are kept",
    changes_results=False,
)


# The entry of a saved record that says that the checkpoint is kept for good.
_IS_KEPT = "is_kept"
# The entry of a saved record that says that the checkpoint has digests. Checkpoints of
# older versions have neither.
_HAS_DIGESTS = "has_digests"


class CheckpointError(UserError):
    """Checkpoints that are damaged, or whose arrays do not have the expected shapes."""


class Checkpoints:
    """A directory of checkpoints, each a tree of arrays and a JSON record.

    Args:
        directory: The directory.
        keep: The number of checkpoints to keep, beside those kept for good.
        create: Whether to make the directory if it is missing. With `False`, and if
            nothing is saved, the directory stays as it is.
    """

    def __init__(
        self, directory: Path, keep: int = KEEP.default, *, create: bool = True
    ):
        self._directory = Path(directory).resolve()
        self._keep = keep
        if create:
            self._directory.mkdir(parents=True, exist_ok=True)
        self._writer: ocp.AsyncCheckpointer | None = None
        # The number, and the files to attach, of the checkpoint that is being saved.
        self._saving: tuple[int, Mapping[str, bytes]] = 0, {}
        # The newest checkpoint that can be used, once the directory has been verified.
        self._verified: tuple[int | None] | None = None
        # Whether checkpoints are kept for good, by their numbers, as far as known.
        self._kept: dict[int, bool] = {}
        # Why checkpoints cannot be used, by their numbers.
        self._damaged: dict[int, str] = {}

    def __str__(self) -> str:
        return str(self._directory)

    def save(
        self,
        number: int,
        tree: PyTree,
        record: dict[str, Any],
        attached: Mapping[str, bytes] | None = None,
        *,
        for_good: bool = False,
    ) -> None:
        """Saves a checkpoint in the background.

        A folder of the same number that is no good checkpoint is renamed.

        Args:
            number: The checkpoint's number, above those of the others.
            tree: NumPy or JAX arrays. They may be changed or donated once this function
                has returned.
            record: What is saved beside them, as JSON content.
            attached: The content of further files of the checkpoint, by name.
            for_good: Whether the checkpoint is never removed.
        """
        self.wait()
        if is_main():
            self._clear(number)
        tree = without_empty(tree)
        if any(map(_is_on_cpu, jax.tree.leaves(tree))):
            # On a CPU Orbax would write from the arrays' own memory, in the background.
            tree = _copied(tree)
        if self._writer is None:
            self._writer = ocp.AsyncCheckpointer(
                ocp.CompositeCheckpointHandler(),
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=self._complete
                ),
            )
        self._saving = number, attached or {}
        self._verified = None
        self._writer.save(
            self._directory / str(number),
            args=ocp.args.Composite(
                tree=ocp.args.StandardSave(tree),
                record=ocp.args.JsonSave(
                    {**record, _HAS_DIGESTS: True, _IS_KEPT: for_good}
                ),
            ),
        )

    def newest(self) -> int | None:
        """The number of the newest checkpoint that is as it was written.

        Newer ones that are damaged are skipped, each with a warning. A checkpoint of an
        older version has no digests. It is used, with a warning.

        Returns:
            None if the directory holds no checkpoint.

        Raises:
            CheckpointError: There are checkpoints, but none can be used.
        """
        if self._verified is None:
            self._verified = (self._verify(),)
        return self._verified[0]

    def read_record(self) -> dict[str, Any] | None:
        """Reads the record of the newest checkpoint; None if there is none."""
        number = self.newest()
        if number is None:
            return None
        text = (self._directory / str(number) / "record" / "metadata").read_text()
        record = json.loads(text)
        for own in (_HAS_DIGESTS, _IS_KEPT):
            record.pop(own, None)
        return record

    def read_attached(self, name: str) -> bytes | None:
        """Reads a further file of the newest checkpoint; None if it is not there."""
        number = self.newest()
        if number is None:
            return None
        path = self._directory / str(number) / name
        return path.read_bytes() if path.exists() else None

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
            CheckpointError: A leaf's shape is not the expected one, or no checkpoint
                can be used.
            ValueError: The tree's structure is not the expected one.
        """
        record = self.read_record()
        if record is None:
            return None
        number, whole = self.newest(), like(record)
        expected = without_empty(whole)
        folder = self._directory / str(number)
        args = ocp.args.StandardRestore(expected, strict=rows is None)
        handler: Any = ocp.StandardCheckpointHandler()
        reader = ocp.Checkpointer(handler)
        try:
            saved = flatten(handler.metadata(folder / "tree").tree)
            self._check_shapes(number, saved, expected, rows)
            found = reader.restore(folder / "tree", args=args)
            return with_empty(found, whole), record
        except Exception as error:
            if isinstance(error, UserError) or (folder / DIGESTS).exists():
                raise
            raise CheckpointError(
                f"checkpoint {number} in {self._directory} cannot be read: "
                f"{first_line(error)}. An older version has written it without "
                "digests. Nothing was deleted; move it away to use an older one"
            ) from error
        finally:
            reader.close()

    def _check_shapes(
        self,
        number: int | None,
        saved: Mapping[str, Any],
        expected: PyTree,
        rows: int | None,
    ) -> None:
        """Compares the shapes on disk, which Orbax does not do."""

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
                    f"checkpoint {number} in {self._directory}: {path} is of "
                    f"shape {shape}, expected {wanted}"
                )

        map_with_path(check, expected)

    def wait(self) -> None:
        """Waits until everything is on disk."""
        if self._writer is None:
            return
        try:
            self._writer.wait_until_finished()
        except Exception:
            # A half-made checkpoint would go on filling a full disk.
            if is_main():
                self._remove_halves()
            raise
        if is_main():
            self._remove_oldest()

    def close(self) -> None:
        """Waits until everything is on disk, and closes the directory."""
        try:
            self.wait()
        finally:
            writer, self._writer = self._writer, None
            if writer is not None:
                writer.close()

    def _numbers(self) -> list[int]:
        """The numbers of the entries whose names are those of checkpoints."""
        if not self._directory.is_dir():
            return []
        names = [path.name for path in self._directory.iterdir()]
        return sorted(int(n) for n in names if n.isdecimal() and str(int(n)) == n)

    def _verify(self) -> int | None:
        """Finds the newest checkpoint that can be used; see `newest`."""
        # Process 0 may have removed an old checkpoint meanwhile, so it decides.
        for number in reversed(from_main(self._numbers())):
            reasons = everywhere(self._damage(number))
            why = next((reason for reason in reasons if reason), None)
            if why is None:
                return number
            if is_main() and number not in self._damaged:
                logging.warning(
                    "Checkpoint %d in %s is skipped: %s", number, self._directory, why
                )
            self._damaged[number] = why
        if not self._damaged:
            return None
        reasons = "; ".join(f"{n}: {why}" for n, why in self._damaged.items())
        raise CheckpointError(
            f"none of the checkpoints in {self._directory} can be used: {reasons}. "
            "Nothing was deleted. Put back a copy of a checkpoint, or move the folder "
            "away to begin anew"
        )

    def _damage(self, number: int) -> str | None:
        """Why this process finds that a checkpoint cannot be used; None if it can."""
        folder = self._directory / str(number)
        try:
            return damage(folder, jax.process_index(), jax.process_count())
        except OSError:
            pass  # There are no digests.
        try:
            record = json.loads((folder / "record" / "metadata").read_text())
        except (OSError, ValueError):
            return "it is no checkpoint, or only a part of one"
        if not isinstance(record, dict) or not (folder / "tree").is_dir():
            return "it is no checkpoint, or only a part of one"
        if _HAS_DIGESTS in record:
            return f"{DIGESTS} is missing"
        if is_main():
            logging.warning(
                "Checkpoint %d in %s is of an older version and has no digests, so it "
                "cannot be verified",
                number,
                self._directory,
            )
        return None

    def _clear(self, number: int) -> None:
        """Makes room for a checkpoint, and removes what crashes have left."""
        self._remove_halves()
        folder = self._directory / str(number)
        if number in self._damaged and folder.exists():
            # It may hold something that a person wants to look at.
            names = [f"{number}.damaged", *(f"{number}.damaged-{i}" for i in range(99))]
            free = (self._directory / name for name in names)
            folder.rename(next(path for path in free if not path.exists()))
        self._damaged.pop(number, None)
        self._kept.pop(number, None)

    def _remove_halves(self) -> None:
        for path in self._directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _complete(self) -> None:
        """Completes a checkpoint, just before Orbax renames its folder."""
        number, attached = self._saving
        pattern = f"{number}{ocp.utils.TMP_DIR_SUFFIX}*"
        (folder,) = self._directory.glob(pattern)
        for name, content in attached.items():
            with writing(folder / name):
                (folder / name).write_bytes(content)
        write_digests(folder)

    def _remove_oldest(self) -> None:
        """Removes what is not to be kept, once newer checkpoints are on disk."""
        sync(self._directory)
        good = [number for number in self._numbers() if number not in self._damaged]
        passing = [number for number in good if not self._is_kept(number)]
        for number in passing[: -self._keep]:
            folder = self._directory / str(number)
            if (folder / "record").is_dir():  # A folder of another kind stays.
                shutil.rmtree(folder, ignore_errors=True)

    def _is_kept(self, number: int) -> bool:
        """Whether a checkpoint is kept for good. Its record is read once."""
        if number not in self._kept:
            path = self._directory / str(number) / "record" / "metadata"
            try:
                self._kept[number] = bool(json.loads(path.read_bytes()).get(_IS_KEPT))
            except Exception:
                return False  # It may be damaged, so nothing is remembered.
        return self._kept[number]


def _is_on_cpu(leaf) -> bool:
    return isinstance(leaf, jax.Array) and next(iter(leaf.devices())).platform == "cpu"


@jax.jit
def _copied(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)
