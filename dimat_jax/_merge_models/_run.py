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
from tqdm import tqdm

from dimat_jax import __version__, _user_code, permutation
from dimat_jax._merge_models import _data, _files, _report
from dimat_jax._merge_models._merging import Merging
from dimat_jax._merge_models._methods import METHODS
from dimat_jax._merge_models._options import Options, check
from dimat_jax._merge_models._report import Line
from dimat_jax._merge_models._subject import bundled, own
from dimat_jax._merge_models._trees import write_tree
from dimat_jax._metrics import write_json
from dimat_jax.data.sources import Dataset
from dimat_jax.errors import UserError
from dimat_jax.models import MODELS, _saved
from dimat_jax.models._saved import SavedModel
from dimat_jax.models.torch_import import save_safetensors, to_torch
from dimat_jax.permutation import Perms
from dimat_jax.tasks import Metric
from dimat_jax.tree import PyTree

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
    models, directory = _files.read(options)
    dataset = _data.load(options, models, directory)
    merging = _merging(options, models, dataset)
    if remark := _remark(merging, dataset):
        log(remark)
    inputs = [jax.tree.map(jnp.asarray, model.variables) for model in models]
    forms = {"plain": inputs}
    moved_units = 0.0
    log(f"matching: {_method(options)}")
    if perms := merging.match(inputs):
        moved_units = _share_of_moved_units(perms)
        log(f"{100 * moved_units:.1f} % of the units change their places")
        forms["aligned"] = [
            permutation.apply(merging.spec, p, m)
            for p, m in zip(perms, inputs, strict=True)
        ]
    averages = merging.averages(forms)
    scores, lines = {}, []
    if dataset is not None:
        scores, lines = _evaluate(options, merging, inputs, forms, averages, log)
    # The last average is aligned and mended, if both are possible. It is the one saved.
    merged = list(averages)[-1]
    report = _report.markdown(scores, lines, merged, merging.metric)
    summary = {
        **_results(scores, lines, merged, merging.metric),
        "moved_units": moved_units,
        "options": dataclasses.asdict(options),
        "seconds": time.perf_counter() - started,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"dimat_jax": __version__, "jax": jax.__version__},
    }
    result = models[0]._replace(
        input_shape=_data.image_shape(options, models, dataset),
        input_dtype=_data.input_dtype(models, dataset),
        data=_data.name_to_save(models, dataset),
        variables=averages[merged],
    )
    _write(options, result, summary, lines, report, merging.metric)
    log(report)
    log(f"wrote {options.out}")
    return summary


def _remark(merging: Merging, dataset: Dataset | None) -> str:
    """Says what is not done, and why; "" if there is nothing to say."""
    if dataset is None and merging.subject.batch_statistics is not None:
        return (
            "no data: nothing is evaluated, and BatchNorm's statistics are averaged as "
            "weights are; measure them anew before the merged model is used, or give "
            "--data"
        )
    if dataset is None:
        return "no data: nothing is evaluated"
    reason = merging.subject.unmended
    return f"averages are not repaired: {reason}" if reason else ""


def _merging(
    options: Options, models: Sequence[SavedModel], dataset: Dataset | None
) -> Merging:
    """Checks that models and data fit together, and prepares their merge."""
    for name, model in zip(options.models, models, strict=True):
        if options.model not in (None, model.name):
            raise UserError(f"{name} is a {model.name}, but --model={options.model}")
    shape = _data.image_shape(options, models, dataset)
    example = _data.example(options, models, dataset, shape)
    name = models[0].name
    if name in MODELS:
        _files.check(options.models, models, shape, dataset)
        return Merging(options, bundled(models[0].module), dataset, example)
    _files.check_own(options.models, models)
    path, _, function = name.rpartition(":")
    forward = _user_code.load(Path(path), f"{function}(variables, inputs) -> logits")
    variables = jax.tree.map(jnp.asarray, models[0].variables)
    subject = own(function, forward, variables, example)
    if dataset is not None:
        n_classes = jax.eval_shape(forward, variables, example).shape[-1]
        _files.check_classes(name, n_classes, dataset)
    return Merging(options, subject, dataset, example)


def _evaluate(
    options: Options,
    merging: Merging,
    inputs: Sequence[PyTree],
    forms: dict[str, list[PyTree]],
    averages: Mapping[str, PyTree],
    log: Callable[[str], None],
) -> tuple[dict[str, tuple[float, float]], list[Line]]:
    """Evaluates all models and averages, and the lines from the first model.

    Returns:
        the loss and the metric by name, and the lines.
    """
    labels = _labels(options.models)
    named = {**dict(zip(labels, inputs, strict=True)), **averages}
    n_lines = len(inputs) - 1
    n_curves = len(forms) * (2 if merging.mended else 1)
    total = len(named) + n_lines * n_curves * options.points
    with tqdm(
        total=total, desc="evaluating", unit="model", leave=False, disable=None
    ) as bar:
        merging.after_evaluation = bar.update
        scores = {name: merging.evaluate(model) for name, model in named.items()}
        lines = []
        for i in range(1, len(inputs)):
            log(f"the line from {labels[0]} to {labels[i]}")
            lines.append(Line(labels[0], labels[i], merging.curves(forms, i)))
    return scores, lines


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
    scores: Mapping[str, tuple[float, float]],
    lines: Sequence[Line],
    merged: str,
    metric: Metric,
) -> dict[str, Any]:
    """Returns the measurements in the form of summary.json."""
    return {
        "merged": merged,
        "loss": {name: loss for name, (loss, _) in scores.items()},
        metric.name: {name: value for name, (_, value) in scores.items()},
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
    options: Options,
    merged: SavedModel,
    summary: dict[str, Any],
    lines: Sequence[Line],
    report: str,
    metric: Metric,
) -> None:
    """Writes all results. If an error occurs, nothing is left on disk."""
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}-{uuid.uuid4().hex}")
    try:
        partial.mkdir()
        _write_model(options, merged, partial)
        write_json(partial / "summary.json", summary)
        if lines:
            write_json(partial / "barrier.json", [line.as_json() for line in lines])
            _report.figure(lines, partial / "barrier.png", metric)
        (partial / "report.md").write_text(report)
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_model(options: Options, merged: SavedModel, folder: Path) -> None:
    """Writes the merged model in the form in which the models came."""
    place = _files.place(options)
    if merged.name not in MODELS:
        write_tree(folder, merged.variables, Path(options.models[0]), place)
        return
    _saved.save(folder / "model", merged)
    if (like := _files.torch_file(options)) is not None:
        state_dict = to_torch(
            merged.name,
            merged.variables,
            like=like,
            entry=place.entry,
            prefix=place.prefix,
        )
        save_safetensors(folder / "model.safetensors", state_dict)
