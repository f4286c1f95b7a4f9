"""Native against swapped: the same answers? how much faster?

Every network runs three ways: native contiguous, native channels_last, and swapped. Both kinds
are held against a float64 run of the same weights and inputs (rounded to the tested dtype
first), and the speed-up is against whichever native is faster.

An error is the largest difference to float64, relative to the largest output. What is allowed:

    tolerance = max(2 * native error, sqrt(depth) * (eps(dtype) + 16 * eps(accumulator)))

Each of ``depth`` convolutions and linear layers rounds its output to ``dtype``, and before that
its sum in the accumulator (float64 for float64, else float32), where terms larger than the result
cancel. These errors are independent, so they add up as a random walk. Where native itself is
further off, swapped may be so too. A layer on its own has depth 1. The measure is wide beside
rounding and narrow beside a fault: a wrong pixel, channel or activation is off by far more.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mnet_kernels import data
from mnet_kernels.data import Photograph
from mnet_kernels.inputs import InputError
from mnet_kernels.report.words import error_text
from mnet_kernels.subjects import Subject
from mnet_kernels.swap import explain, sites, swap
from mnet_kernels.timing import environment, interleave, ratio

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
#: The three ways to run, as rows name them.
WAYS = NATIVE, NATIVE_LAST, SWAPPED = "native", "native_channels_last", "swapped"
REFERENCE = "float64"

#: Told what is going on, and the fraction done of the whole, 0 to 1.
Notify = Callable[[str, float], None]


@dataclass(frozen=True)
class Settings:
    """How to compare. ``layout`` is the one the swapped model is given; without ``layers`` only
    whole networks are compared."""

    batches: tuple[int, ...] = (1,)
    dtype: str = "float32"
    layout: str = "contiguous"
    backend: str | None = None
    device: str = "cpu"
    rounds: int | None = None
    budget_s: float = 4.0
    layers: bool = True


def compare(
    subjects: Sequence[Subject],
    settings: Settings,
    photographs: Sequence[Photograph] = (),
    notify: Notify = lambda text, fraction: None,
) -> dict[str, Any]:
    """Compare every subject at every batch size.

    Args:
        photographs: what to look at; none: synthetic images.

    Returns:
        ``{"schema": 1, "environment", "rows", "layers"}``, ready for JSON: one row a subject and
        batch, times in milliseconds; layers at the first batch size.
    """
    rows: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    total = len(subjects) * len(settings.batches)
    for subject in subjects:
        models = _ways(subject, settings)
        for batch in settings.batches:
            begin = len(rows) / total

            def tell(text: str, fraction: float, begin: float = begin) -> None:
                notify(text, begin + fraction / total)

            x = _inputs(subject, photographs, batch, settings)
            with torch.inference_mode():
                rows.append(_network(subject, models, x, batch, settings, photographs, tell))
                if settings.layers and batch == settings.batches[0]:
                    layers += _layers(subject, models, x[:batch], settings, tell)
    return {"schema": 1, "environment": environment(), "rows": rows, "layers": layers}


def failures(result: dict[str, Any]) -> list[str]:
    """One sentence for every row and layer whose answers differ by more than the tolerance."""
    sentences = []
    for row in result["rows"] + result["layers"]:
        if not row["ok"]:
            layer = f", layer {row['layer']}" if "layer" in row else ""
            off = {key: error_text(value) for key, value in row["error"].items()}
            sentences.append(
                f"{row['model']}, batch {row['batch']}{layer}: swapped is off by {off[SWAPPED]} "
                f"of the output's scale, native by {off[NATIVE]}; allowed is {off['tolerance']}"
            )
    return sentences


def _ways(subject: Subject, settings: Settings) -> dict[str, nn.Module]:
    """The model in each way to run, and as the float64 reference."""
    dtype = getattr(torch, settings.dtype)
    native = copy.deepcopy(subject.model).to(settings.device, dtype)
    native_last = copy.deepcopy(native).to(memory_format=torch.channels_last)
    given = native if settings.layout == "contiguous" else native_last
    return {
        NATIVE: native,
        NATIVE_LAST: native_last,
        SWAPPED: swap(given, backend=settings.backend),
        REFERENCE: copy.deepcopy(native).double(),
    }


def _inputs(
    subject: Subject, photographs: Sequence[Photograph], batch: int, settings: Settings
) -> Tensor:
    """``(n, 3, size, size)``: whole batches, repeating the photographs until each has been seen."""
    if photographs:
        seen = data.preprocess([p.image for p in photographs], subject.size)
        batches = -(-len(seen) // batch)
        x = seen[torch.arange(batches * batch) % len(seen)]
    else:
        x = data.synthetic_images(batch, subject.size, seed=1)
    return x.to(settings.device, getattr(torch, settings.dtype))


def _network(
    subject: Subject,
    models: dict[str, nn.Module],
    x: Tensor,
    batch: int,
    settings: Settings,
    photographs: Sequence[Photograph],
    notify: Notify,
) -> dict[str, Any]:
    name = f"{subject.name}, batch {batch}"
    notify(f"{name}: float64 reference", 0.0)
    reference = _run(models[REFERENCE], x.double(), batch)
    if not isinstance(reference, Tensor) or reference.ndim != 2:
        raise InputError(f"model {subject.name}: expected class scores (N, classes) as its output")
    if not reference.isfinite().all() or reference.std() == 0:
        raise InputError(
            f"model {subject.name}: its float64 output is constant or not finite: "
            "there is nothing to compare"
        )
    notify(f"{name}: answers", 0.1)
    outputs, calls = {}, {}
    for way in WAYS:
        last = way == NATIVE_LAST or (way == SWAPPED and settings.layout == "channels_last")
        given = x.contiguous(memory_format=LAYOUTS["channels_last" if last else "contiguous"])
        outputs[way] = _run(models[way], given, batch)
        calls[way] = partial(models[way], given[:batch])
    depth = sum(isinstance(m, (_ConvNd, nn.Linear)) for m in models[NATIVE].modules())
    return {
        "model": subject.name,
        "batch": batch,
        "size": subject.size,
        "dtype": settings.dtype,
        "layout": settings.layout,
        "weights": subject.weights,
        "depth": depth,
        "fused": len(list(sites(models[SWAPPED]))),
        **_verdict(outputs, reference, depth, settings.dtype),
        **_speed(calls, settings, lambda done: notify(f"{name}: time", 0.15 + 0.45 * done)),
        "answers": _answers(outputs, len(photographs) or batch),
        "photographs": _labels(outputs, photographs) if subject.trained else [],
    }


def _layers(
    subject: Subject, models: dict[str, nn.Module], x: Tensor, settings: Settings, notify: Notify
) -> list[dict[str, Any]]:
    """Every fused site on its own, with the input it gets inside the network."""
    fast = models[SWAPPED]
    modules = dict(sites(fast))
    captured: dict[str, tuple[Tensor, ...]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, path=path: captured.setdefault(path, args) and None
        )
        for path, module in modules.items()
    ]
    fast(x.contiguous(memory_format=LAYOUTS[settings.layout]))
    for hook in hooks:
        hook.remove()

    plan = {row.module: row for row in explain(fast).rows}
    native, native_last, exact = (
        dict(sites(swap(models[way]))) for way in (NATIVE, NATIVE_LAST, REFERENCE)
    )
    few_ms = Settings(rounds=settings.rounds, budget_s=settings.budget_s / 20)
    rows = []
    for number, (path, args) in enumerate(captured.items()):
        notify(f"{subject.name}: layer {path}", 0.6 + 0.4 * number / len(captured))
        contiguous = [a.contiguous() for a in args]
        channels_last = [a.contiguous(memory_format=torch.channels_last) for a in args]
        reference = exact[path].forward_native(*(a.double() for a in args))
        calls = {
            NATIVE: partial(native[path].forward_native, *contiguous),
            NATIVE_LAST: partial(native_last[path].forward_native, *channels_last),
            SWAPPED: partial(modules[path], *args),
        }
        outputs = {way: call() for way, call in calls.items()}
        rows.append(
            {
                "model": subject.name,
                "batch": len(x),
                "layer": path,
                "pattern": plan[path].pattern,
                "backend": plan[path].backend,
                "input": list(args[0].shape),
                "output": list(reference.shape),
                **_verdict(outputs, reference, 1, settings.dtype),
                **_speed(calls, few_ms),
            }
        )
    return rows


def _run(model: nn.Module, x: Tensor, batch: int) -> Tensor:
    return torch.cat([model(part) for part in x.split(batch)])


def tolerance(native_error: float, depth: int, dtype: str) -> float:
    """The largest error allowed, relative to the largest output; see the top of this file."""
    rounded = getattr(torch, dtype)
    summed = torch.promote_types(rounded, torch.float32)
    one_layer = torch.finfo(rounded).eps + 16 * torch.finfo(summed).eps
    return max(2 * native_error, math.sqrt(depth) * one_layer)


def _verdict(
    outputs: dict[str, Tensor], reference: Tensor, depth: int, dtype: str
) -> dict[str, Any]:
    scale = float(reference.abs().max()) or 1.0
    error: dict[str, float] = {}
    for way, y in outputs.items():
        same_shape = y.shape == reference.shape
        off = float((y.double() - reference).abs().max()) / scale if same_shape else math.inf
        error[way] = off if off >= 0 else math.inf  # NaN counts as infinitely wrong
    allowed = tolerance(max(error[NATIVE], error[NATIVE_LAST]), depth, dtype)
    error["tolerance"] = allowed
    return {
        # JSON has no infinity: None is "not finite".
        "error": {key: off if math.isfinite(off) else None for key, off in error.items()},
        "ok": error[SWAPPED] <= allowed,
    }


def _speed(
    calls: Mapping[str, Callable[[], object]],
    settings: Settings,
    on_round: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    on_gpu = settings.device != "cpu"
    times = interleave(
        calls,
        rounds=settings.rounds,
        budget_s=settings.budget_s,
        synchronize=partial(torch.cuda.synchronize, settings.device) if on_gpu else None,
        on_round=on_round,
    )
    best = min((NATIVE, NATIVE_LAST), key=lambda way: times[way].median)
    return {
        "time_ms": {way: spread.summary(unit=1e-3) for way, spread in times.items()},
        "best_native": best,
        "speedup": ratio(times[best], times[SWAPPED]).summary(),
    }


def _answers(outputs: dict[str, Tensor], count: int) -> dict[str, int]:
    """Of the first ``count`` images, how many get the same best class and the same five best.

    Where they differ within the tolerance, two classes were tied for this dtype.
    """
    k = min(5, outputs[NATIVE].shape[1])
    native, swapped = (outputs[way][:count].float().topk(k).indices for way in (NATIVE, SWAPPED))
    same = native == swapped
    return {
        "images": count,
        "top1_same": int(same[:, 0].sum()),
        "top5_same": int(same.all(dim=1).sum()),
    }


def _labels(outputs: dict[str, Tensor], photographs: Sequence[Photograph]) -> list[dict[str, Any]]:
    """Each photograph's three best labels, with probabilities, from native and from swapped."""
    if not photographs or outputs[NATIVE].shape[1] != 1000:
        return []
    labels = data.imagenet_labels()
    told: list[dict[str, Any]] = [{"photograph": p.name} for p in photographs]
    for way in (NATIVE, SWAPPED):
        best = outputs[way].float().softmax(dim=1).topk(3)
        for entry, values, indices in zip(told, best.values, best.indices, strict=False):
            entry[way] = [
                {"label": labels[i], "probability": p}
                for p, i in zip(values.tolist(), indices.tolist(), strict=True)
            ]
    return told
