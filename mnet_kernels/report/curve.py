"""Pictures as files: the course of a training run, and the trade-off."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mnet_kernels.inputs import InputError, require
from mnet_kernels.report import figures


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


def check_kind(path: Path) -> None:
    """Before the work starts: can a picture of this kind be drawn?

    Raises:
        InputError: matplotlib is not installed, or knows no such kind of file.
    """
    require("matplotlib", "'mnet_kernels[train]'")
    from matplotlib.figure import Figure

    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:] not in kinds:
        raise InputError(f"plot {path}: expected a suffix of {', '.join(kinds)}")


def draw_tradeoff(result: Mapping[str, Any], kind: str) -> bytes:
    """ImageNet top-1 over latency, native and swapped, as PNG, SVG or what matplotlib can.

    Args:
        result: as :func:`mnet_kernels.tradeoff.tradeoff` makes it.
        kind: the file's suffix, "png"; see :func:`check_kind`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in result["rows"] if row["accuracy"]]
    top1 = [100 * row["accuracy"]["top1"] for row in rows]
    native = [row["latency_ms"][row["best_native"]]["median"] for row in rows]
    swapped = [row["latency_ms"]["swapped"]["median"] for row in rows]
    axes.hlines(top1, swapped, native, color="0.8", zorder=1)
    axes.scatter(native, top1, marker="s", color="0.6", label="native PyTorch, the faster layout")
    axes.scatter(swapped, top1, color="#0b7a75", label="with mnet_kernels")
    front = figures.pareto(list(zip(swapped, top1, strict=True)))
    axes.plot([x for x, _ in front], [y for _, y in front], color="#0b7a75", alpha=0.5, zorder=0)
    kinds = " and ".join(sorted({row["accuracy"]["kind"] for row in rows}))
    axes.set(
        xscale="log",
        xlabel=f"ms a picture, batch 1, {result['environment']['cpu']}, "
        f"{result['settings']['threads']} threads",
        ylabel=f"ImageNet top-1, % ({kinds})",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.draw_without_rendering()  # settles where everything is
    taken: list[Any] = []
    spots = sorted(zip(top1, swapped, (row["label"] for row in rows), strict=True), reverse=True)
    for y, x, text in spots:
        for dx, dy, side in ((-5, 3, "right"), (6, -9, "left"), (-5, -9, "right"), (6, 3, "left")):
            label = axes.annotate(text, (x, y), (dx, dy), textcoords="offset points",
                                  ha=side, fontsize=7)  # fmt: skip
            box = label.get_window_extent()
            if not box.count_overlaps(taken):
                taken.append(box)
                break
            label.remove()
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=130)
    return picture.getvalue()
