"""What a run depends on beside its config: files, data, versions, and plugins.

    inputs.json     digests of the files and of the data, the versions, the plugins
    FIELD.SUFFIX    a copy of each file that a field of the config names

A run that goes on with something else would not be the run that has begun. So files and
data must be the same, and other versions are warned of. The run reads its own copies of
the files, so the originals may be moved or removed.

A run whose config names things of plugins is read with these plugins only. Reports need
none: inputs.json of such a run also has the options that the run reads.
"""

import contextlib
import functools
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

import dimat_jax
from dimat_jax import plugins
from dimat_jax._digests import blake2b
from dimat_jax._folders import read_json
from dimat_jax._metrics import write_bytes, write_json
from dimat_jax.algorithms.record import INIT_FROM
from dimat_jax.config import (
    ROOT,
    Config,
    ConfigError,
    copy_of,
    fields_of,
    fields_of_json,
    fields_read,
    resolved,
)
from dimat_jax.data.sources import DIRECTORY, SOURCE, SOURCES
from dimat_jax.errors import UserError, concerning, reading
from dimat_jax.options import every, origin_of, read

__all__ = [
    "INPUTS",
    "FromPlugin",
    "Inputs",
    "fields_of_run",
    "files_named",
    "from_plugins",
    "load_plugins",
]

INPUTS = "inputs.json"
"""The file with what a run depends on."""

# The entry of the file that tells from which weights the agents have started.
_START = "init_from"
# The libraries whose version can change a run's results.
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")


class Inputs:
    """What the run of a folder depends on beside its config.

    Args:
        folder: The run's folder. Runs of older versions have no inputs.json; then
            nothing is known, and nothing is refused.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def write(self, config: Config, data: str, start: str | None = None) -> None:
        """Writes what a new run depends on, and copies the files that it names.

        Args:
            config: The run's config.
            data: The digest of the data that the run uses.
            start: The digest of the trained weights from which its agents start.
        """
        files = {}
        for field, path in files_named(config).items():
            content, copy = _content(field, path), _copy_name(field, path)
            write_bytes(self._folder / copy, content)
            digest = blake2b(content)
            files[field] = {"path": str(path), "copy": copy, "blake2b": digest}
        found = {"files": files, "data": {"blake2b": data}, "versions": versions()}
        if start is not None:
            found[_START] = {"from": config.init_from, "blake2b": start}
        if named := from_plugins(config):
            found["plugins"] = named
            found["fields"] = _identifying(fields_of(config))
        write_json(self._folder / INPUTS, found, digested=True)

    def check_files(self, config: Config) -> None:
        """Refuses files whose content is not that with which the run has begun.

        A file that is no longer there is not needed, because the run has a copy.

        Raises:
            ConfigError: A file has changed, or its copy has.
        """
        for field, path in files_named(config).items():
            known = self._files.get(field)
            if known is None:
                continue
            copy = self._folder / known["copy"]
            if blake2b(_content(field, copy)) != known["blake2b"]:
                raise ConfigError(
                    f"{copy} has changed since the run began; it was a copy of "
                    f"{known['path']}. Put the copy back, or choose another workdir"
                )
            if path.exists() and blake2b(_content(field, path)) != known["blake2b"]:
                raise ConfigError(
                    f"{self._folder} holds a run with another content of config.{field}"
                    f": {path} has changed since the run began. {copy} is the content "
                    "that the run uses. Put it back, or choose another workdir"
                )

    def load_plugins(self) -> None:
        """Imports the plugins of which the run's config names something.

        Raises:
            UserError: A plugin cannot be imported.
        """
        named = [FromPlugin(*each) for each in self._content.get("plugins", [])]
        load_plugins(named, self._folder)

    def own_files(self, config: Config) -> Config:
        """Returns the config with the run's own copies of the files that it names."""
        config = copy_of(config)
        for field in files_named(config).keys() & self._files.keys():
            copy = self._folder / self._files[field]["copy"]
            config.update_from_flattened_dict({field: str(copy)})
        return config

    def check_data(self, data: str) -> None:
        """Refuses data that are not those with which the run has begun.

        Other versions of the libraries are only warned of.

        Args:
            data: The digest of the data.

        Raises:
            ConfigError: The data are others.
        """
        content = self._content
        if not content:
            return
        if content["data"]["blake2b"] != data:
            raise ConfigError(
                f"{self._folder} holds a run on other data: the images, labels or means"
                " of the data set are not those with which the run began. Put them "
                "back, or choose another workdir"
            )
        began, now = content["versions"], versions()
        changed = [
            f"{name} {began.get(name)} (now {now.get(name)})"
            for name in sorted(began.keys() | now.keys())
            if began.get(name) != now.get(name)
        ]
        if changed:
            logging.warning(
                "%s began with %s; what follows may differ from what these versions "
                "would have given",
                self._folder,
                ", ".join(changed),
            )

    def check_start(self, start: str) -> None:
        """Refuses other weights than those from which the run's agents have started.

        Args:
            start: The digest of the weights that the config names.

        Raises:
            ConfigError: The weights are others.
        """
        known = self._content.get(_START)
        if known is not None and known["blake2b"] != start:
            raise ConfigError(
                f"{self._folder} holds a run from other weights: what config."
                f"{INIT_FROM.path} names is not what {known['from']} was when the run "
                "began. If that is a run that has gone on since, name its round "
                "(DIR@10); or choose another workdir"
            )

    @property
    def known_files(self) -> frozenset[str]:
        """The fields whose files are known by their content."""
        start = [INIT_FROM.path] if _START in self._content else []
        return frozenset([*self._files, *start])

    @property
    def _files(self) -> Mapping[str, Any]:
        return self._content.get("files", {})

    @functools.cached_property
    def _content(self) -> dict[str, Any]:
        path = self._folder / INPUTS
        if not path.exists():
            return {}
        content = read_json(path, dict, ConfigError)
        with reading(path, ConfigError):
            # Whatever is missing is noticed here, and not where it is needed.
            known = content["files"].values()
            texts = [each[k] for each in known for k in ("path", "copy", "blake2b")]
            texts += [content["data"]["blake2b"], *content["versions"].values()]
            if _START in content:
                texts += [content[_START]["from"], content[_START]["blake2b"]]
            for field, name, module in content.get("plugins", []):
                texts += [field, name, module]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError("it holds other things than texts")
        return content


def files_named(config: Config) -> dict[str, Path]:
    """The files whose content a config names, by the paths of its fields."""
    whole = resolved(fields_of(config))
    found = read(ROOT, whole)
    return {
        path: Path(whole[path])
        for path, option in found.items()
        if option.names_file and whole[path]
    }


class FromPlugin(NamedTuple):
    """Something of a plugin that a config names.

    Attributes:
        field: The path of the field.
        name: The name of the thing, which is the field's value.
        module: The module that has registered it, or the path of its file.
    """

    field: str
    name: str
    module: str


def from_plugins(config: Config) -> list[FromPlugin]:
    """Finds the things of plugins that a config names."""
    whole = resolved(fields_of(config))
    return [
        FromPlugin(path, name, module)
        for path, option in read(ROOT, whole).items()
        for name in option.names(whole[path])
        if (module := origin_of(option.choices, name))
    ]


def load_plugins(named: Iterable[FromPlugin], needed_by: Any) -> None:
    """Imports plugins, unless the things that are needed of them are known already.

    Args:
        named: The things that are needed.
        needed_by: What needs them, for messages.

    Raises:
        UserError: A plugin cannot be imported.
    """
    for field, name, module in named:
        option = next((each for each in every(ROOT) if each.path == field), None)
        if option is None or name not in (option.choices or ()):
            with concerning(f"{needed_by} needs {name!r} ({field})"):
                plugins.load(module)


def fields_of_run(folder: Path) -> dict[str, Any]:
    """Returns the values of the options that the run of a folder reads, by path.

    Plugins are not needed. The run may be of an older version. Where `data.dir` decides
    which data they are, it is among the values; see `Source.dir_is_data`.

    Raises:
        UserError: A file of the folder cannot be used.
    """
    content = read_json(folder / "config.json")
    # The file of a run without plugins is not needed here, so it may be damaged.
    with contextlib.suppress(UserError):
        recorded = read_json(folder / INPUTS, dict).get("fields")
        if isinstance(recorded, dict):
            return recorded
    return _identifying(fields_of_json(content))


def _identifying(whole: dict[str, Any]) -> dict[str, Any]:
    """Returns the values that tell a run from others; see `fields_of_run`."""
    found = fields_read(whole)
    source = SOURCES.get(found[SOURCE.path])
    if source and source.dir_is_data:
        found[DIRECTORY.path] = whole[DIRECTORY.path]
    return found


def versions() -> dict[str, str]:
    """The versions that a run's results may depend on, by name."""
    found = {name: metadata.version(name) for name in _LIBRARIES}
    own = {"dimat_jax": dimat_jax.__version__, "python": platform.python_version()}
    return own | found


def _copy_name(field: str, path: Path) -> str:
    return f"{field}{path.suffix}"


def _content(field: str, path: Path) -> bytes:
    with reading(f"config.{field}={path}", ConfigError):
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        return path.read_bytes()
