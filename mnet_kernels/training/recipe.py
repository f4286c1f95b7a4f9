"""How a MobileNet is trained: the settings, what is done to the pictures, one step.

The defaults: alpha 0.5, batch 32, NAdam as Keras has it, cross-entropy, random shifts of a tenth of
height and width, mirrored pictures, 200 epochs, validation after each. Nothing is normalised by
the data's own statistics (Keras' ``featurewise_*`` options are off); pixels are scaled to [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Recipe:
    """How to train. ``batch`` counts the pictures of a step in all processes together."""

    data: str = "digits"
    alpha: float = 0.5
    size: int | None = None  #: None: the dataset's own
    epochs: int | None = None  #: None: the dataset's own
    batch: int = 32
    learning_rate: float = 1e-3
    shift: float = 0.1
    flips: bool | None = None  #: None: where a mirrored picture keeps its meaning
    precision: str = "fp32"
    layout: str = "channels_last"  #: half as fast again as contiguous in eager PyTorch on CPUs
    compile: bool = False
    #: "swap": the best kernels there are; "native": plain PyTorch; else swapped with this one only.
    backend: str = "swap"
    seed: int = 0
    workers: int = 0


#: What a resumed run must have in common with the one it goes on with.
DECISIVE = ("alpha", "size", "batch", "learning_rate", "shift", "flips", "seed")


def augment(images: Tensor, draws: Tensor, shift: float, flips: bool) -> Tensor:
    """Random shifts and mirroring, as Keras' ImageDataGenerator does them.

    A shift is any fraction of a pixel, interpolated linearly; what comes in at the edge repeats
    the outermost pixel (``fill_mode="nearest"``, its default).

    Args:
        images: ``(N, 3, H, W)`` uint8.
        draws: ``(N, 3)`` in [0, 1): for the shift of rows, of columns, and for mirroring.
        shift: the largest, as a fraction of H and W.

    Returns:
        ``(N, 3, H, W)`` float32 in [-1, 1].

    Source: ``keras.src.legacy.preprocessing.image``: ``apply_affine_transform``, order 1.
    """
    x = scale(images)
    height, width = x.shape[-2:]
    if shift:
        by = (draws[:, :2] * 2 - 1) * shift
        theta = torch.zeros(len(x), 2, 3, device=x.device)
        theta[:, 0, 0] = theta[:, 1, 1] = 1
        # From pixels to affine_grid's units, where the outermost pixels' centres are at -1 and 1.
        theta[:, 0, 2] = by[:, 1] * (2 * width / (width - 1))
        theta[:, 1, 2] = by[:, 0] * (2 * height / (height - 1))
        grid = F.affine_grid(theta, list(x.shape), align_corners=True)
        x = F.grid_sample(x, grid, padding_mode="border", align_corners=True)
    if flips:
        x = torch.where(draws[:, 2, None, None, None] < 0.5, x.flip(-1), x)
    return x


def scale(images: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1], as ``keras.applications.mobilenet.preprocess_input``."""
    return images.float() / 127.5 - 1


def nadam(model: nn.Module, learning_rate: float) -> torch.optim.NAdam:
    """NAdam with Keras' defaults. Torch's own differ: 0.002, eps 1e-8, momentum_decay 0.004.

    Keras' momentum schedule is ``beta1 * (1 - 0.5 * 0.96**step)``: a momentum_decay of 1.
    """
    return torch.optim.NAdam(
        model.parameters(),
        learning_rate,
        betas=(0.9, 0.999),
        eps=1e-7,
        momentum_decay=1.0,
        foreach=True,  # by itself torch goes parameter by parameter on the CPU
    )


def step(
    forward: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of the optimiser.

    Args:
        forward: the model in training mode, ``(N, 3, H, W)`` to logits ``(N, classes)``.
        y: the classes, ``(N,)``.
        dtype: of autocast; None: without.

    Returns:
        The mean loss and the number of right answers, both of before the step.
    """
    optimizer.zero_grad()
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        logits = forward(x)
        loss = F.cross_entropy(logits, y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach(), (logits.detach().argmax(1) == y).sum()
