"""Merges models that were trained apart, and looks along the lines between them.

    python -m experiments.merge A B [C ...] --out=DIR

A model is the workdir of an `experiments.train` run (DIR:2 is its agent 2, DIR its
agent 0), a PyTorch file (.pth, .pt or .safetensors; --model and --data say what it is),
or the --out of an earlier merge. All are aligned to the first, averaged, and their
BatchNorm statistics measured anew; networks without BatchNorm are rescaled (REPAIR).

Writes into DIR model/ (the merged model), summary.json, barrier.json and barrier.png
(loss and accuracy on the straight line from the first model to each other one, before
and after), and report.md, and prints the latter. DIR must be new. Exits with 2 on bad
input, and then writes nothing.
"""

import dataclasses
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import dimat_jax
from dimat_jax import matching, merge, permutation
from dimat_jax._metrics import write_json
from dimat_jax.data import sources
from dimat_jax.data.pipeline import Reader, Samples, place_pool
from dimat_jax.data.sources import Dataset, Split
from dimat_jax.errors import UserError, nearest
from dimat_jax.evaluate import Evaluator
from dimat_jax.models import MODELS, _saved, classifier, permutation_spec
from dimat_jax.models._saved import SavedModel
from dimat_jax.permutation import Perms
from dimat_jax.placement import place
from dimat_jax.tree import PyTree
from experiments import merge_report, model_files, program
from experiments.merge_report import Line

__all__ = ["Options", "run"]

METHODS = ("activation", "weight", "none")
FRAMES = ("reference", "joint")

_BATCH = 100  # for matching and for statistics
_EVAL_BATCH = 500


@dataclasses.dataclass(frozen=True)
class Options:
    """What to merge, and how. The flags say more."""

    models: tuple[str, ...]
    out: str
    model: str | None = None
    data: str | None = None
    data_dir: str | None = None
    method: str = "activation"
    frame: str = "reference"
    weights: tuple[float, ...] | None = None
    samples: int = 1000
    points: int = 11
    train_size: int | None = None
    test_size: int | None = None
    seed: int = 0
    restarts: int = 1
    stay: float = 0.0


def run(options: Options, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Merges, and writes all results into `options.out`.

    Returns:
        the content of summary.json.

    Raises:
        UserError: models, data or options that do not fit; nothing is written then.
    """
    started = time.perf_counter()
    _check(options)
    models, data_dir = model_files.read(options.models, options.model, options.data_dir)
    for name, model in zip(options.models, models, strict=True):
        if options.model not in (None, model.name):
            raise UserError(f"{name} is a {model.name}, but --model={options.model}")
    dataset = sources.load(
        model_files.data_set(options.models, models, options.data),
        directory=data_dir,
        train_size=options.train_size,
        test_size=options.test_size,
        seed=options.seed,
    )
    model_files.check(options.models, models, dataset)
    if options.samples > (available := len(dataset.train.labels)):
        raise UserError(
            f"--samples is {options.samples}, but there are only {available} images"
        )

    merging = _Merging(options, models[0].module, dataset)
    inputs = [jax.tree.map(jnp.asarray, model.variables) for model in models]
    forms = {"plain": inputs}
    moved = 0.0
    if options.method != "none" and merging.spec.groups:
        log(f"matching: {options.method}, frame {options.frame}")
        perms = merging.match(inputs)
        moved = _moved_units(perms)
        forms["aligned"] = [
            permutation.apply(merging.spec, p, m)
            for p, m in zip(perms, inputs, strict=True)
        ]
    averages = merging.averages(forms)
    labels = _labels(options.models)
    named = {**dict(zip(labels, inputs, strict=True)), **averages}
    scores = {name: merging.judge(model) for name, model in named.items()}
    lines = []
    for i in range(1, len(inputs)):
        log(f"the line from {labels[0]} to {labels[i]}")
        lines.append(Line(labels[0], labels[i], merging.curves(forms, i)))

    merged = list(averages)[-1]  # for which all was done that can be
    report = merge_report.markdown(scores, lines, merged)
    summary = {
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
        "moved_units": moved,
        "options": dataclasses.asdict(options),
        "seconds": time.perf_counter() - started,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"dimat_jax": dimat_jax.__version__, "jax": jax.__version__},
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


def _check(options: Options) -> None:
    """Refuses what can be refused before anything is read."""
    if len(set(options.models)) < max(2, len(options.models)):
        raise UserError(
            "expected two different models or more: python -m experiments.merge A B "
            f"[C ...] --out=DIR; got {list(options.models)}"
        )
    for flag, allowed in (("method", METHODS), ("frame", FRAMES), ("model", MODELS)):
        value = getattr(options, flag)
        if value is not None and value not in allowed:
            raise UserError(f"--{flag} is {value!r}; {nearest(value, allowed)}")
    for flag, least in (
        ("samples", 2),
        ("points", 2),
        ("seed", 0),
        ("restarts", 1),
        ("stay", 0),
    ):
        value = getattr(options, flag)
        if not least <= value < np.inf:
            raise UserError(f"--{flag} is {value}; it must be at least {least}")
    merge.check_weights(options.weights, len(options.models))
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} is there already; choose a new folder")


def _labels(names: Sequence[str]) -> list[str]:
    """The models' names without the folders that all of them are in."""
    parts = [Path(name).parts for name in names]
    common = os.path.commonprefix([p[:-1] for p in parts])
    return [str(Path(*p[len(common) :])) for p in parts]


def _moved_units(perms: Sequence[Perms]) -> float:
    """The share of units, over groups and models, that do not stay where they are."""
    moved = [
        np.asarray(perm) != np.arange(len(perm))
        for model_perms in perms[1:]
        for perm in model_perms.values()
    ]
    return float(np.concatenate(moved).mean())


def _write(
    out: Path,
    merged: SavedModel,
    summary: dict[str, Any],
    lines: Sequence[Line],
    report: str,
) -> None:
    """Writes all results, or nothing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}-{uuid.uuid4().hex}")
    try:
        _saved.save(partial / "model", merged)
        write_json(partial / "summary.json", summary)
        write_json(partial / "barrier.json", [line.as_json() for line in lines])
        merge_report.figure(lines, partial / "barrier.png")
        (partial / "report.md").write_text(report)
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class _Merging:
    """Models of one architecture, some data, and what can be done with them."""

    def __init__(self, options: Options, module: Any, dataset: Dataset):
        self.options = options
        self.module = module
        self.spec = permutation_spec(module)
        self._batch_statistics = classifier.batch_statistics(module)
        self._unit_moments = classifier.unit_moments(module, self.spec)
        self._placement = place(1, jax.devices()[:1])
        test = self._samples(dataset, dataset.test, None, _EVAL_BATCH)
        self._evaluator = Evaluator(classifier.forward(module), test, self._placement)
        chosen = self._samples(dataset, dataset.train, options.samples, _BATCH)
        # The last batch without what fills it up.
        self._batches = [
            batch.inputs[: int(mask.sum())]
            for batch, mask in zip(chosen, chosen.mask, strict=True)
        ]
        # What an average is once it is mended; nothing, where there is nothing to mend.
        self._mended = "repaired" if self.spec.groups else ""
        if self._batch_statistics is not None:
            self._mended = "recalibrated"

    def _samples(
        self, dataset: Dataset, split: Split, size: int | None, batch_size: int
    ) -> Samples:
        """`size` images (None: all), shuffled: some data are stored class by class."""
        rng = np.random.default_rng(self.options.seed)
        order = rng.permutation(len(split.labels))[:size]
        chosen = Split(split.images[order], split.labels[order])
        pool = place_pool(chosen, dataset.mean, dataset.std, self._placement)
        reader = Reader(pool, self._placement)
        return reader.shared(np.arange(len(order)), batch_size)

    def match(self, models: Sequence[PyTree]) -> list[Perms]:
        """For each model the permutations that move it into the first one's frame.

        Raises:
            PermutationSpecError: the architecture has not the symmetry it declares.
        """
        options, spec, (first, *others) = self.options, self.spec, models
        verify_key, key = jax.random.split(jax.random.key(options.seed))
        permutation.verify(
            spec,
            classifier.both_modes(self.module),
            first,
            self._batches[0][:8],
            verify_key,
        )
        watch, stay = classifier.activations(self.module), options.stay
        match options.method, options.frame:
            case "activation", "joint":
                return matching.joint_activation_matching(
                    spec, watch, models, self._batches, stay=stay
                )
            case "activation", _:
                found = [
                    matching.activation_matching(
                        spec, watch, first, other, self._batches, stay=stay
                    )
                    for other in others
                ]
            case _, "joint":
                return matching.joint_weight_matching(
                    spec, models, key=key, restarts=options.restarts, stay=stay
                )
            case _:
                found = [
                    matching.weight_matching(
                        spec,
                        first,
                        other,
                        key=jax.random.fold_in(key, i),
                        restarts=options.restarts,
                        stay=stay,
                    )
                    for i, other in enumerate(others)
                ]
        return [permutation.identity(spec, first), *found]

    def averages(self, forms: dict[str, list[PyTree]]) -> dict[str, PyTree]:
        """Of the models in each form the average, and the same mended."""
        weights, averages = self.options.weights, {}
        for form, models in forms.items():
            average = merge.average(models, weights)
            averages[f"{form} average"] = average
            if self._mended:
                mended = self._mend(average, models, weights)
                averages[f"{form} average, {self._mended}"] = mended
        return averages

    def curves(
        self, forms: dict[str, list[PyTree]], i: int
    ) -> dict[str, merge.Barrier]:
        """The line from model 0 to model i in each form, and with all points mended."""
        ts = np.linspace(0, 1, self.options.points)
        curves = {}
        for form, models in forms.items():
            a, b = models[0], models[i]
            curves[form] = merge.barrier(self.judge, a, b, ts)

            def mend(point, t, ends=(a, b)):
                return self._mend(point, ends, [1 - t, t])

            if self._mended:
                curves[f"{form}, {self._mended}"] = merge.barrier(
                    self.judge, a, b, ts, repair=mend
                )
        return curves

    def _mend(self, average: PyTree, models: Sequence[PyTree], weights: Any) -> PyTree:
        if self._batch_statistics is not None:
            return merge.recalibrate(self._batch_statistics, average, self._batches)
        return merge.repair(self._unit_moments, average, models, self._batches, weights)

    def judge(self, model: PyTree) -> tuple[float, float]:
        """Loss and accuracy on the test images."""
        stacked = jax.tree.map(lambda x: np.asarray(x)[None], model)
        result = self._evaluator(self._placement.put(stacked))
        return float(result.loss[0]), float(result.accuracy[0])


def _define_flags() -> None:
    """Not on import: other programs, which may be imported too, have the same flags."""
    text, number = flags.DEFINE_string, flags.DEFINE_integer
    text("out", None, "Where all results go; new or empty.", required=True)
    text("model", None, f"What PyTorch files hold: {', '.join(MODELS)}.")
    text("data", None, "The data set; needed if no model tells.")
    text("data_dir", None, "Where the data set is; default: where the runs say.")
    text("method", Options.method, f"Of matching: {', '.join(METHODS)}.")
    text("frame", Options.frame, "reference: all to the first; joint: all to all.")
    flags.DEFINE_list("weights", None, "Relative, of the average; default: all alike.")
    number("samples", Options.samples, "Training images for matching and mending.")
    number("points", Options.points, "On each line.")
    number("train_size", None, "Training images to draw from; default: all.")
    number("test_size", None, "Test images to judge on; default: all.")
    number("seed", Options.seed, "Of everything random.")
    number("restarts", Options.restarts, "Of weight matching.")
    flags.DEFINE_float("stay", Options.stay, "Units move only for a gain above this.")


def main(arguments: list[str]) -> None:
    """Merges the models that the arguments name."""
    values: dict[str, Any] = {
        field.name: flags.FLAGS[field.name].value
        for field in dataclasses.fields(Options)
        if field.name != "models"
    }
    if values["weights"] is not None:
        try:
            values["weights"] = tuple(map(float, values["weights"]))
        except ValueError as error:
            raise UserError(f"--weights: {error}") from error
    run(Options(models=tuple(arguments), **values))


if __name__ == "__main__":
    _define_flags()
    program.run(main, resumes=False)
