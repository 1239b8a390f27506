"""Five agents learn handwritten digits (8 x 8 pixels). It takes seconds on a CPU.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/digits

The digits come with scikit-learn, so nothing is downloaded. An argument chooses the
algorithm: `--config=configs/quickstart.py:wa`. Options that this
algorithm does not read keep their defaults. Units are matched on each agent's own
images. `make demo` runs the whole comparison, `configs/sweeps/quickstart.py`.
"""

from dimat_jax.config import default_config, drop_unread

# The learning rates, on digits, of the algorithms that take SGD or an optimizer of
# their own. configs/sweeps/learning_rates.py runs the grid from which they come. The
# others take Adam, at its own rate.
LEARNING_RATES = {
    "fedavg": 0.3,
    "fedprox": 0.3,
    "scaffold": 0.1,
    "cdsgd": 0.3,
    "cdmsgd": 0.3,
    "cdadam": 0.01,
    "sgp": 0.3,
    "d2": 0.3,
    "dsgt": 0.3,
    "qgm": 0.3,
    "cga": 0.3,
    "compcga": 0.3,
    "choco": 0.3,
    "relaysgd": 1.0,
}


def get_config(algorithm: str = "dimat"):
    """Makes the config: MLPs from different weights train 30 epochs, then 10 rounds."""
    config = default_config()
    config.algorithm = algorithm or "dimat"
    config.rounds = 10
    config.local_epochs = 2
    config.batch_size = 32
    config.data.name = "digits"
    config.model.name = "mlp"
    if config.algorithm == "relaysgd":
        config.topology = "path"  # It relays models along a tree.
    config.optimizer.learning_rate = LEARNING_RATES.get(config.algorithm, 0.0)
    config.pretrain.epochs = 30
    config.pretrain.batch_size = 32
    config.merge.frame = "reference"
    config.merge.stay = 0.1
    config.merge.opt_state = "merge"
    config.merge.match_samples = 0
    config.batch_norm.data = "none"
    config.merge.batch_size = 500
    return drop_unread(config)
