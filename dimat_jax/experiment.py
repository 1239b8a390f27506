"""Builds the parts of a run from its config."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Key

from dimat_jax import _randomness, models
from dimat_jax._chosen import (
    build_chosen,
    build_optimizer,
    check_network,
    number_of_agents,
)
from dimat_jax._conv_forms import has_convolution
from dimat_jax._devices import devices_of_all_processes
from dimat_jax._division import check_samples, divide, with_wrong_labels
from dimat_jax._examples import Examples, draw_subset
from dimat_jax._fields_together import build_model
from dimat_jax._layout_choice import LayoutChoice, choose
from dimat_jax._needs import (
    check_graph_and_steps,
    check_model,
    check_steps,
    load_checked,
)
from dimat_jax._slots import put_each
from dimat_jax.algorithms import Algorithm, MergeData, Task
from dimat_jax.algorithms.base import Variables
from dimat_jax.algorithms.conditions import no_negative_weights
from dimat_jax.algorithms.local import local
from dimat_jax.algorithms.server import SERVER_OPTIMIZER
from dimat_jax.compression import COMPRESSOR
from dimat_jax.config import (
    Config,
    check,
    fields_of,
    record_of,
    resolved,
)
from dimat_jax.data import selection, sources
from dimat_jax.data._dataset import digest, normalised
from dimat_jax.data._own import Holdings, OwnPool, OwnReader, place_own_pool
from dimat_jax.data._small_shards import WAYS
from dimat_jax.data.partition import Shard
from dimat_jax.data.pipeline import Sampler, Samples, share
from dimat_jax.evaluate import Evaluator
from dimat_jax.models import classifier
from dimat_jax.network import Network, networks_kept
from dimat_jax.options import arguments
from dimat_jax.permutation._verify import Verification
from dimat_jax.placement import place
from dimat_jax.tasks import TASKS

__all__ = ["Experiment", "check_network"]


class Experiment:
    """All parts of a run, built from its config and checked.

    Args:
        config: a config with the fields of `config.default_config`.
        layout: how agents share a device. By default it is what the config names, or
            what suits the model and the device.

    Attributes:
        config: the config that was given.
        record, learnt: the records of the algorithm, and of the task that is learnt.
        links: the network over time.
        dataset: the data set.
        signature: what the model must know of the data set: the inputs, the classes.
        n_classes, input_shape: the number of classes, and the shape of one input.
        division: who gets which training images.
        shards: for each agent the indices of its training images.
        layout: how agents share a device, and why.
        placement: the devices on which the agents live.
        model: the model that every agent trains.
        task: the loss, the symmetry and the activations of the model.
        sampler: the order in which agents see their images during the rounds, as
            positions in `train_pool`.
        pretrain_sampler: the same for pre-training.
        local_steps, pretrain_steps: how many are in a round, in pre-training.
        algorithm: the algorithm of the rounds.
        pretrain_algorithm: the algorithm of pre-training: every agent trains alone.

    Raises:
        UserError: the config cannot be run.
    """

    def __init__(self, config: Config, layout: LayoutChoice | None = None):
        self._begin(config)
        self.dataset, self._traced_init = load_checked(config, self._fields)
        self.signature = self.dataset.signature  # a copy may have fewer classes
        classes, n_agents = self.dataset.train.classes, number_of_agents(self._fields)
        self.division = divide(classes, n_agents, self._fields)
        self.shards = self.division.shards
        self._build_task()
        counts = self.division, len(self.dataset.test.labels)
        normalises = self.task.batch_statistics is not None
        check_samples(self._fields, *counts, has_statistics=normalises)
        self._place(layout)
        self._build_samplers(self.division.pretrain_shards)
        alone = self.pretrain_sampler.steps_per_epoch
        self._build_algorithms(
            [len(shard) for shard in self.shards],
            {"steps_per_epoch": alone, "total_steps": self.pretrain_steps},
            {
                "steps_per_epoch": self.sampler.steps_per_epoch,
                "steps_per_round": self.local_steps,
                "total_steps": config.rounds * self.local_steps,
            },
        )

    def _begin(self, config: Config, known: sources.Signature | None = None) -> None:
        """Checks the config, and what is known of missing data. Builds the network."""
        check(config)
        self.config, self._fields = config, resolved(fields_of(config))
        self.record = record_of(self._fields)
        self.learnt = TASKS[config.task]
        self._small_shards = WAYS[config.data.small_shards]
        self._placed: dict[int, tuple[Network, Network]] = {}
        check_graph_and_steps(self._fields)
        if known is not None:
            self._traced_init = check_model(self._fields, known)
        self.links = check_network(config)

    def _place(self, layout: LayoutChoice | None) -> None:
        """Places the agents on the devices."""
        config = self.config
        devices = devices_of_all_processes(config.placement.cpu_devices)
        self.layout = layout or choose(config, devices[0], lambda: self.convolves)
        n_agents, layout = number_of_agents(self._fields), self.layout
        how = devices, layout.batching, layout.chunk
        self.placement = place(n_agents, *how, batch_size=config.batch_size)

    def _build_task(self) -> None:
        """Builds the model and the task that the agents learn."""
        _, self.input_shape, _, self.n_classes, _ = self.signature
        self.model = build_model(self._fields, self.signature, self.record.aligns)
        self.task = Task(
            loss=self._small_shards.weighed(classifier.loss(self.model, self.learnt)),
            spec=models.permutation_spec(self.model),
            activations=classifier.activations(self.model),
            batch_statistics=classifier.batch_statistics(self.model),
        )
        if self.task.batch_statistics is not None and self.record.uses_graph:
            no_negative_weights(f"{self.record.name} with BatchNorm", self.links)

    def _build_samplers(self, pretrain_shards: Sequence[Shard]) -> None:
        """Builds the samplers of both phases, and counts their steps."""
        config = self.config
        self._holdings = Holdings(
            self.shards, pretrain_shards, placement=self.placement
        )
        rows = self._rows = self._holdings.rows(self.shards)
        small = self._small_shards.name
        self.sampler = Sampler(rows, config.batch_size, self.seeds("order"), small)
        self.pretrain_sampler = Sampler(
            self._holdings.rows(pretrain_shards),
            config.pretrain.batch_size,
            self.seeds("pretrain_order"),
            small,
        )
        self.pretrain_steps = (
            config.pretrain.epochs * self.pretrain_sampler.steps_per_epoch
        )
        self.local_steps = (
            config.local_steps or config.local_epochs * self.sampler.steps_per_epoch
        )
        check_steps("config.rounds", config.rounds * self.local_steps)
        check_steps("config.pretrain.epochs", self.pretrain_steps)

    def _build_algorithms(
        self, sizes: Sequence[int], alone: dict[str, int], together: dict[str, int]
    ) -> None:
        """Builds the algorithms: from shards' sizes, and the steps of both phases."""
        self.pretrain_algorithm = local(
            self.task._replace(clip_norm=self.config.pretrain.optimizer.clip_norm),
            self._optimizer("pretrain.", **alone),
            self.placement,
        )
        self.algorithm: Algorithm = self.record(
            self.task._replace(clip_norm=self.config.optimizer.clip_norm),
            self._optimizer("", **together),
            self.placement,
            **arguments(self.record, self._fields),
            **self._facts(sizes),
        )

    def _facts(self, sizes: Sequence[int]) -> dict[str, Any]:
        """Finds the arguments of the algorithm that are no options of a config.

        See `AlgorithmRecord.facts`.
        """
        links = self.links
        # Only what the algorithm needs is computed: W at all times may be large.
        facts = {
            "adjacency": lambda: links.edges,
            "lossy_edges": lambda: links.edges if links.changes else None,
            "mixing_matrix": lambda: links.mixing_matrix,
            "compressor": lambda: build_chosen(COMPRESSOR, self._fields),
            "server": lambda: build_chosen(SERVER_OPTIMIZER, self._fields),
            "examples": lambda: sizes if self._small_shards.examples_count else None,
        }
        return {name: facts[name]() for name in self.record.facts}

    def _optimizer(self, section: str, **steps: int) -> optax.GradientTransformation:
        """Builds the optimizer of a section: "" for the rounds, or "pretrain."."""
        fields = {
            path.removeprefix(section): value
            for path, value in self._fields.items()
            if path.startswith(f"{section}optimizer.")
        }
        return build_optimizer(fields, **steps)

    def network_at_round(self, round_number: int) -> Network:
        """Returns the network of a round's communication. Rounds count from 1."""
        return self.links.at_round(round_number, self.placement.slots)

    def network_at_step(self, step: int, round_number: int) -> Network:
        """Returns the network of a local step of a round.

        Rounds count from 1. Steps count from 0 over all rounds.
        """
        return self.links.at_step(step, round_number, self.placement.slots)

    def steps_of_round(self, round_number: int) -> range:
        """The local steps of a round. Steps count from the first round on, from 0."""
        first = (round_number - 1) * self.local_steps
        return range(first, first + self.local_steps)

    def communication_key(self, round_number: int) -> Key[Array, ""]:
        """The key of everything random in a round's communication."""
        return jax.random.fold_in(self.key("communicate"), round_number)

    def placed(self, network: Network) -> Network:
        """Copies a network to all devices. The copies are kept for further steps.

        A few networks that are used in turn are copied there only once.
        """
        if id(network) not in self._placed:
            if len(self._placed) == networks_kept(self.placement.slots):
                self._placed.clear()
            # id(network) is a safe key only while the network object is alive, so the
            # cache keeps a reference to it.
            self._placed[id(network)] = network, self.placement.replicate(network)
        return self._placed[id(network)][1]

    @cached_property
    def data_digest(self) -> str:
        """A text that differs for other images, labels or means."""
        return digest(self.dataset)

    @cached_property
    def train_pool(self) -> OwnPool:
        """The training images, each on the device of the agent that owns it."""
        train = with_wrong_labels(self.dataset, self.division, self._fields)
        return place_own_pool(train, *self._statistics, self._holdings)

    @cached_property
    def evaluator(self) -> Evaluator:
        """The evaluator, which uses the same test images every time."""
        return self._evaluator(self.test_samples)

    @cached_property
    def test_samples(self) -> Samples:
        """The test images on which agents are evaluated, the same ones every time."""
        test, size = self.dataset.test, self.config.eval.samples
        subset = draw_subset(len(test.labels), size, self.config.seed, "eval")
        return self._share(test, subset)

    @cached_property
    def validator(self) -> Evaluator | None:
        """The evaluator on the validation images of all agents; None without any."""
        images = np.sort(np.concatenate(self.division.validation))
        if not len(images):
            return None
        order = draw_subset(len(images), 0, self.config.seed, "validation")
        return self._evaluator(self._share(self.dataset.train, images[order]))

    def _evaluator(self, samples: Samples) -> Evaluator:
        forward = classifier.forward(self.model)
        return Evaluator(forward, samples, self.placement, self.learnt)

    def _share(self, split: sources.Split, chosen: np.ndarray) -> Samples:
        """Makes samples of the chosen images of a split, for evaluation."""
        size = self.config.eval.batch_size
        return share(split, chosen, *self._statistics, size, self.placement)

    @property
    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        return self.dataset.mean, self.dataset.std

    @cached_property
    def _own_reader(self) -> OwnReader:
        return OwnReader(self.train_pool, self.placement)

    @cached_property
    def examples(self) -> Examples:
        """The training examples that matching and BatchNorm look at."""
        return Examples(
            self._fields,
            self.dataset,
            self.division,
            self._rows,
            lambda: self._own_reader,
            self.placement,
        )

    def merge_data(self, round_number: int) -> MergeData:
        """Returns the examples that a round's communication looks at."""
        recalibrate = None
        if self.recalibrates == "communication":
            recalibrate = self.examples.choose(
                selection.BATCH_NORM, "own", round_number
            )
        return MergeData(self.match_samples(round_number), recalibrate)

    def match_samples(self, round_number: int) -> Samples | None:
        """Returns the examples on which units are matched; None if none are needed."""
        if selection.MATCH_DATA not in self.record.reads:
            return None
        return self.examples.choose(selection.MATCH, "own", round_number)

    @property
    def recalibrates(self) -> str:
        """When BatchNorm statistics are measured anew; "" if they never are.

        See `batch_norm.when`.
        """
        measured = self._fields[selection.BN_DATA.path] != "none"
        has_statistics = self.task.batch_statistics is not None
        when = self._fields[selection.BN_WHEN.path]
        return when if measured and has_statistics else ""

    def initial_variables(self) -> Variables:
        """Draws the agents' variables before any training, stacked."""
        # One agent's program compiles faster than one for all of them, and it runs just
        # once for each agent.
        init = jax.jit(self._init)
        keys = self.placement.keys(self.key("init"))
        same = self.config.init == "same"
        return put_each(self.placement, lambda i: init(keys[0 if same else i]))

    def abstract_variables(self) -> Variables:
        """Returns shapes, dtypes and shardings of the stacked variables of agents."""
        one = jax.eval_shape(self._init, jax.random.key(0))
        slots, sharding = self.placement.slots, self.placement.sharding
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (slots, *x.shape), x.dtype, sharding=sharding
            ),
            one,
        )

    def verify_spec(self, variables: Variables | None = None) -> None:
        """Checks the permutation spec, in train and eval mode.

        Args:
            variables: one agent's variables. By default new ones are drawn.

        Raises:
            PermutationSpecError: the declared symmetry does not hold.
        """
        init_key, verify_key = jax.random.split(self.key("verify"))
        if variables is None:
            variables = jax.jit(self._init)(init_key)
        self._verification(variables, verify_key)

    @cached_property
    def _verification(self) -> Verification:
        # With few examples, BatchNorm of a map of one pixel magnifies rounding.
        inputs = self._example_inputs(32)
        return Verification(self.task.spec, classifier.both_modes(self.model), inputs)

    @property
    def convolves(self) -> bool:
        """Whether the model has convolutions."""
        return has_convolution(self._traced_init.jaxpr)

    def _init(self, key: Key[Array, ""]) -> Variables:
        return classifier.init(self.model, key, self._example_inputs(1))

    def _example_inputs(self, n: int) -> np.ndarray:
        return normalised(self.dataset, self.dataset.train.images[:n])

    def key(self, purpose: str) -> Key[Array, ""]:
        """Returns the key of all random numbers on the devices for a purpose."""
        return _randomness.key(self.config.seed, purpose)

    def seeds(self, purpose: str) -> Sequence[int]:
        """Returns seeds for `numpy.random.default_rng`, on the host, for a purpose."""
        return _randomness.seeds(self.config.seed, purpose)
