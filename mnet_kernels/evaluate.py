"""Top-1 and top-5 on labelled pictures, native and swapped side by side.

Both see every batch, in turns, so that their pictures a second are of the same minutes; the time
is the network's alone, without reading and preprocessing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnet_kernels import subjects
from mnet_kernels.data import MEAN, STD
from mnet_kernels.inputs import InputError, require
from mnet_kernels.subjects import Subject
from mnet_kernels.swap import swap
from mnet_kernels.timing import environment
from mnet_kernels.training import checkpoint, datasets
from mnet_kernels.training.batches import loader, read, shard
from mnet_kernels.training.distributed import Group

WAYS = NATIVE, SWAPPED = "native", "swapped"
PREPROCESS = ("keras", "torchvision", "timm")

#: Mean and deviation a channel, of pixels in [0, 1].
_Norm = tuple[tuple[float, ...], tuple[float, ...]]

#: ImageNet's folders are named by WordNet number.
_SYNSET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Candidate:
    """What to evaluate, and how its pictures are made."""

    subject: Subject
    preprocess: str
    #: Of our own checkpoints: what they were trained on, and its classes.
    trained_on: str | None = None
    classes: tuple[str, ...] = ()


def candidate(name: str, weights: Path | None = None, preprocess: str | None = None) -> Candidate:
    """A model as ``compare`` names it, or a checkpoint of ``mnet-kernels train``.

    Args:
        name: see :func:`mnet_kernels.subjects.subject`; or the path of a checkpoint.
        preprocess: "keras" ([-1, 1]), "torchvision" (ImageNet's mean and deviation), or "timm"
            (what the model's own configuration says); None: as the model was trained.

    Raises:
        InputError: no such model or checkpoint, or weights that do not fit.
    """
    path = Path(name)
    if not (path.is_file() or path.suffix == ".pt"):
        usual = "timm" if name.startswith("timm:") else "torchvision"
        usual = "keras" if name.partition(":")[0] == "mobilenet_v1" else usual
        subject = subjects.subject(name, weights)
        if (preprocess or usual) == "timm" and not hasattr(subject.model, "pretrained_cfg"):
            raise InputError(f"preprocess timm: expected a model of timm, got {name}")
        return Candidate(subject, preprocess or usual)
    if weights is not None:
        raise InputError(f"weights {weights}: {name} is a checkpoint and has its own")
    if preprocess not in (None, "keras"):
        raise InputError(f"preprocess: expected keras for our own checkpoint, got {preprocess}")
    held = checkpoint.load(path)
    recipe = held["recipe"]
    subject = Subject(
        name=f"{path} (MobileNet V1, alpha {recipe['alpha']:g})",
        model=checkpoint.model_of(held, path),
        size=recipe["size"],
        weights=f"epoch {held['epoch']} on {recipe['data']}",
        trained=True,
    )
    return Candidate(subject, "keras", recipe["data"], tuple(held["classes"]))


def evaluate(
    chosen: Candidate,
    spec: str,
    *,
    batch: int = 32,
    workers: int = 0,
    backend: str | None = None,
    group: Group | None = None,
    notify: Callable[[str, float], None] = lambda text, fraction: None,
) -> dict[str, Any]:
    """Evaluate on the validation half of a dataset.

    Args:
        spec: see :func:`mnet_kernels.training.datasets.open_images`; of an ``imagefolder:PATH``
            without a folder ``val`` all is taken, unless ``chosen`` was trained on it.
        batch: pictures a process and step.
        backend: for :func:`mnet_kernels.swap`.
        group: the processes; each picture is looked at by one of them.

    Returns:
        Ready for JSON: "model", "weights", "data", "preprocess", "images", "same_top1", for each
        way "top1", "top5" (fractions) and "images_per_second", and "environment".

    Raises:
        InputError: the data cannot be used, or has not the model's classes.
    """
    group = group or Group()
    native = chosen.subject.model.eval().to(group.device)
    native = native.to(memory_format=torch.channels_last)
    ways = {NATIVE: native, SWAPPED: swap(native, backend=backend)}
    pictures, target, (mean, std) = _pictures(chosen, spec, _classes(chosen, group))
    shift, factor = (
        torch.tensor(v, device=group.device).view(1, 3, 1, 1) * 255 for v in (mean, std)
    )
    batches = shard(len(pictures), batch, group.rank, group.world)
    reader = loader(pictures, batches, workers, pin=group.device.type == "cuda")

    counts = torch.zeros(6, dtype=torch.int64, device=group.device)
    seconds = torch.zeros(2, dtype=torch.float64, device=group.device)
    with torch.inference_mode():
        for number, (images, labels) in enumerate(read(reader)):
            x = (images.to(group.device).float() - shift) / factor
            x = x.contiguous(memory_format=torch.channels_last)
            y = target[labels].to(group.device)
            if number == 0:
                for model in ways.values():
                    model(x)  # packs weights, warms caches
            best = {}
            for i in (0, 1) if number % 2 else (1, 0):  # nobody always runs first
                logits, took = _timed(ways[WAYS[i]], x)
                seconds[i] += took
                best[i] = logits.topk(min(5, logits.shape[1])).indices
                hit = best[i] == y[:, None]
                counts[2 * i] += hit[:, 0].sum()
                counts[2 * i + 1] += hit.sum()
            counts[4] += (best[0][:, 0] == best[1][:, 0]).sum()
            counts[5] += len(y)
            notify(chosen.subject.name, (number + 1) / len(batches))
    *hits, same, total = group.sum(counts).tolist()
    slowest = group.max(seconds).tolist()
    return {
        "schema": 1,
        "model": chosen.subject.name,
        "weights": chosen.subject.weights,
        "data": spec,
        "preprocess": chosen.preprocess,
        "size": chosen.subject.size,
        "batch": batch,
        "processes": group.world,
        "images": total,
        "same_top1": same,
        "ways": {
            way: {
                "top1": hits[2 * i] / total,
                "top5": hits[2 * i + 1] / total,
                "images_per_second": total / slowest[i],
            }
            for i, way in enumerate(WAYS)
        },
        "environment": environment(),
    }


def _timed(model: nn.Module, x: Tensor) -> tuple[Tensor, float]:
    start = time.perf_counter()
    logits = model(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return logits, time.perf_counter() - start


def _classes(chosen: Candidate, group: Group) -> int:
    """How many the model tells apart."""
    size = chosen.subject.size
    with torch.inference_mode():
        try:
            y = chosen.subject.model(torch.zeros(1, 3, size, size, device=group.device))
        except RuntimeError as error:
            raise InputError(
                f"model {chosen.subject.name}: cannot be run at size {size}: {error}"
            ) from None
    if not isinstance(y, Tensor) or y.ndim != 2:
        raise InputError(f"model {chosen.subject.name}: expected class scores (N, classes)")
    return y.shape[1]


def _pictures(chosen: Candidate, spec: str, outputs: int) -> tuple[Any, Tensor, _Norm]:
    """The pictures, the model's class for each of their labels, and (mean, deviation)."""
    kind, _, place = spec.partition(":")
    size = chosen.subject.size
    transform = None
    norms: dict[str, _Norm] = {"keras": ((0.5,) * 3, (0.5,) * 3), "torchvision": (MEAN, STD)}
    if chosen.preprocess == "timm":
        transform, norms["timm"] = _timm(chosen.subject)
    norm = norms[chosen.preprocess]
    if kind == "imagefolder" and spec != chosen.trained_on:
        path = Path(place)
        path = path / "val" if (path / "val").is_dir() else path
        pictures = datasets.folder(spec, path, transform or datasets.fit(size))
        classes = tuple(pictures.classes)
    else:
        images = datasets.open_images(spec, size)
        pictures, classes = images.validation, images.classes
    if chosen.classes and classes != chosen.classes:
        raise InputError(
            f"data {spec}: expected the checkpoint's {len(chosen.classes)} classes "
            f"({', '.join(chosen.classes[:3])}, ...), got {len(classes)} "
            f"({', '.join(classes[:3])}, ...)"
        )
    return pictures, _targets(spec, classes, outputs), norm


def _targets(spec: str, classes: tuple[str, ...], outputs: int) -> Tensor:
    """The model's number of each class: by order; of a part of ImageNet, by WordNet number."""
    if len(classes) == outputs:
        return torch.arange(outputs)
    if outputs == 1000 and all(_SYNSET.fullmatch(name) for name in classes):
        synsets = require("timm.data", "timm").ImageNetInfo().label_names()
        unknown = sorted(set(classes) - set(synsets))
        if not unknown:
            return torch.tensor([synsets.index(name) for name in classes])
        raise InputError(f"data {spec}: {unknown[0]} is not one of ImageNet's 1000 classes")
    raise InputError(
        f"data {spec}: expected the model's {outputs} classes"
        f"{', or folders named n01440764 and so on' if outputs == 1000 else ''}, "
        f"got {len(classes)} ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"
    )


def _timm(subject: Subject) -> tuple[Any, _Norm]:
    """What the model's configuration says: geometry (to uint8), mean and deviation."""
    library = require("timm.data", "timm")
    config = library.resolve_model_data_config(subject.model)
    config["input_size"] = (3, subject.size, subject.size)
    transform = library.create_transform(**config, is_training=False, normalize=False)
    return transform, (tuple(config["mean"]), tuple(config["std"]))
