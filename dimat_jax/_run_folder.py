"""The folder of a run: what it is refused for, and the files that a run begins with."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int64

from dimat_jax._digests import DIGESTS, missing
from dimat_jax._folders import check_output, read_json, strangers
from dimat_jax._inputs import INPUTS, Inputs, files_named
from dimat_jax._layout_choice import LayoutChoice
from dimat_jax._layouts import BATCHING, CHUNK
from dimat_jax._lock import LOCK_FILES
from dimat_jax._metrics import write_json
from dimat_jax._more_rounds import check_rounds, set_rounds
from dimat_jax._run_options import ROUNDS
from dimat_jax._without_data import FORM, Form
from dimat_jax.config import (
    RENAMED,
    Config,
    ConfigError,
    check,
    default_config,
    drop_unread,
    expect_all_fields,
    fields_of,
    fields_read,
)
from dimat_jax.data.partition import class_counts
from dimat_jax.errors import UserError, concerning, reading
from dimat_jax.experiment import Experiment

__all__ = ["Workdir"]

# What a run has written into its folder before config.json, if it was killed early. The
# process of a run of a sweep writes progress.json.
_EARLY = (
    *("layout.json", "partition.json", "progress.json"),
    *(FORM, INPUTS, DIGESTS, *LOCK_FILES),
)


class Workdir:
    """The folder of one run.

    Args:
        path: The folder. It may be missing.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        # An empty path would be that of the current folder.
        self._given = path
        self._inputs = Inputs(self.path)

    @property
    def is_started(self) -> bool:
        """Whether the folder holds a run."""
        return self._config.exists()

    def check(self, config: Config) -> None:
        """Refuses a folder that cannot take the run of a config. Nothing is written.

        Raises:
            ConfigError: The config cannot be run; or the folder cannot be written, or
                holds other files or the run of another config or of other files.
        """
        check(config)
        check_output(self._given, "workdir", ConfigError)
        if config.pretrain.cache_dir:
            cache_dir = "config.pretrain.cache_dir"
            check_output(config.pretrain.cache_dir, cache_dir, ConfigError)
        if self.is_started:
            self._expect_same(config)
            self._look_for_files(config)
            self.read_layout()
            self._look_at_unread()
            self._inputs.check_files(config)
        elif foreign := strangers(self.path, lambda path: _is_own(path, config)):
            raise ConfigError(
                f"{self.path} is no fresh folder: it has no config.json, and holds "
                f"{', '.join(foreign[:5])}{' ...' * (len(foreign) > 5)}. Choose a new "
                "or an empty workdir"
            )

    def _expect_same(self, config: Config) -> None:
        """Refuses a config that is not that of the folder's run.

        Options that a run does not read do not matter to it. Older versions let a
        config set them. Where the run has copies of files, their content counts and not
        their paths. The number of rounds may differ; see `check_rounds`.
        """
        own = self.read_config()
        there, here = fields_read(fields_of(own)), fields_read(fields_of(config))
        known = {field for field in self._inputs.known_files if here.get(field)}
        compared = (there.keys() | here.keys()) - known
        differing = [
            f"{field} ({there.get(field)!r} there, {here.get(field)!r} here)"
            for field in sorted(compared - {ROUNDS.path})
            if there.get(field) != here.get(field)
        ]
        if differing:
            raise ConfigError(
                f"{self.path} holds the run of another config; they differ in "
                f"{', '.join(differing)}. Choose another workdir"
            )
        check_rounds(self.path, own, config)

    def set_rounds(self, rounds: int) -> int | None:
        """Lets the run go on to another number of rounds; see `_more_rounds`."""
        return set_rounds(self.path, rounds)

    def _look_for_files(self, config: Config) -> None:
        """Warns of files that a run writes when it begins, and that are gone."""
        for name in missing(self.path):
            # Digests are written first. A run that was killed may lack later files.
            if not _is_own(self.path / name, config):
                continue
            logging.warning(
                "%s is missing. The run has written it, and %s names it. The run goes "
                "on without it. If you have a copy, put it back first",
                self.path / name,
                DIGESTS,
            )

    def _look_at_unread(self) -> None:
        """Warns of damaged files that only reports and readers of models need."""
        for name in ("partition.json", FORM):
            try:
                if (path := self.path / name).exists():
                    read_json(path)
            except UserError as error:
                logging.warning("%s", error)

    def create(
        self, experiment: Experiment, start: str | None = None
    ) -> Int64[np.ndarray, "agents classes"]:
        """Makes the folder, with config.json and the other files of a run that begins.

        Args:
            experiment: The run's experiment.
            start: The digest of the trained weights from which its agents start.

        Returns:
            How many training samples of each class every agent has.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        dataset, config = experiment.dataset, experiment.config
        counts = class_counts(dataset.train.classes, experiment.shards)
        # Labels that are no classes are counted as one class.
        names = dataset.class_names if dataset.labels == "classes" else None
        partition = {
            "partition": config.data.partition,
            # A small training set may lack the last classes; then so do the counts.
            "classes": names and names[: counts.shape[1]],
            "counts": counts,
        }
        write_json(self.path / "partition.json", partition, digested=True)
        write_json(self._layout, experiment.layout._asdict(), digested=True)
        Form.of(experiment).write(self.path)
        self._inputs.write(config, experiment.data_digest, start)
        # config.json comes last, since it marks the folder as that of a run.
        write_json(self._config, json.loads(config.to_json()), digested=True)
        return counts

    def check_data(self, experiment: Experiment) -> None:
        """Refuses to go on with other data than the run's.

        Raises:
            ConfigError: The data are others than those with which the run has begun.
        """
        if self.is_started:
            self._inputs.check_data(experiment.data_digest)

    def check_start(self, start: str) -> None:
        """Refuses to go on from other trained weights than the run's.

        Raises:
            ConfigError: The weights are others than those with which the run has begun.
        """
        if self.is_started:
            self._inputs.check_start(start)

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run has saved a state, so that its beginning is not needed."""
        entries = (self.path / "checkpoints").glob("*")
        return any(path.name.isdecimal() for path in entries)

    def with_own_files(self, config: Config) -> Config:
        """The config, in which a run that has begun names its own copies of files."""
        return self._inputs.own_files(config) if self.is_started else config

    def read_config(self) -> Config:
        """Reads the run's config.

        Fields that an older config lacks have their defaults, and so have options that
        it sets and does not read.

        Raises:
            ConfigError: There is no config.json, or it cannot be used.
            UserError: A plugin that the run needs cannot be imported.
        """
        fields = read_json(self._config, dict, ConfigError)
        self._inputs.load_plugins()
        config = default_config()
        with concerning(self._config), reading("the config", ConfigError):
            unknown = fields_of(fields).keys() - fields_of(config).keys()
            if unknown:
                names = [
                    f"{name} (it is {RENAMED[name]} now)" if name in RENAMED else name
                    for name in sorted(unknown)
                ]
                raise ValueError(f"there are no fields {', '.join(names)}")
            config.update(fields)
            return drop_unread(expect_all_fields(config))

    def read_layout(self) -> LayoutChoice | None:
        """Reads how the agents of the run share a device; None if the run is new.

        Raises:
            ConfigError: layout.json cannot be used.
        """
        if not (self.is_started and self._layout.exists()):
            return None
        fields = read_json(self._layout, dict, ConfigError)
        with concerning(self._layout), reading("the layout", ConfigError):
            if fields.keys() != set(LayoutChoice._fields):
                raise ValueError(
                    f"it needs the fields {', '.join(LayoutChoice._fields)}"
                )
            choice = LayoutChoice(**fields)
            BATCHING.check(choice.batching)
            CHUNK.check(choice.chunk)
            return choice

    def read_summary(self, rounds: int | None = None) -> dict[str, Any] | None:
        """Reads summary.json; None for a run that has not finished.

        Args:
            rounds: The number of rounds after which the run has finished. By default it
                is that of its own config.

        Raises:
            ConfigError: summary.json cannot be used.
        """
        path = self.path / "summary.json"
        if not path.exists():
            return None
        if rounds is not None and self.read_config().rounds != rounds:
            return None
        return read_json(path, dict, ConfigError)

    @property
    def _layout(self) -> Path:
        return self.path / "layout.json"

    @property
    def _config(self) -> Path:
        return self.path / "config.json"


def _is_own(path: Path, config: Config) -> bool:
    """Whether an entry of a folder may come from a run that was killed early."""
    if path.is_dir():
        return False
    copies = [f"{field}{file.suffix}" for field, file in files_named(config).items()]
    return path.name in (*_EARLY, *copies)
