"""ResNet-20 on CIFAR-100, by the paper's protocol or in a small form for a CPU.

    python -m experiments.train --config=configs/cifar100_resnet20.py \
        --config.data.dir=DATA --workdir=DIR

Agents train alone for 100 epochs, and then for 100 rounds of [merge, evaluate, 2 local
epochs]. The network is 8 times as wide as He et al.'s ResNet-20. Agents use Adam at
1e-3 and batches of 100. The paper reports these accuracies for DIMAT (5 agents, fully
connected / ring): IID 73.99 / 69.07 %, by class 62.05 / 20.45 %.

    --config=configs/cifar100_resnet20.py:small

has the same protocol in small: width 1, 10,000 training and 2,000 test images, batches
of 50, 1,000 images of each agent's own for matching, a proxy of 1,000 images for
BatchNorm, 10 epochs alone, and 4 rounds of one epoch. It takes about 13 minutes on 2
cores. An algorithm's name may follow, as in `cifar100_resnet20.py:small-wa`; options
that this algorithm does not read keep their defaults.

    --config=configs/cifar100_resnet20.py:bench

is the small form with the paper's batches of 100 and with random images instead of
files. `dimat bench` times it.
"""

from dimat_jax.algorithms import ALGORITHMS
from dimat_jax.config import default_config, drop_unread


def get_config(argument: str = "paper"):
    """Makes the config.

    Args:
        argument: "paper", "small" or "bench"; an algorithm may follow: "small-wa".
    """
    form, _, algorithm = argument.partition("-")
    config = default_config()
    config.algorithm = algorithm or "dimat"
    config.data.name = "cifar100"
    config.augmentation.flip = True
    config.augmentation.pad = 4
    config.model.width = 8
    # The published code uses all training images; a few thousand do as well.
    config.merge.match_data = "global"
    config.batch_norm.data = "global"
    record = ALGORITHMS.get(config.algorithm)
    if record is not None and record.optimizer in ("sgd", "heavy_ball"):
        # The paper's baselines take SGD, at a rate that falls after every epoch.
        config.optimizer.learning_rate = 0.01
        config.optimizer.schedule = "exponential"
    match form:
        case "paper" | "":
            pass
        case "small":
            _shrink(config)
        case "bench":
            _shrink(config)
            config.data.name = "random"
            config.batch_size = config.pretrain.batch_size = 100
        case _:
            raise ValueError(
                f"the config's argument is paper, small or bench, got {form!r}"
            )
    return drop_unread(config)


def _shrink(config) -> None:
    config.rounds = 4
    config.local_epochs = 1
    config.batch_size = 50
    config.data.train_size = 10_000
    config.data.test_size = 2_000
    config.model.width = 1
    config.pretrain.epochs = 10
    config.pretrain.batch_size = 50
    config.pretrain.checkpoint_every = 1
    config.merge.match_data = "own"
    config.batch_norm.data = "proxy"
