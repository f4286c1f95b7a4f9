"""Which sites of a swapped model run fused: measured, and kept as JSON."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnet_kernels.backends import NAMES, why_not
from mnet_kernels.nn import FusedConv2d, Fusion, dense, is_depthwise
from mnet_kernels.nn.server import FOLDED
from mnet_kernels.ops import has_dense_kernel
from mnet_kernels.runs.pairs import measure as measure_pairs
from mnet_kernels.runs.pairs import runners
from mnet_kernels.swap.plan import Plan
from mnet_kernels.timing import interleave
from mnet_kernels.triton import TRITON_INTERPRETED

_ROUNDS = 9


def save(path: str | PathLike[str], plan: Plan, fused: dict[str, FusedConv2d]) -> None:
    """Write which sites run fused, and how, for :func:`load`."""
    patterns = {site.conv: site.pattern for site in plan.sites}
    content = {
        name: {
            "pattern": patterns[name],
            "native": module.fusion.declined,
            "backend": module.fusion.preferred,
        }
        | ({} if module.fusion.pair is None else {"pair": module.fusion.pair})
        for name, module in fused.items()
    }
    Path(path).write_text(json.dumps(content, indent=2) + "\n")


def load(path: str | PathLike[str], plan: Plan, fused: dict[str, FusedConv2d]) -> None:
    """Set every site as a file by :func:`save` says.

    Raises:
        ValueError: the file is not such a file, or belongs to another model.
    """
    where = f"swap: decisions: {path}:"
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{where} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where} expected an object, got {type(content).__name__}")
    for name in sorted(content.keys() ^ fused.keys()):
        who = "the file has site" if name in content else "the model has site"
        raise ValueError(f"{where} {who} {name!r}, the other has not")
    patterns = {site.conv: site.pattern for site in plan.sites}
    for name, entry in content.items():
        # "backend" and "pair" came later: files without them are older.
        if not isinstance(entry, dict) or set(entry) - {"backend", "pair"} != {"pattern", "native"}:
            raise ValueError(
                f'{where} site {name!r}: expected "pattern" and "native", got {entry!r}'
            )
        if entry["pattern"] != patterns[name]:
            raise ValueError(
                f"{where} site {name!r}: expected {patterns[name]!r}, got {entry['pattern']!r}"
            )
        if not isinstance(entry["native"], str | None):
            raise ValueError(
                f'{where} site {name!r}: "native": expected null or a reason, '
                f"got {entry['native']!r}"
            )
        if not isinstance(entry.get("pair"), bool | None):
            raise ValueError(
                f'{where} site {name!r}: "pair": expected true or false, got {entry["pair"]!r}'
            )
        ways = NAMES if is_depthwise(fused[name]) else (*NAMES, FOLDED)
        if entry.get("backend") not in (None, *ways):
            raise ValueError(
                f'{where} site {name!r}: "backend": expected null or one of {", ".join(ways)}, '
                f"got {entry['backend']!r}"
            )
    for name, entry in content.items():
        fused[name].fusion.declined = entry["native"]
        fused[name].fusion.preferred = entry.get("backend")
        fused[name].fusion.pair = entry.get("pair")


def measure(
    fast: nn.Module, fused: dict[str, FusedConv2d], inputs: tuple[Any, ...], of_pairs: bool
) -> None:
    """Set every site to the fastest way there is for the input that it gets from ``inputs``: one of
    the backends that serve it, or native; then the same for pairs in one pass."""
    spent: dict[str, dict[str, float]] = {name: {} for name in fused}

    def hook(name: str, module: FusedConv2d, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if module.why_native(x.device, x.dtype) is None:
            ways = {"native": module.forward_native} | {
                backend: site.forward for backend, site in _candidates(module, x).items()
            }
            for way, seconds in _race(ways, x).items():
                spent[name][way] = spent[name].get(way, 0.0) + seconds

    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: hook(name, module, args))
        for name, module in fused.items()
    ]
    try:
        with _eval_mode(fast), torch.no_grad():
            fast(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name, took in spent.items():
        if took:
            _settle(fused[name].fusion, took)
    if not of_pairs:
        return
    with _eval_mode(fast), torch.no_grad():
        fast(*inputs)  # without the hooks: through the runs
        for runner in runners(fast):
            measure_pairs(runner)


def _settle(fusion: Fusion, took: dict[str, float]) -> None:
    """took: seconds of "native" and of each backend, the one that is chosen unmeasured first."""
    native, *backends = took
    best = min(backends, key=lambda name: took[name])
    if took[best] > took[native]:
        fusion.declined = f"left native: measured {took[native] / took[best]:.2f}x"
    elif best != backends[0]:
        fusion.preferred = best


def _candidates(module: FusedConv2d, x: Tensor) -> dict[str, FusedConv2d]:
    """The site once for every way that it can run fused, the usual one first; each keeps constants
    of its own."""
    dense_on_gpu = x.is_cuda and not is_depthwise(module)
    usual = dense.decide(module, x) if dense_on_gpu else module.serving(x.device, x.dtype)
    sites = {usual: module}
    if module.fusion.backend is not None or TRITON_INTERPRETED:
        return sites
    others: tuple[str, ...] = ()
    if dense_on_gpu:
        kernels = ("cuda", "triton") if module.groups == 1 else ()
        others = *(name for name in kernels if has_dense_kernel(name)), FOLDED
    elif is_depthwise(module):
        others = tuple(name for name in NAMES if name != "native")
    for name in others:
        serves = name == FOLDED or why_not(name, device=x.device, dtype=x.dtype) is None
        if serves and name != usual:
            sites[name] = copy.copy(module)
            sites[name].fusion = replace(module.fusion, preferred=name)
    return sites


def _race(ways: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor) -> dict[str, float]:
    """Median seconds of each, taking turns."""
    done = interleave(
        {name: partial(way, x) for name, way in ways.items()},
        rounds=_ROUNDS,
        synchronize=partial(torch.cuda.synchronize, x.device) if x.is_cuda else None,
    )
    return {name: spread.median for name, spread in done.items()}


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
