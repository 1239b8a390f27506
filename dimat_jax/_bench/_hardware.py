"""The machines for which `dimat bench scale` predicts the speed."""

from typing import NamedTuple

import numpy as np

__all__ = ["Hardware"]


class Hardware(NamedTuple):
    """The machines that a prediction is for.

    Attributes:
        bandwidth: what a device can send, and receive at the same time, in Gbit/s. The
            default is that of common Ethernet in a data centre.
        latency: the milliseconds from the start of a message to its arrival.
        agents_per_device: the number of agents that share a device.
        speed: how many times faster a device computes than the measured one.
    """

    bandwidth: float = 10.0
    latency: float = 0.1
    agents_per_device: int = 1
    speed: float = 1.0

    def exchange_seconds(self, by_link: np.ndarray) -> float:
        """Computes how long an exchange of `[receiver, sender]` bytes takes.

        A device starts one message after the other, and sends while it receives. The
        device with the most bytes decides. Agents on one device send it nothing.
        """
        devices = -(-len(by_link) // self.agents_per_device)
        starts = np.arange(devices) * self.agents_per_device
        between = np.add.reduceat(np.add.reduceat(by_link, starts, 0), starts, 1)
        np.fill_diagonal(between, 0)
        most_bytes = max(between.sum(axis=0).max(), between.sum(axis=1).max())
        receivers = int(np.count_nonzero(between, axis=0).max())
        return self.latency / 1000 * receivers + 8 * float(most_bytes) / (
            1e9 * self.bandwidth
        )
