"""The networks that `from_torch` reads, as PyTorch code writes them, of any width."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["VGG", "ResNet", "randomise"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut whose name is an argument."""

    expansion = 1
    shortcut_name: str

    def __init__(self, inputs: int, channels: int, stride: int, shortcut: tuple):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        add_shortcut(self, inputs, channels, stride, *shortcut)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.get_submodule(self.shortcut_name)(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions beside a shortcut."""

    expansion = 4
    inner = 1
    shortcut_name: str

    def __init__(self, inputs: int, channels: int, stride: int, shortcut: tuple):
        super().__init__()
        inner = self.inner * channels
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        add_shortcut(self, inputs, 4 * channels, stride, *shortcut)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.get_submodule(self.shortcut_name)(x))


class WideBottleneck(Bottleneck):
    """A bottleneck with twice as many channels inside."""

    inner = 2


class Pad(nn.Module):
    """Every second pixel, with a number of channels of zeros on each side."""

    def __init__(self, zeros: int):
        super().__init__()
        self.zeros = zeros

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.zeros, self.zeros))


def add_shortcut(block, inputs: int, outputs: int, stride: int, name: str, kernel: int):
    shortcut = nn.Sequential()
    if kernel == 0 and inputs != outputs:
        shortcut = Pad((outputs - inputs) // 2)
    elif stride > 1 or inputs != outputs:
        padding = kernel // 2
        shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
            nn.BatchNorm2d(outputs),
        )
    block.shortcut_name = name
    block.add_module(name, shortcut)


class ResNet(nn.Module):
    """A residual network.

    Args:
        blocks: the number of blocks in each stage.
        width: the number of channels in the first stage.
        n_classes: the number of logits.
        bottleneck: whether blocks are bottlenecks instead of basic blocks.
        wide: whether bottlenecks have twice as many channels inside.
        stem: the kernel size of the first convolution. With 7 it has a stride, and a
            pool follows.
        shortcut: the name of shortcuts, and their kernel size. With 0 they have no
            weights.
        head: the name of the dense layer.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        *,
        width: int,
        n_classes: int,
        bottleneck: bool = False,
        wide: bool = False,
        stem: int = 3,
        shortcut: tuple[str, int] = ("shortcut", 3),
        head: str = "linear",
    ):
        super().__init__()
        block = Bottleneck if bottleneck else BasicBlock
        block = WideBottleneck if wide else block
        stride = 2 if stem == 7 else 1
        self.conv1 = nn.Conv2d(3, width, stem, stride, stem // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1) if stem == 7 else nn.Identity()
        self.stages, inputs = len(blocks), width
        for stage, n_blocks in enumerate(blocks):
            layer = nn.Sequential()
            for i in range(n_blocks):
                channels = width * 2**stage
                stride = 2 if stage > 0 and i == 0 else 1
                layer.append(block(inputs, channels, stride, shortcut))
                inputs = block.expansion * channels
            self.add_module(f"layer{stage + 1}", layer)
        self.head_name = head
        self.add_module(head, nn.Linear(inputs, n_classes))

    def forward(self, x):
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.get_submodule(self.head_name)(x.mean((2, 3)))


class VGG(nn.Module):
    """A VGG network.

    Args:
        layers: the number of convolutions in each of the five stages.
        width: the number of channels in the first stage. The other stages have 2, 4, 8
            and 8 times as many.
        n_classes: the number of logits.
        image_size: the side of the square images, in pixels.
        batch_norm: whether a BatchNorm follows each convolution.
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        width: int,
        n_classes: int,
        image_size: int = 32,
        batch_norm: bool = True,
    ):
        super().__init__()
        self.features, inputs = nn.Sequential(), 3
        for n_layers, factor in zip(layers, (1, 2, 4, 8, 8), strict=True):
            for _ in range(n_layers):
                self.features.append(nn.Conv2d(inputs, factor * width, 3, padding=1))
                inputs = factor * width
                if batch_norm:
                    self.features.append(nn.BatchNorm2d(inputs))
                self.features.append(nn.ReLU())
            self.features.append(nn.MaxPool2d(2))
        self.classifier = nn.Linear(inputs * (image_size // 32) ** 2, n_classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


def randomise(module: nn.Module, images: torch.Tensor, seed: int = 0) -> nn.Module:
    """Draws random weights without constants, and takes statistics from `images`.

    With other statistics, activations would double from block to block.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        return low + (high - low) * torch.rand(tensor.shape, generator=generator)

    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                std = (2 / parameter[0].numel()) ** 0.5
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(std * noise)
            else:
                parameter.copy_(uniform(parameter, -0.5, 0.5))
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.weight.add_(1)
            norm.momentum = 1.0
        # Without this, the rounding of float32 alone exceeds 1e-4 after 16 bottlenecks.
        for block in module.modules():
            if isinstance(block, (BasicBlock, Bottleneck)):
                last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
                last.weight.mul_(0.3)
        module.train()(images)
        for norm in norms:
            mean, var = norm.running_mean, norm.running_var
            assert mean is not None and var is not None
            mean += uniform(mean, -0.1, 0.1)
            var *= uniform(var, 0.8, 1.25)
    return module.eval()
