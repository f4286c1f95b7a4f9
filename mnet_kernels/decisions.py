"""Which sites of a swapped model run fused: measured, kept as JSON, explained as a table."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnet_kernels.nn import FusedConv2d
from mnet_kernels.pairs import measure as measure_pairs
from mnet_kernels.pairs import pairs, runners
from mnet_kernels.plan import Plan
from mnet_kernels.sequences import Runner
from mnet_kernels.timing import interleave

_ROUNDS = 9


@dataclass
class Swapped:
    """What a swapped model remembers."""

    original: nn.Module
    plan: Plan


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
        ] + [Row(left.module, left.pattern, "native", left.reason) for left in plan.left]
        self.rows.sort(key=lambda row: order.index(row.module))

    def save(self, path: str | PathLike[str]) -> None:
        """Write which sites run fused, for ``swap(model, decisions=path)``."""
        patterns = {site.conv: site.pattern for site in self._plan.sites}
        content = {
            name: {"pattern": patterns[name], "native": module.fusion.declined}
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
            sizes = " + ".join(str(len(run.stages)) for run in runs)
            console.print(f"{path or 'the model'}: {sizes} of them in one call each, on the CPU.")
        for runner in self._runners:
            for pair in pairs(runner):
                way = "in one pass" if pair.in_one_pass else "one after the other"
                console.print(f"{pair.depthwise} + {pair.pointwise}: {way} ({pair.reason})")
        kept = sum(runner.packed_bytes() for runner in self._runners)
        if kept:
            console.print(f"Weights and constants packed for these calls: {kept / 2**20:.1f} MiB.")
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _row(name: str, pattern: str, note: str, module: FusedConv2d) -> Row:
    device, dtype = module.weight.device, module.weight.dtype

    def served(in_training: bool) -> tuple[str, str | None]:
        why = module.why_native(device, dtype, in_training)
        return "native" if why else module.serving(device, dtype, in_training), why

    fusion = module.fusion
    backend, reason = served(module.uses_batch_statistics())
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
        if not isinstance(entry, dict) or set(entry) - {"pair"} != {"pattern", "native"}:
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
    for name, entry in content.items():
        fused[name].fusion.declined = entry["native"]
        fused[name].fusion.pair = entry.get("pair")


def measure(
    fast: nn.Module, fused: dict[str, FusedConv2d], inputs: tuple[Any, ...], of_pairs: bool
) -> None:
    """Leave native every site that is not faster fused, on the input it gets from ``inputs``; then
    the same for pairs in one pass."""
    spent: dict[str, list[float]] = {name: [0.0, 0.0] for name in fused}

    def hook(name: str, module: FusedConv2d, args: tuple[Tensor, ...]) -> None:
        if module.why_native(args[0].device, args[0].dtype) is None:
            for number, seconds in enumerate(_race(module.forward_native, module.forward, args[0])):
                spent[name][number] += seconds

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
    for name, (native, ours) in spent.items():
        if ours > native:
            fused[name].fusion.declined = f"left native: measured {native / ours:.2f}x"
    if not of_pairs:
        return
    with _eval_mode(fast), torch.no_grad():
        fast(*inputs)  # without the hooks: through the runs
        for runner in runners(fast):
            measure_pairs(runner)


def _race(native: Any, ours: Any, x: Tensor) -> tuple[float, float]:
    """Median seconds of each, taking turns."""
    done = interleave(
        {"native": partial(native, x), "ours": partial(ours, x)},
        rounds=_ROUNDS,
        synchronize=partial(torch.cuda.synchronize, x.device) if x.is_cuda else None,
    )
    return done["native"].median, done["ours"].median


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
