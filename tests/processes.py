"""Small runs, and the program of a process that does some with other processes.

python -m tests.processes DIR HOST:PORT N_PROCESSES PROCESS_ID NAME [NAME ...]
"""

import sys
from pathlib import Path

from configs import quickstart
from dimat_jax import _processes, train
from dimat_jax.config import Config, drop_unread
from dimat_jax.placement import request_cpu_devices

# What distinguishes the runs.
RUNS: dict[str, dict[str, object]] = {
    "own frames, own data, BatchNorm": {
        "algorithm": "dimat",
        "merge.frame": "own",
        "merge.match_data": "own",
        "merge.match_samples": 40,
        "batch_norm.data": "own",
        "batch_norm.samples": 40,
        "model.norm": "batch",
        # Adam's first steps would magnify the rounding of BatchNorm.
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.05,
        "pretrain.optimizer.name": "sgd",
        "pretrain.optimizer.learning_rate": 0.1,
    },
    # Five agents do not fill four devices, and edges do not fill waves.
    "reference frame, five agents": {
        "algorithm": "dimat",
        "agents": 5,
        "merge.frame": "reference",
        "merge.match_samples": 60,
    },
    "joint frame by weights": {"algorithm": "wm", "merge.frame": "joint"},
    "averages": {"algorithm": "wa"},
    "gossip": {"algorithm": "cdsgd"},
    "push-sum": {"algorithm": "sgp", "topology": "exponential"},
}


def config_of(name: str, cpu_devices: int, cache_dir: str = "") -> Config:
    """Makes the config of a run of a few seconds."""
    fields = {
        "agents": 4,
        "rounds": 2,
        "local_epochs": 1,
        "data.train_size": 200,
        "data.test_size": 50,
        "pretrain.epochs": 2,
        "pretrain.cache_dir": cache_dir,
        "eval.batch_size": 50,
        "merge.batch_size": 50,
        "model.width": 0.125,
        "placement.cpu_devices": cpu_devices,
        **RUNS[name],
    }
    config = quickstart.get_config(str(fields["algorithm"]))
    config.update_from_flattened_dict(fields)
    return drop_unread(config)


def run_all(names: list[str], directory: Path, cpu_devices: int) -> None:
    """Does some of the runs, each in a folder of its own."""
    for name in names:
        config = config_of(name, cpu_devices, str(directory / "pretrained"))
        train.run(config, directory / name)


if __name__ == "__main__":
    _, folder, coordinator, n_processes, process_id, *names = sys.argv
    request_cpu_devices(2)
    with _processes.joined(
        coordinator,
        int(n_processes),
        int(process_id),
        arrival_timeout=60,
        heartbeat_timeout=60,
    ):
        run_all(names, Path(folder), cpu_devices=2)
    _processes.leave(0)
