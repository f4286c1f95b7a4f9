"""The course of a training run as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from mnet_kernels.data import require


def draw(rows: Sequence[Mapping[str, float]], title: str) -> bytes:
    """Loss and accuracy by epoch, training and validation, as PNG.

    Args:
        rows: an epoch each, as :mod:`mnet_kernels.train` makes them.

    Raises:
        InputError: matplotlib is not installed.
    """
    require("matplotlib", "'mnet_kernels[train]'")
    from matplotlib.figure import Figure  # not pyplot: no window system is asked for

    figure = Figure(figsize=(10, 4), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for half in ("train", "validation"):
            values = [row[f"{half}_{quantity}"] for row in rows]
            axes.plot(epochs, values, marker="." if len(rows) < 50 else "", label=half)
        axes.set(xlabel="epoch", ylabel=quantity)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
