"""One model trained by a plain Flax and optax loop, as a user would write it by hand.

It is a yardstick for the programs of this package. So it uses nothing of the package
but the sizes and the data: neither its models nor its training step. It has no masks,
no taps, no augmentation and no stacked agents.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dimat_jax._bench._plain import Plain
from dimat_jax._bench._worker import Program, jax_program

__all__ = ["MLP", "ResNet", "build", "flax_loop", "make_step"]


class Block(nn.Module):
    """Two 3x3 convolutions; the shortcut is a third one where the shape changes."""

    channels: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x, train: bool):
        def conv_norm(x, stride):
            x = nn.Conv(
                self.channels,
                (3, 3),
                stride,
                [(1, 1), (1, 1)],
                use_bias=False,
                dtype=self.dtype,
            )(x)
            return nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype)(x)

        y = nn.relu(conv_norm(x, self.stride))
        y = conv_norm(y, 1)
        if x.shape[-1] != self.channels:
            x = conv_norm(x, self.stride)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A ResNet for CIFAR: a 3x3 convolution, three stages and a dense layer."""

    blocks: int
    channels: tuple[int, ...]
    n_classes: int
    dtype: Any

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(self.channels[0], (3, 3), use_bias=False, dtype=self.dtype)(x)
        x = nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype)(x)
        x = nn.relu(x)
        for stage, channels in enumerate(self.channels):
            for block in range(self.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Block(channels, stride, self.dtype)(x, train)
        return nn.Dense(self.n_classes, dtype=self.dtype)(x.mean((1, 2)))


class MLP(nn.Module):
    """Dense layers with ReLU between them."""

    units: tuple[int, ...]
    n_classes: int
    dtype: Any

    @nn.compact
    def __call__(self, x, train: bool):
        del train
        x = x.reshape(len(x), -1)
        for units in self.units:
            x = nn.relu(nn.Dense(units, dtype=self.dtype)(x))
        return nn.Dense(self.n_classes, dtype=self.dtype)(x)


def build(plain: Plain) -> nn.Module:
    """Builds the model."""
    dtype = jnp.dtype(plain.dtype)
    if plain.blocks:
        return ResNet(plain.blocks, plain.units, plain.n_classes, dtype)
    return MLP(plain.units, plain.n_classes, dtype)


def make_step(
    model: nn.Module, tx: optax.GradientTransformation
) -> Callable[..., tuple[Any, ...]]:
    """Returns the jitted step.

    It is `step(params, stats, opt_state, images, labels) -> (params, stats, opt_state,
    loss)`. The memory of the first three arguments is reused.
    """

    def step(params, stats, opt_state, images, labels):
        def loss(params):
            logits, state = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(
                jnp.asarray(logits, jnp.float32), labels
            )
            return losses.mean(), state.get("batch_stats", {})

        (value, new_stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), new_stats, opt_state, value

    return jax.jit(step, donate_argnums=(0, 1, 2))


def flax_loop(plain: dict[str, Any], steps: int) -> Program:
    """Makes a program that takes `steps` steps of Adam in a call.

    Its facts are the losses of the steps.
    """
    sizes = Plain.of(plain)
    model, tx = build(sizes), optax.adam(sizes.learning_rate)
    # Slices of one large array would be copies, made within the timing.
    images, labels = (list(map(jnp.asarray, x)) for x in sizes.batches(steps))
    variables = model.init(jax.random.key(0), images[0], False)
    params = variables["params"]
    state = (params, variables.get("batch_stats", {}), tx.init(params))
    step = make_step(model, tx)

    def call() -> dict[str, Any]:
        nonlocal state
        losses = []
        for image, label in zip(images, labels, strict=True):
            *state, loss = step(*state, image, label)
            losses.append(loss)
        return {"losses": [float(loss) for loss in losses]}

    return jax_program(call)
