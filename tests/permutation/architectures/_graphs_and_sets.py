"""Networks on graphs, on sets, and on coordinates."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.permutation.architectures._model import (
    Architecture,
    linen,
    normal,
    plain,
)

__all__ = ["ARCHITECTURES"]

NODES, EDGES = 40, 120
CLASSES = 3


def a_graph() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes with 4 features, and the sender and the receiver of each edge."""
    rng = np.random.default_rng(0)
    ends = rng.integers(0, NODES, (2, EDGES)).astype(np.int32)
    return normal(NODES, 4), ends[0], ends[1]


def summed(messages, receivers):
    return jax.ops.segment_sum(messages, receivers, NODES)


class GCN(nn.Module):
    """Kipf and Welling 2017: layers that average over neighbours."""

    @nn.compact
    def __call__(self, graph):
        x, senders, receivers = graph
        degree = 1 + summed(jnp.ones(len(senders)), receivers)
        for units in (5, 6):
            x = nn.Dense(units)(x)
            x = nn.relu((x + summed(x[senders], receivers)) / degree[:, None])
        return nn.Dense(CLASSES)(x)


def gat(w, graph):
    """Velickovic et al. 2018: heads that attend to neighbours; GAT's own scores."""
    x, senders, receivers = graph
    h = jnp.einsum("nf,fhd->nhd", x, w("w", 4, 2, 5))
    to, of = (h * w(name, 2, 5) for name in ("to", "of"))
    scores = jnp.exp(jax.nn.leaky_relu(to.sum(-1)[receivers] + of.sum(-1)[senders]))
    norm = summed(scores, receivers)[receivers] + 1e-3
    y = summed((scores / norm)[..., None] * h[senders], receivers)
    return jax.nn.elu(y).reshape(len(x), 10) @ w("out", 10, CLASSES)


def message_passing(w, graph):
    """Gilmer et al. 2017: messages from pairs of nodes, and a gated update."""
    x, senders, receivers = graph
    h = jnp.tanh(x @ w("encode", 4, 5))
    for _ in range(2):
        ends = jnp.concatenate([h[senders], h[receivers]], axis=-1)
        messages = jax.nn.relu(ends @ w("message", 10, 7)) @ w("sum", 7, 6)
        arrived = summed(messages, receivers)
        gate = jax.nn.sigmoid(arrived @ w("gate", 6, 5) + h @ w("keep", 5, 5))
        h = gate * h + (1 - gate) * jnp.tanh(arrived @ w("update", 6, 5))
    return h @ w("out", 5, CLASSES)


def schnet(w, atoms):
    """Schuett et al. 2017: filters that a network makes from distances."""
    kinds, places = atoms
    x = w("embed", 3, 6)[kinds]
    gaps = places[:, :, None] - places[:, None]
    apart = jnp.sqrt((gaps**2).sum(-1) + 1e-3)
    waves = jnp.exp(-((apart[..., None] - jnp.linspace(0, 3, 5)) ** 2))
    filters = jax.nn.softplus(waves @ w("filter1", 5, 8)) @ w("filter2", 8, 7)
    y = jnp.einsum("bjf,bijf->bif", x @ w("in", 6, 7), filters)
    x = x + jax.nn.softplus(y @ w("out1", 7, 9)) @ w("out2", 9, 6)
    return (jax.nn.softplus(x @ w("read1", 6, 4)) @ w("read2", 4, 1)).sum((1, 2))


def set_transformer(w, sets):
    """Lee et al. 2019: members and a few learned points attend to each other."""

    def attend(name, x, y, width):
        q, k = x @ w(f"{name}/q", x.shape[-1], 5), y @ w(f"{name}/k", y.shape[-1], 5)
        v = y @ w(f"{name}/v", y.shape[-1], width)
        return jax.nn.softmax(jnp.einsum("bid,bjd->bij", q, k)) @ v

    points = jnp.broadcast_to(w("points", 4, 6), (len(sets), 4, 6))
    h = points + attend("in", points, sets, 6)
    y = attend("out", sets, h, 7)
    return y.mean(1) @ w("head", 7, CLASSES)


def point_net(w, points):
    """Qi et al. 2017: a small network makes a matrix that turns the points."""
    matrix = jax.nn.relu(points @ w("t1", 3, 5)).max(1) @ w("t2", 5, 9)
    turned = points @ (matrix.reshape(-1, 3, 3) + jnp.eye(3))
    h = jax.nn.relu(turned @ w("one", 3, 6))
    h = jax.nn.relu(h @ w("two", 6, 7)).max(1)
    return h @ w("out", 7, CLASSES)


def nerf(w, rays):
    """Mildenhall et al. 2020: waves of the place, which are read twice."""
    waves = rays[..., None] * 2.0 ** jnp.arange(2)
    waves = jnp.concatenate([jnp.sin(waves), jnp.cos(waves)], -1)
    waves = waves.reshape(len(rays), -1)
    h = jax.nn.relu(waves @ w("one", 12, 6))
    h = jax.nn.relu(jnp.concatenate([h, waves], -1) @ w("two", 18, 7))
    density = jax.nn.softplus(h @ w("density", 7, 1))
    h = jax.nn.relu(jnp.concatenate([h @ w("three", 7, 5), rays], -1) @ w("four", 8, 4))
    return jnp.concatenate([density, jax.nn.sigmoid(h @ w("color", 4, 3))], -1)


def _atoms() -> tuple[np.ndarray, np.ndarray]:
    kinds = np.random.default_rng(0).integers(0, 3, (24, 5)).astype(np.int32)
    return kinds, normal(24, 5, 3)


ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "GCN": lambda: linen(GCN(), a_graph(), [(5,), (6,)]),
    # The heads, and the features within each.
    "GAT": lambda: plain(gat, a_graph(), [(2,), (5,)]),
    # The state of a node, the units of a message's network, and the message.
    "message passing": lambda: plain(message_passing, a_graph(), [(5,), (7,), (6,)]),
    # The stream, the filter's units, the filter, and two more layers.
    "SchNet": lambda: plain(schnet, _atoms(), [(6,), (8,), (7,), (9,), (4,)]),
    # The learned points; the stream of the points; queries and keys of two
    # attentions; and the values of the second.
    "set transformer": lambda: plain(
        set_transformer, normal(24, 5, 4), [(4,), (6,), (5,), (5,), (7,)]
    ),
    # The matrix that turns points holds coordinates, which are inputs.
    "PointNet": lambda: plain(point_net, normal(24, 5, 3), [(5,), (6,), (7,)], "iota"),
    "NeRF": lambda: plain(nerf, normal(64, 3), [(6,), (7,), (5,), (4,)]),
}
