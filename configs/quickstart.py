"""Five agents learn handwritten digits (8 x 8 pixels). It takes seconds on a CPU.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/digits

The digits come with scikit-learn, so nothing is downloaded. An argument chooses the
algorithm: `--config=configs/quickstart.py:wa`. Options that this
algorithm does not read keep their defaults. `make demo` runs the whole comparison,
`configs/sweeps/quickstart.py`.
"""

from dimat_jax.config import default_config, drop_unread


def get_config(algorithm: str = "dimat"):
    """Makes the config: MLPs from different weights train 30 epochs, then 10 rounds."""
    config = default_config()
    config.algorithm = algorithm or "dimat"
    config.rounds = 10
    config.local_epochs = 2
    config.batch_size = 32
    config.data.name = "digits"
    config.model.name = "mlp"
    config.optimizer.learning_rate = 1e-3
    config.pretrain.epochs = 30
    config.pretrain.batch_size = 32
    config.merge.frame = "reference"
    config.merge.stay = 0.1
    config.merge.opt_state = "merge"
    config.merge.match_samples = 0
    config.batch_norm.data = "none"
    config.merge.batch_size = 500
    return drop_unread(config)
