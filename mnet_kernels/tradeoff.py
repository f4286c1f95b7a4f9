"""The mission's table: what width and resolution cost, and what swapping gives back.

MobileNet V1 for each alpha and resolution, beside GoogLeNet and VGG16 as in the paper: size, work,
time and memory, native and swapped, measured here; accuracy as published, or measured where a
checkpoint and pictures are given.
"""

from __future__ import annotations

import csv
import ctypes
import gc
import io
import multiprocessing
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mnet_kernels import compare as comparing
from mnet_kernels import data, evaluate, models, published, subjects
from mnet_kernels.compare import NATIVE, SWAPPED, Notify
from mnet_kernels.inputs import InputError, require
from mnet_kernels.report import tables
from mnet_kernels.subjects import Subject
from mnet_kernels.swap import swap
from mnet_kernels.timing import environment

ALPHAS = 1.0, 0.75, 0.5, 0.25
SIZES = 224, 192, 160, 128
#: What the paper compares MobileNet with: torchvision's name, and what people call it.
OTHERS = {"googlenet": "GoogLeNet", "vgg16": "VGG16"}


@dataclass(frozen=True)
class Settings:
    """What to measure. ``weights`` (a folder) and ``images`` (see :func:`mnet_kernels.evaluate.
    evaluate`) belong together: without them accuracies are as published."""

    alphas: tuple[float, ...] = ALPHAS
    sizes: tuple[int, ...] = SIZES
    batch: int = 8
    others: bool = True
    rounds: int | None = None
    budget_s: float = 1.5
    memory: bool = True
    weights: Path | None = None
    images: str | None = None


@dataclass(frozen=True)
class _Network:
    """One row's network. ``spec`` is what :func:`mnet_kernels.subjects.subject` understands."""

    spec: str
    label: str
    alpha: float | None
    size: int

    def build(self) -> nn.Module:
        """Without weights, in eval mode."""
        if self.alpha is not None:
            return models.mobilenet_v1(self.alpha).eval()
        library = require("torchvision.models")
        # The two classifiers that help to train GoogLeNet are no part of it afterwards.
        options = {"aux_logits": False} if self.spec == "googlenet" else {}
        return library.get_model(self.spec, weights=None, init_weights=False, **options).eval()

    def subject(self) -> Subject:
        if self.alpha is not None:
            return subjects.subject(self.spec)
        torch.manual_seed(0)
        model = self.build()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):  # VGG16 has no BatchNorm to keep it alive
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        subjects.randomise_batchnorm(model, data.synthetic_images(4, self.size))
        return Subject(self.spec, model, self.size, "random, seed 0", trained=False)

    def published(self) -> dict[str, Any] | None:
        if self.alpha is not None:
            return published.mobilenet_v1(self.alpha, self.size)
        return published.torchvision(self.spec)


def networks(settings: Settings) -> list[_Network]:
    """The rows, the largest MobileNet first and the others last."""
    found = []
    for alpha in settings.alphas:
        for size in settings.sizes:
            label = f"{alpha:.2f}".rstrip("0").ljust(3, "0") + f"-{size}"
            found.append(_Network(f"mobilenet_v1:alpha={alpha},size={size}", label, alpha, size))
    if settings.others:
        found += [_Network(spec, label, None, 224) for spec, label in OTHERS.items()]
    return found


def minutes(settings: Settings) -> float:
    """About how long it takes on two cores; VGG16 alone is a minute."""
    each = 2 * settings.budget_s + (5 if settings.memory else 2)
    small = len(settings.alphas) * len(settings.sizes)
    return (small * each + 75 * settings.others) / 60


def tradeoff(settings: Settings, notify: Notify = lambda text, fraction: None) -> dict[str, Any]:
    """Measure every network.

    Returns:
        Ready for JSON: ``{"schema": 1, "kind": "tradeoff", "environment", "settings", "rows"}``.
        A row has "label", "alpha", "size", "params" and "multiply_adds" (of one picture; as
        :func:`mnet_kernels.models.summary` counts), "model_bytes", "peak_bytes" by way (None
        where it cannot be measured), "latency_ms" (batch 1) and "throughput_ms" (a call of
        ``batch`` pictures) by way with their spread, "best_native", "latency_speedup",
        "throughput_speedup", "images_per_second", "error" and "ok" as ``compare`` has them, and
        "accuracy" (see :mod:`mnet_kernels.published`; None where there is none).

    Raises:
        InputError: a network, the weights or the pictures cannot be used.
    """
    if (settings.weights is None) != (settings.images is None):
        raise InputError("weights and data: expected both or neither, got one")
    rows = []
    chosen = networks(settings)
    checkpoints = _checkpoints(settings.weights, chosen)
    for number, network in enumerate(chosen):
        begin = number / len(chosen)

        def tell(text: str, fraction: float, begin: float = begin) -> None:
            notify(text, begin + fraction / len(chosen))

        row = _measure(network, settings, tell)
        checkpoint = checkpoints.get(network.spec)
        if checkpoint is not None and settings.images is not None:
            tell(f"{network.label}: accuracy", 0.9)
            row["accuracy"] = _measured_accuracy(network, checkpoint, settings.images)
        rows.append(row)
    return {
        "schema": 1,
        "kind": "tradeoff",
        "environment": environment(),
        "settings": {"batch": settings.batch, "threads": torch.get_num_threads()},
        "rows": rows,
    }


def failures(result: Mapping[str, Any]) -> list[str]:
    """One sentence for every network whose swapped answers differ by more than is allowed."""
    return [
        f"{row['label']}: swapped is off by {row['error'][SWAPPED]} of the output's scale; "
        f"allowed is {row['error']['tolerance']}"
        for row in result["rows"]
        if not row["ok"]
    ]


def _measure(network: _Network, settings: Settings, tell: Notify) -> dict[str, Any]:
    tell(f"{network.label}: building", 0.0)
    subject = network.subject()
    counted = models.summary(subject.model, (1, 3, network.size, network.size))
    state = subject.model.state_dict().values()
    peaks: dict[str, int | None] = dict.fromkeys((NATIVE, SWAPPED))
    if settings.memory:
        for way in peaks:
            tell(f"{network.label}: memory, {way}", 0.1)
            peaks[way] = _peak_in_child(network, way == SWAPPED, settings.batch)
    timed = comparing.compare(
        [subject],
        comparing.Settings(
            batches=(1, settings.batch),
            layout="channels_last",
            rounds=settings.rounds,
            budget_s=settings.budget_s,
            layers=False,
        ),
        notify=lambda text, fraction: tell(
            text.replace(subject.name, network.label), 0.2 + 0.7 * fraction
        ),
    )
    one, many = timed["rows"]
    ways = {NATIVE: many["best_native"], SWAPPED: SWAPPED}
    return {
        "label": network.label,
        "alpha": network.alpha,
        "size": network.size,
        "params": counted.total_params,
        "multiply_adds": counted.multiply_adds,
        "model_bytes": sum(t.nbytes for t in state),
        "peak_bytes": peaks,
        "latency_ms": one["time_ms"],
        "best_native": one["best_native"],
        "latency_speedup": one["speedup"],
        "throughput_ms": many["time_ms"],
        "throughput_speedup": many["speedup"],
        "images_per_second": {
            way: 1e3 * settings.batch / many["time_ms"][key]["median"] for way, key in ways.items()
        },
        "error": one["error"],
        "ok": one["ok"] and many["ok"],
        "accuracy": network.published(),
    }


# ---- accuracy ----


def _checkpoints(folder: Path | None, chosen: list[_Network]) -> dict[str, Path]:
    """Files of weights by spec, found by the names that Keras and torchvision give them."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise InputError(f"weights {folder}: expected a folder")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    found = {}
    for network in chosen:
        if network.alpha is None:
            pattern = rf"{network.spec}-[0-9a-f]+\.pth"
        else:
            width = "1_0" if network.alpha == 1 else f"{10 * network.alpha:.1f}".replace(".", "_")
            pattern = rf"mobilenet_{width}_{network.size}_tf\.h5"
        match = next((path for path in files if re.fullmatch(pattern, path.name)), None)
        if match is not None:
            found[network.spec] = match
    if not found:
        raise InputError(
            f"weights {folder}: expected files such as mobilenet_7_5_192_tf.h5 or "
            f"vgg16-397923af.pth, got {', '.join(path.name for path in files[:3]) or 'none'}"
        )
    return found


def _measured_accuracy(network: _Network, checkpoint: Path, images: str) -> dict[str, Any]:
    told = evaluate.evaluate(evaluate.candidate(network.spec, checkpoint), images)
    ways = told["ways"]
    return {
        "top1": ways[SWAPPED]["top1"],
        "top5": ways[SWAPPED]["top5"],
        "native_top1": ways[NATIVE]["top1"],
        "kind": "measured",
        "source": f"{checkpoint.name} on {told['images']:,} pictures of {images}",
    }


# ---- peak memory ----


def _peak_in_child(network: _Network, swapped: bool, batch: int) -> int | None:
    """What a process of its own holds at most, beyond what it holds before it has the network.

    Its own, because memory that a process has once had it seldom gives back. None where the
    system does not tell, or the process did not live.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, network, swapped, batch, torch.get_num_threads())
    process = context.Process(target=_send_peak, args=arguments)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        process.join()


def _send_peak(sender: Any, network: _Network, swapped: bool, batch: int, threads: int) -> None:
    torch.set_num_threads(threads)
    with torch.inference_mode():
        small = _ready(models.mobilenet_v1(0.25, 10).eval(), swapped)
        small(torch.rand(1, 3, 32, 32))  # loads and allocates what every network needs
        del small
        before = _resident("VmRSS")
        model = _ready(network.build(), swapped)
        x = torch.rand(batch, 3, network.size, network.size)
        x = x.contiguous(memory_format=torch.channels_last)
        told = before is not None and _forget_peak()
        model(x), model(x)
        peak = _resident("VmHWM") if told else None
    sender.send(None if peak is None or before is None else peak - before)


def _ready(model: nn.Module, swapped: bool) -> nn.Module:
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return swap(model) if swapped else model


def _resident(field: str) -> int | None:
    """Bytes of a line of /proc/self/status (Linux), after what is free has been given back."""
    gc.collect()
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _forget_peak() -> bool:
    """Let the peak begin at what is resident now; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


# ---- files ----

_COLUMNS = ("label", "alpha", "size", "params", "multiply_adds", "model_bytes", "best_native")


def to_csv(result: Mapping[str, Any]) -> str:
    """One line a network; milliseconds are medians, accuracies fractions."""
    text = io.StringIO()
    lines = []
    for row in result["rows"]:
        line = {key: row[key] for key in _COLUMNS}
        for way in (NATIVE, SWAPPED):
            key = row["best_native"] if way == NATIVE else way
            line[f"latency_ms_{way}"] = row["latency_ms"][key]["median"]
            line[f"images_per_second_{way}"] = row["images_per_second"][way]
            line[f"peak_bytes_{way}"] = row["peak_bytes"][way]
        line["latency_speedup"] = row["latency_speedup"]["median"]
        line["throughput_speedup"] = row["throughput_speedup"]["median"]
        accuracy = row["accuracy"] or {}
        for key in ("top1", "top5", "kind", "source", "paper_top1"):
            line[f"accuracy_{key}"] = accuracy.get(key)
        lines.append(line)
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def to_markdown(result: Mapping[str, Any]) -> str:
    """The table, and below it the sources and the machine."""
    here = result["environment"]
    notes = tables.sources(result)
    measured = (
        f"Measured on {here['cpu']}, {result['settings']['threads']} threads, torch "
        f"{here['torch']}, {here['date'][:10]}; pictures/s and peak memory at batch "
        f"{result['settings']['batch']}."
    )
    return "\n".join([tables.markdown(tables.tradeoff(result)), *notes, measured, ""])
