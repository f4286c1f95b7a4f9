"""Which sites of a swapped model run fused: measured, kept as JSON, explained as a table."""

from __future__ import annotations

import copy
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnet_kernels.backends import NAMES, TRITON_INTERPRETED, why_not
from mnet_kernels.nn import FOLDED, FusedConv2d, Fusion, dense, is_depthwise
from mnet_kernels.ops import has_dense_kernel, packs
from mnet_kernels.runs.pairs import measure as measure_pairs
from mnet_kernels.runs.pairs import pairs, runners
from mnet_kernels.runs.runner import Runner
from mnet_kernels.swap.plan import Left, Plan
from mnet_kernels.timing import interleave

_ROUNDS = 9


@dataclass
class Swapped:
    """What a swapped model remembers."""

    original: nn.Module
    plan: Plan
    #: Every module of it when it was made, and that of ``original`` that it is a copy of.
    twins: list[tuple[nn.Module, nn.Module]]


@dataclass(frozen=True)
class Row:
    """What became of one convolution (or of a module that could not be traced)."""

    module: str
    pattern: str
    #: The backend it runs on, for the device and dtype of its weight and the mode that its norm is
    #: in; "native" if left alone.
    backend: str
    reason: str
    #: The backend in training mode, and why that is native.
    training: str = "native"
    why_native_training: str = ""


class Explanation:
    """The rows of :func:`mnet_kernels.explain`, in the model's order."""

    def __init__(
        self, plan: Plan, fused: dict[str, FusedConv2d], order: list[str], runners: list[Runner]
    ) -> None:
        self._plan = plan
        self._runners = runners
        self._fused = fused
        self.rows = [
            _row(site.conv, site.pattern, site.note, fused[site.conv])
            for site in plan.sites
            if site.conv in fused
        ] + [_left(left, runners) for left in plan.left if left.module in order]
        self.rows.sort(key=lambda row: order.index(row.module))

    def save(self, path: str | PathLike[str]) -> None:
        """Write which sites run fused, for ``swap(model, decisions=path)``."""
        patterns = {site.conv: site.pattern for site in self._plan.sites}
        content = {
            name: {
                "pattern": patterns[name],
                "native": module.fusion.declined,
                "backend": module.fusion.preferred,
            }
            | ({} if module.fusion.pair is None else {"pair": module.fusion.pair})
            for name, module in self._fused.items()
        }
        Path(path).write_text(json.dumps(content, indent=2) + "\n")

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=box.SIMPLE)
        for name in ("module", "pattern", "backend", "in training", "reason"):
            table.add_column(name, overflow="fold")
        for row in self.rows:
            cells = row.module, row.pattern, row.backend, row.training, row.reason
            table.add_row(*map(escape, cells))
        console = Console(file=io.StringIO(), width=120, color_system=None)
        console.print(table)
        now, training = (
            sum(backend != "native" for backend in backends)
            for backends in zip(*((row.backend, row.training) for row in self.rows), strict=True)
        )
        console.print(f"{now} of {len(self.rows)} rows run fused, {training} in training.")
        reasons = Counter(row.why_native_training for row in self.rows if row.why_native_training)
        for reason, count in reasons.items():
            console.print(f"Native in training, {count} rows: {escape(reason)}.")
        for path, runs in self._plan.runs.items():
            sizes = " + ".join(str(sum(s.kind == "conv" for s in run.stages)) for run in runs)
            console.print(f"{path or 'the model'}: {sizes} layers in one call each, on the CPU.")
        for runner in self._runners:
            for pair in pairs(runner):
                way = "in one pass" if pair.in_one_pass else "one after the other"
                console.print(f"{pair.depthwise} + {pair.pointwise}: {way} ({pair.reason})")
        kept = sum(runner.packed_bytes() for runner in self._runners)
        if kept:
            console.print(f"Weights and constants packed for these calls: {kept / 2**20:.1f} MiB.")
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _left(left: Left, runners: list[Runner]) -> Row:
    """What was left alone by itself may still be part of a run."""
    for runner in runners:
        for stage, module in zip(runner.run.stages, runner.modules, strict=True):
            if stage.module != left.module or module is None:
                continue
            if module.weight.is_cpu and packs(module.weight.dtype):
                name = stage.activation.name
                pattern = left.pattern + ("" if name == "identity" else f" + {name}")
                return Row(left.module, pattern, "cpu", "in one call with what is before it")
    return Row(left.module, left.pattern, "native", left.reason)


def _row(name: str, pattern: str, note: str, module: FusedConv2d) -> Row:
    device, dtype = module.weight.device, module.weight.dtype

    def served(in_training: bool) -> tuple[str, str | None]:
        why = module.why_native(device, dtype, in_training)
        return "native" if why else module.serving(device, dtype, in_training), why

    fusion = module.fusion
    backend, reason = served(module.uses_batch_statistics())
    if reason is None and backend == fusion.preferred:
        reason = "measured faster than the usual backend"
    elif reason is None and backend in ("cuda", "triton") and not is_depthwise(module):
        backend, reason = dense.told(module, backend, device, dtype)
    training, why = served(fusion.norm is not None and fusion.batch_statistics)
    text = "; ".join(part for part in (reason, note) if part)
    return Row(name, pattern, backend, text, training, "" if why is None else why)


def record_of(fast: object, operator: str) -> Swapped:
    """The record of a swapped model.

    Raises:
        TypeError: it is none.
    """
    record = fast.__dict__.get("_mnet_swapped") if isinstance(fast, nn.Module) else None
    if record is None:
        got = f"{type(fast).__module__}.{type(fast).__qualname__}"
        raise TypeError(f"{operator}: expected a model made by swap, got {got} that was not")
    return record


def load(path: str | PathLike[str], plan: Plan, fused: dict[str, FusedConv2d]) -> None:
    """Set every site as a file by :meth:`Explanation.save` says.

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
