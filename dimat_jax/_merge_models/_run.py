"""Runs one merge of model files, from reading the models to writing the results."""

import dataclasses
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dimat_jax import __version__, _model_files, permutation
from dimat_jax._merge_models import _report
from dimat_jax._merge_models._merging import Merging
from dimat_jax._merge_models._methods import METHODS
from dimat_jax._merge_models._options import Options, check
from dimat_jax._merge_models._report import Line
from dimat_jax._metrics import write_json
from dimat_jax.data import sources
from dimat_jax.data.sources import Dataset
from dimat_jax.errors import UserError
from dimat_jax.models import _saved
from dimat_jax.models._saved import SavedModel
from dimat_jax.permutation import Perms

__all__ = ["run"]


def run(options: Options, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Merges, and writes all results into `options.out`.

    Args:
        options: the options of the merge.
        log: a function that is called with each line of progress, and with the report.

    Returns:
        the content of summary.json.

    Raises:
        UserError: the models, the data or the options do not fit. Then nothing is
            written.
    """
    started = time.perf_counter()
    check(options)
    models, dataset = _read(options)
    merging = Merging(options, models[0].module, dataset)
    inputs = [jax.tree.map(jnp.asarray, model.variables) for model in models]
    forms = {"plain": inputs}
    moved_units = 0.0
    log(f"matching: {_method(options)}")
    if perms := merging.match(inputs):
        moved_units = _share_of_moved_units(perms)
        forms["aligned"] = [
            permutation.apply(merging.spec, p, m)
            for p, m in zip(perms, inputs, strict=True)
        ]
    averages = merging.averages(forms)
    labels = _labels(options.models)
    named = {**dict(zip(labels, inputs, strict=True)), **averages}
    scores = {name: merging.evaluate(model) for name, model in named.items()}
    lines = []
    for i in range(1, len(inputs)):
        log(f"the line from {labels[0]} to {labels[i]}")
        lines.append(Line(labels[0], labels[i], merging.curves(forms, i)))

    # The last average is aligned and mended, if both are possible. It is the one saved.
    merged = list(averages)[-1]
    report = _report.markdown(scores, lines, merged)
    summary = {
        **_results(scores, lines, merged),
        "moved_units": moved_units,
        "options": dataclasses.asdict(options),
        "seconds": time.perf_counter() - started,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"dimat_jax": __version__, "jax": jax.__version__},
    }
    result = models[0]._replace(
        input_shape=dataset.train.images.shape[1:],
        data=dataset.name,
        variables=averages[merged],
    )
    _write(Path(options.out), result, summary, lines, report)
    log(report)
    log(f"wrote {options.out}")
    return summary


def _read(options: Options) -> tuple[list[SavedModel], Dataset]:
    """Reads the models and their data, and checks that all fit together."""
    models, data_dir = _model_files.read(
        options.models, options.model, options.data_dir
    )
    for name, model in zip(options.models, models, strict=True):
        if options.model not in (None, model.name):
            raise UserError(f"{name} is a {model.name}, but --model={options.model}")
    dataset = sources.load(
        _model_files.data_set(options.models, models, options.data),
        directory=data_dir,
        train_size=options.train_size,
        test_size=options.test_size,
        seed=options.seed,
    )
    _model_files.check(options.models, models, dataset)
    if options.samples > (available := len(dataset.train.labels)):
        raise UserError(
            f"--samples is {options.samples}, but there are only {available} images"
        )
    return models, dataset


def _method(options: Options) -> str:
    """Names the method of matching and the options that it reads, with their values."""
    read = METHODS[options.method].options
    values = [f"{option.keyword} {getattr(options, option.path)}" for option in read]
    return ", ".join([options.method, *values])


def _labels(names: Sequence[str]) -> list[str]:
    """Shortens the models' names by the folders that all of them share."""
    parts = [Path(name).parts for name in names]
    common = os.path.commonprefix([p[:-1] for p in parts])
    return [str(Path(*p[len(common) :])) for p in parts]


def _share_of_moved_units(perms: Sequence[Perms]) -> float:
    """Computes the share of units, over groups and models, that change their place."""
    has_moved = [
        np.ravel(np.asarray(perm) != np.arange(perm.shape[-1]))
        for model_perms in perms[1:]
        for perm in model_perms.values()
    ]
    return float(np.concatenate(has_moved).mean())


def _results(
    scores: Mapping[str, tuple[float, float]], lines: Sequence[Line], merged: str
) -> dict[str, Any]:
    """Returns the measurements in the form of summary.json."""
    return {
        "merged": merged,
        "loss": {name: loss for name, (loss, _) in scores.items()},
        "accuracy": {name: accuracy for name, (_, accuracy) in scores.items()},
        "barriers": [
            {
                "from": line.start,
                "to": line.end,
                **{name: curve.barrier for name, curve in line.curves.items()},
            }
            for line in lines
        ],
    }


def _write(
    out: Path,
    merged: SavedModel,
    summary: dict[str, Any],
    lines: Sequence[Line],
    report: str,
) -> None:
    """Writes all results. If an error occurs, nothing is left on disk."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}-{uuid.uuid4().hex}")
    try:
        _saved.save(partial / "model", merged)
        write_json(partial / "summary.json", summary)
        write_json(partial / "barrier.json", [line.as_json() for line in lines])
        _report.figure(lines, partial / "barrier.png")
        (partial / "report.md").write_text(report)
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
