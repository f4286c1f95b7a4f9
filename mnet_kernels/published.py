"""ImageNet accuracies as others published them, each with its source: nothing here is measured."""

from __future__ import annotations

from typing import Any

PAPER = "Howard et al. 2017 (arXiv:1704.04861), tables 6 to 8"
SLIM = "TensorFlow-Slim, research/slim/nets/mobilenet_v1.md (checkpoints of 2018-02-22)"

#: Top-1 and top-5 in per cent of TensorFlow-Slim's checkpoints, by (alpha, size).
_SLIM = {
    (1.0, 224): (70.9, 89.9), (1.0, 192): (70.0, 89.2), (1.0, 160): (68.0, 87.7),
    (1.0, 128): (65.2, 85.8), (0.75, 224): (68.4, 88.2), (0.75, 192): (67.2, 87.3),
    (0.75, 160): (65.3, 86.0), (0.75, 128): (62.1, 83.9), (0.5, 224): (63.3, 84.9),
    (0.5, 192): (61.7, 83.6), (0.5, 160): (59.1, 81.9), (0.5, 128): (56.3, 79.4),
    (0.25, 224): (49.8, 74.2), (0.25, 192): (47.7, 72.3), (0.25, 160): (45.5, 70.3),
    (0.25, 128): (41.5, 66.3),
}  # fmt: skip
#: Top-1 in per cent as the paper has it, where it does.
_PAPER: dict[Any, float] = {
    (1.0, 224): 70.6, (0.75, 224): 68.4, (0.5, 224): 63.7, (0.25, 224): 50.6,
    (1.0, 192): 69.1, (1.0, 160): 67.2, (1.0, 128): 64.4, "googlenet": 69.8, "vgg16": 71.5,
}  # fmt: skip


def mobilenet_v1(alpha: float, size: int) -> dict[str, Any] | None:
    """``{"top1", "top5" (fractions), "kind": "published", "source"}``, with "paper_top1" where the
    paper has one; None for a width or resolution that nobody published."""
    if (alpha, size) not in _SLIM:
        return None
    top1, top5 = _SLIM[alpha, size]
    return _published(top1, top5, SLIM, (alpha, size))


def torchvision(name: str) -> dict[str, Any] | None:
    """The accuracy of a torchvision model's first ImageNet weights, as torchvision states it."""
    import torchvision as library

    weights = library.models.get_model_weights(name)["IMAGENET1K_V1"]
    told = weights.meta["_metrics"]["ImageNet-1K"]
    source = f"torchvision {library.__version__.partition('+')[0]}, {weights}"
    return _published(told["acc@1"], told["acc@5"], source, name)


def _published(top1: float, top5: float, source: str, key: Any) -> dict[str, Any]:
    found = {"top1": top1 / 100, "top5": top5 / 100, "kind": "published", "source": source}
    if key in _PAPER:
        found |= {"paper_top1": _PAPER[key] / 100, "paper": PAPER}
    return found
