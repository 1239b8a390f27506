"""Five agents learn a text, character by character, with a small transformer.

    python -m experiments.train --config=configs/text.py --workdir=runs/text

The text is Python's own reference manual, which comes with Python (465,000 characters);
`--config.data.dir=FILE.txt` names another one. Each agent has a passage of it. The
metric is the perplexity of the next character. An argument chooses the algorithm:
`--config=configs/text.py:wa`. A run takes about 2 minutes on 2 CPU cores.
"""

from dimat_jax.config import default_config, drop_unread

# The learning rates of the algorithms that take SGD. The others take Adam.
LEARNING_RATES = {"cdsgd": 0.5}


def get_config(algorithm: str = "dimat"):
    """Makes the config: agents of different weights train 5 epochs, then 5 rounds."""
    config = default_config()
    config.algorithm = algorithm or "dimat"
    config.task = "language_modelling"
    config.data.name = "text"
    config.data.partition = "contiguous"
    config.model.name = "gpt"
    config.model.width = 0.5
    config.model.depth = 2
    config.rounds = 5
    config.local_epochs = 1
    config.batch_size = 32
    config.optimizer.learning_rate = LEARNING_RATES.get(config.algorithm, 0.0)
    config.pretrain.epochs = 5
    config.pretrain.batch_size = 32
    config.merge.frame = "reference"
    config.merge.stay = 0.1
    config.merge.opt_state = "merge"
    config.merge.match_samples = 100
    config.eval.samples = 200
    config.eval.batch_size = 100
    return drop_unread(config)
