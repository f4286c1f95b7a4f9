"""What became of every convolution of a swapped model, as a table."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from os import PathLike

from mnet_kernels.nn import FusedConv2d, dense, is_depthwise
from mnet_kernels.ops import packs
from mnet_kernels.runs.pairs import pairs
from mnet_kernels.runs.runner import Runner
from mnet_kernels.swap import decisions
from mnet_kernels.swap.plan import Left, Plan


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
        decisions.save(path, self._plan, self._fused)

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
