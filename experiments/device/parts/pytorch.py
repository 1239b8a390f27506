"""The same single model in PyTorch, as the yardstick: one agent's local step.

A plain loop over a batch that is on the device already, with SGD. In float32, products
and convolutions may use TF32, as JAX does by default on GPUs.
"""

import contextlib
import time

import numpy as np

from dimat_jax._bench._plain import Plain
from dimat_jax._bench._plain_torch import build
from experiments.device._cells import Cell, LeftOut, Log
from experiments.device.parts import Settings

__all__ = ["cells"]

_WIDTHS = (1, 8)
_REPEATS = 3
# For each way: the dtype, and the mode of `torch.compile` ("" for none).
_WAYS = {
    "float32": ("float32", ""),
    "bfloat16": ("bfloat16", ""),
    "float32 compiled": ("float32", "default"),
    "float32 cuda graphs": ("float32", "reduce-overhead"),
    "bfloat16 compiled": ("bfloat16", "default"),
}


def cells(settings: Settings) -> list[Cell]:
    """The cells of this part."""
    widths = (0.25,) if settings.tiny else _WIDTHS
    return [
        Cell(f"resnet20 width {width:g}, {way}", 40, _measure(settings, width, way))
        for way in _WAYS
        for width in widths
    ]


def _measure(settings: Settings, width: float, way: str):
    dtype, mode = _WAYS[way]
    batch, least = (8, 2) if settings.tiny else (100, 50)

    def measure(log: Log) -> None:
        import torch

        if mode and not torch.cuda.is_available():
            raise LeftOut("PyTorch compiles for GPUs here, and there is none")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        log.note(width=width, dtype=dtype, mode=mode, torch=torch.__version__)
        units = tuple(round(channels * width) for channels in (16, 32, 64))
        model = build(Plain(3, units, 100, (32, 32, 3), batch))
        model = model.to(device).to(memory_format=torch.channels_last)
        run = torch.compile(model, mode=mode) if mode else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        images = torch.randn(batch, 3, 32, 32, device=device)
        images = images.to(memory_format=torch.channels_last)
        labels = torch.randint(100, (batch,), device=device)
        half = torch.autocast(device.type, torch.bfloat16)
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

        def take(n_steps: int) -> float:
            started = time.perf_counter()
            for _ in range(n_steps):
                optimizer.zero_grad(set_to_none=True)
                with half if dtype == "bfloat16" else contextlib.nullcontext():
                    logits = run(images)
                    loss = torch.nn.functional.cross_entropy(logits, labels)
                loss.backward()
                optimizer.step()
            wait()
            return time.perf_counter() - started

        log.note(first_seconds=take(1))
        take(5)
        seconds = float(np.median([take(least) / least for _ in range(_REPEATS)]))
        log.note(step_seconds=seconds, images_per_second=batch / seconds)

    return measure
