"""From a config to the parts that a run is made of."""

import inspect
from collections.abc import Sequence
from functools import cached_property

import jax
import numpy as np
import optax
from jaxtyping import Array, Key

from dimat_jax import models, permutation
from dimat_jax.algorithms import (
    ALGORITHMS,
    MERGING,
    WATCHING,
    Algorithm,
    MergeData,
    Options,
    Task,
    check_links,
)
from dimat_jax.algorithms.base import Variables
from dimat_jax.algorithms.conditions import no_negative_weights
from dimat_jax.algorithms.local import local
from dimat_jax.arguments import (
    Config,
    ConfigError,
    compressor,
    faults,
    gossip_options,
    merge_options,
    model_arguments,
    needed,
    optimizer_name,
    options_for,
)
from dimat_jax.config import check
from dimat_jax.data import sources
from dimat_jax.data.partition import PARTITIONS, Shard, partition
from dimat_jax.data.pipeline import Reader, Sampler, Samples, draw_own, place_pool
from dimat_jax.evaluate import Evaluator
from dimat_jax.mixing import MIXINGS, check_mixing_matrix, uniform
from dimat_jax.models import classifier
from dimat_jax.network import Links, Network
from dimat_jax.optimizers import OPTIMIZERS, SCHEDULES
from dimat_jax.placement import place
from dimat_jax.topology import TOPOLOGIES, read_matrix
from dimat_jax.tree import stack

__all__ = ["Experiment", "check_network"]


class Experiment:
    """Everything that a config asks for, built and checked; nothing is written.

    Args:
        config: as `config.default_config` describes.

    Raises:
        UserError: a config that cannot be run.
    """

    def __init__(self, config: Config):
        check(config)
        self.config = config
        self._placed: dict[int, tuple[Network, Network]] = {}
        self.links = check_network(config)
        n_agents = _n_agents(config)
        self.dataset = sources.load(
            config.data.name,
            directory=config.data.dir or None,
            cache_dir=config.data.cache_dir or None,
            train_size=config.data.train_size or None,
            test_size=config.data.test_size or None,
            seed=config.seed,
        )
        self.shards = self._partition(config.data.partition, n_agents)
        pretrain_shards = self.shards
        if config.pretrain.partition:
            pretrain_shards = self._partition(config.pretrain.partition, n_agents)
        self._check_sizes()

        devices = jax.devices()
        if devices[0].platform == "cpu":
            devices = devices[: config.placement.cpu_devices]
        self.placement = place(n_agents, devices, config.placement.batching)
        self.model = models.MODELS[config.model.name](
            n_classes=self.dataset.n_classes, **model_arguments(config)
        )
        self.task = Task(
            loss=classifier.loss(self.model),
            spec=models.permutation_spec(self.model),
            activations=classifier.activations(self.model),
            batch_statistics=classifier.batch_statistics(self.model),
        )
        if self.task.batch_statistics is not None and needed(config).graph:
            no_negative_weights(f"{config.algorithm} with BatchNorm", self.links)
        self.sampler = Sampler(self.shards, config.batch_size, self.seeds("order"))
        self.pretrain_sampler = Sampler(
            pretrain_shards, config.pretrain.batch_size, self.seeds("pretrain_order")
        )
        self.pretrain_steps = (
            config.pretrain.epochs * self.pretrain_sampler.steps_per_epoch
        )
        self.local_steps = (
            config.local_steps or config.local_epochs * self.sampler.steps_per_epoch
        )
        self.pretrain_algorithm = local(
            self.task,
            _optimizer(
                config.pretrain.optimizer.name,
                config.pretrain.optimizer,
                self.pretrain_sampler.steps_per_epoch,
                self.pretrain_steps,
            ),
            self.placement,
        )
        self.algorithm: Algorithm = ALGORITHMS[config.algorithm](
            self.task,
            _optimizer(
                optimizer_name(config),
                config.optimizer,
                self.sampler.steps_per_epoch,
                config.rounds * self.local_steps,
            ),
            self.placement,
            Options(
                merge=merge_options(config),
                gossip=gossip_options(config),
                compressor=compressor(config),
                edges=self.links.edges,
                changing=self.links.changes,
                examples=[len(shard) for shard in self.shards],
            ),
        )

    def _partition(self, name: str, n_agents: int) -> list[Shard]:
        options = options_for(self.config, "data", PARTITIONS[name])
        labels, seed = self.dataset.train.labels, self.config.seed
        return partition(name, labels, n_agents, seed=seed, **options)

    def network_at_round(self, round_number: int) -> Network:
        """The network that a round's communication has. Rounds count from 1."""
        return self.links.at_round(round_number, self.placement.slots)

    def network_at_step(self, step: int, round_number: int) -> Network:
        """The network of a local step of a round; steps count from the first round."""
        return self.links.at_step(step, round_number, self.placement.slots)

    def placed(self, network: Network) -> Network:
        """A network on all devices. Of one that comes again it is kept there."""
        if id(network) not in self._placed:
            if len(self._placed) == _NETWORKS_KEPT:
                self._placed.clear()
            # The key is the network's as long as the network is there.
            self._placed[id(network)] = network, self.placement.replicate(network)
        return self._placed[id(network)][1]

    @cached_property
    def train_pool(self):
        """The training images, on the devices."""
        dataset = self.dataset
        return place_pool(dataset.train, dataset.mean, dataset.std, self.placement)

    @cached_property
    def evaluator(self) -> Evaluator:
        """Evaluates on the test images, the same ones every time."""
        dataset, options = self.dataset, self.config.eval
        pool = place_pool(dataset.test, dataset.mean, dataset.std, self.placement)
        subset = self._subset("eval", len(dataset.test.labels), options.samples)
        samples = Reader(pool, self.placement).shared(subset, options.batch_size)
        return Evaluator(classifier.forward(self.model), samples, self.placement)

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self.train_pool, self.placement)

    def merge_data(self, round_number: int) -> MergeData:
        """What merging looks at in a round."""
        merge = self.config.merge
        watching = self.config.algorithm in WATCHING
        match_data = merge.match_data if watching else "none"
        return MergeData(
            match=self._samples(match_data, merge.match_samples, round_number),
            recalibrate=self._samples(merge.bn_data, merge.bn_samples, round_number),
        )

    def _samples(self, policy: str, size: int, round_number: int) -> Samples | None:
        batch_size = self.config.merge.batch_size
        everything = len(self.dataset.train.labels)
        match policy:
            case "none":
                return None
            case "own":
                seed = [*self.seeds("own"), round_number]
                return self._reader.own(draw_own(self.shards, size, seed), batch_size)
            case "proxy":
                subset = self._subset("proxy", everything, size)
                return self._reader.shared(subset, batch_size)
            case _:
                subset = self._subset("proxy", everything, 0)
                return self._reader.shared(subset, batch_size)

    def _subset(self, purpose: str, available: int, size: int) -> np.ndarray:
        """`size` (0: all) of the indices below `available`, fixed by the seed.

        Shuffled: some data sets are stored class by class, and the statistics of
        batches of one class say little about those of all.
        """
        rng = np.random.default_rng(self.seeds(purpose))
        return rng.permutation(available)[: size or None]

    def initial_variables(self) -> Variables:
        """The agents' variables before any training, stacked."""
        # Compiled for one agent, not unrolled over all: it runs just once for each.
        init = jax.jit(self._init)
        keys = self.placement.keys(self.key("init"))
        same = self.config.init == "same"
        agents = [init(keys[0 if same else i]) for i in range(len(self.shards))]
        return self.placement.put(stack(agents))

    def abstract_variables(self) -> Variables:
        """Shapes and dtypes of the agents' variables, `[agents, ...]`."""
        one = jax.eval_shape(self._init, jax.random.key(0))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((len(self.shards), *x.shape), x.dtype), one
        )

    def verify_spec(self) -> None:
        """Checks the permutation spec, in train and eval mode, on fresh variables.

        Raises:
            PermutationSpecError: the declared symmetry does not hold.
        """
        init_key, verify_key = jax.random.split(self.key("verify"))
        permutation.verify(
            self.task.spec,
            classifier.both_modes(self.model),
            jax.jit(self._init)(init_key),
            # Few examples, and BatchNorm of a map of one pixel, magnify rounding.
            self._example_inputs(32),
            verify_key,
        )

    def _init(self, key: Key[Array, ""]) -> Variables:
        """One agent's fresh variables."""
        return classifier.init(self.model, key, self._example_inputs(1))

    def _example_inputs(self, n: int) -> np.ndarray:
        images = self.dataset.train.images[:n].astype(np.float32)
        return (images - self.dataset.mean) / self.dataset.std

    def key(self, purpose: str) -> Key[Array, ""]:
        """The root of everything random, on the devices, that has this purpose."""
        return jax.random.fold_in(
            jax.random.key(self.config.seed), _PURPOSES.index(purpose)
        )

    def seeds(self, purpose: str) -> Sequence[int]:
        """As `key`, on the host: entropy for `numpy.random.default_rng`."""
        return [self.config.seed, _PURPOSES.index(purpose)]

    def _check_sizes(self) -> None:
        merge = self.config.merge
        n_train = len(self.dataset.train.labels)
        n_test = len(self.dataset.test.labels)
        sizes = {"eval.samples": (self.config.eval.samples, n_test)}
        # Agents may own fewer than are asked for; a proxy has to be what it says.
        if merge.match_data == "proxy" and self.config.algorithm in WATCHING:
            sizes["merge.match_samples"] = (merge.match_samples, n_train)
        if merge.bn_data == "proxy" and self.config.algorithm in MERGING:
            sizes["merge.bn_samples"] = (merge.bn_samples, n_train)
        for field, (size, available) in sizes.items():
            if size > available:
                raise ConfigError(
                    f"config.{field} is {size}, but there are only {available} images"
                )


# On the devices, so that a few that take turns are sent there once.
_NETWORKS_KEPT = 64

# Appending is fine; a change of order changes every run.
_PURPOSES = (
    "init",
    "pretrain",
    "rounds",
    "communicate",
    "verify",
    "order",
    "pretrain_order",
    "proxy",
    "own",
    "eval",
)


def check_network(config: Config) -> Links:
    """The network that a config asks for, if its algorithm can use it.

    Raises:
        UserError: there is no such network, or the algorithm cannot.
    """
    links = _links(config, _n_agents(config))
    check_links(config.algorithm, links, merge_options(config))
    return links


def _n_agents(config: Config) -> int:
    # The ceiling: one model, which sees all data.
    return 1 if config.algorithm == "centralized" else config.agents


def _links(config: Config, n_agents: int) -> Links:
    if not needed(config).graph:
        # Nor need there be one of this name for them.
        return Links(TOPOLOGIES["disconnected"](n_agents), uniform, faults(config))
    make = TOPOLOGIES[config.topology]
    options = options_for(config, "graph", make)
    if "degree" in options:
        options["degree"] = options["degree"] or None
    if "seed" in inspect.signature(make).parameters:
        options["seed"] = config.seed
    mixing = MIXINGS.get(config.mixing)
    if mixing is None:  # file
        mixing = check_mixing_matrix(read_matrix(config.graph.file, n_agents))
    return Links(make(n_agents, **options), mixing, faults(config))


def _optimizer(
    name: str, config: Config, steps_per_epoch: int, total_steps: int
) -> optax.GradientTransformation:
    schedule = SCHEDULES[config.schedule](
        config.learning_rate,
        decay=config.decay,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )
    return OPTIMIZERS[name](
        schedule, momentum=config.momentum, weight_decay=config.weight_decay
    )
