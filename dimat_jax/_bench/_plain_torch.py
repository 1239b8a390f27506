"""One model trained by a plain PyTorch loop: the model and steps of `_plain_flax`."""

from typing import Any

from dimat_jax._bench._plain import Plain
from dimat_jax._bench._worker import Program, Unavailable

__all__ = ["build", "torch_loop"]


def torch_loop(plain: dict[str, Any], steps: int, memory_format: str) -> Program:
    """Makes a program that takes `steps` steps of Adam in a call, on a GPU if any.

    Its facts are the losses of the steps.

    Args:
        plain: the sizes; see `Plain.of`.
        steps: the number of steps in a call.
        memory_format: "contiguous_format" (NCHW) or "channels_last" (NHWC).

    Raises:
        Unavailable: PyTorch is not installed.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise Unavailable(
            "PyTorch is not installed; pip install 'dimat_jax[torch]'"
        ) from None
    sizes = Plain.of(plain)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = getattr(torch, memory_format)
    images, labels = map(torch.from_numpy, sizes.batches(steps))
    labels = labels.long().to(device)
    # The memory format concerns arrays of four dimensions, so every batch gets it.
    batches = [
        image.permute(0, 3, 1, 2).to(device).contiguous(memory_format=layout)
        for image in images
    ]
    model = build(sizes).to(device).to(memory_format=layout)
    optimizer = torch.optim.Adam(model.parameters(), lr=sizes.learning_rate)
    in_bfloat16 = torch.autocast(
        device.type, torch.bfloat16, enabled=sizes.dtype == "bfloat16"
    )

    def call() -> dict[str, Any]:
        losses = []
        for image, label in zip(batches, labels, strict=True):
            optimizer.zero_grad()
            with in_bfloat16:
                loss = torch.nn.functional.cross_entropy(model(image), label)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        # `item` waits for the device.
        return {"losses": [loss.item() for loss in losses]}

    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        peak = torch.cuda.max_memory_allocated
    else:
        name, peak = f"cpu, {torch.get_num_threads()} threads", lambda: None
    return Program(call, f"{name}, PyTorch {torch.__version__}", peak)


def build(plain: Plain) -> Any:
    """Builds the model, a `torch.nn.Module`. Images are `[batch, channels, h, w]`."""
    # The import takes seconds, and PyTorch is no requirement of the package.
    from torch import nn

    if not plain.blocks:
        height, width, channels = plain.image
        layers, inputs = [nn.Flatten()], height * width * channels
        for units in plain.units:
            layers += [nn.Linear(inputs, units), nn.ReLU()]
            inputs = units
        return nn.Sequential(*layers, nn.Linear(inputs, plain.n_classes))

    def conv_norm(inputs: int, outputs: int, stride: int) -> list[Any]:
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        return [conv, nn.BatchNorm2d(outputs)]

    class Block(nn.Module):
        """Two convolutions; the shortcut is a third where the shape changes."""

        def __init__(self, inputs: int, outputs: int, stride: int):
            super().__init__()
            self.body = nn.Sequential(
                *conv_norm(inputs, outputs, stride),
                nn.ReLU(),
                *conv_norm(outputs, outputs, 1),
            )
            changes = conv_norm(inputs, outputs, stride) if inputs != outputs else []
            self.shortcut = nn.Sequential(*changes)

        def forward(self, x):
            return nn.functional.relu(self.body(x) + self.shortcut(x))

    layers = [*conv_norm(plain.image[-1], plain.units[0], 1), nn.ReLU()]
    inputs = plain.units[0]
    for stage, units in enumerate(plain.units):
        for block in range(plain.blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(Block(inputs, units, stride))
            inputs = units
    head = nn.Linear(inputs, plain.n_classes)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
