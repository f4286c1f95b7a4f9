"""Which pictures a page has, from rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mnet_kernels.report.drawing import (
    NARROW,
    WIDE,
    Axis,
    Bar,
    Curve,
    Figure,
    Mark,
    around,
    bars,
    plot,
)
from mnet_kernels.report.rows import COPY, FACETS, OURS, Row, Run
from mnet_kernels.report.words import error_text, ms_text, names

#: What a bar's colour says.
VERDICTS = {
    "faster": "faster than the best of the others",
    "slower": "slower: we lose",
    "noise": "within noise",
}
#: Marks of the peers, in the order in which they come; after the last it begins again.
SHAPES = ("square", "diamond", "up", "down", "cross", "plus")


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that share all facets, under a title of those facets that tell them apart."""
    telling = [f for f in FACETS if len({row.facets.get(f, "") for row in rows}) > 1]
    always = ("model", "dtype", "batch")
    found: dict[str, list[Row]] = {}
    for row in rows:
        facets = [row.facets.get(f, "") for f in FACETS if f in telling or f in always]
        found.setdefault(", ".join(filter(None, facets)), []).append(row)
    return found


def geometric_mean(rows: Iterable[Row]) -> float:
    """Of the rows' speed-ups against the best peer."""
    return statistics.geometric_mean(row.speedup.median for row in rows)


# ---- speed ----


def speedups(rows: Sequence[Row]) -> list[Figure]:
    """One figure a group, all on one axis; bars begin at 1."""
    values = [v for r in rows for v in (r.speedup.low, r.speedup.high, *r.others.values())]
    values += [row.torch_alone for row in rows if row.torch_alone]
    axis = Axis(min(0.9, *values) * 0.95, max(1.5, *values) * 1.05, log=True)
    found = []
    for title, group in groups(rows).items():
        drawn, told = [], []
        for row in group:
            spread = row.speedup
            group_bars = [
                Bar(spread.median, f"{spread.median:.2f}x", row.verdict, spread.low, spread.high)
            ]
            beside = [(value, "other") for _, value in sorted(row.others.items())]
            beside += [(row.torch_alone, "torch")] if row.torch_alone else []
            for value, css in beside:
                side = "faster" if value >= 1 else "slower"
                group_bars.append(Bar(value, f"{value:.2f}x", f"{side} {css}"))
            drawn.append((row.name, group_bars))
            told.append(f"{row.name} {spread.median:.2f}")
        mean = geometric_mean(group)
        seen = {row.verdict for row in group}
        legend = [(v, "bar", words) for v, words in VERDICTS.items() if v in seen]
        other = next((name for row in group for name in row.others), "")
        if other:
            layout = group[0].facets.get("layout") or "channels_last"
            legend.append(("faster other", "thin", f"thick: {layout}; thin: {other}"))
        if any(row.torch_alone for row in group):
            legend.append(("faster torch", "thin", "against PyTorch alone"))
        found.append(
            Figure(
                title,
                f"Times as fast as the fastest of the others: {', '.join(told)}.",
                (bars(drawn, axis, 1.0),),
                f"Geometric mean {mean:.2f}x" if len(group) > 1 else "",
                tuple(legend),
            )
        )
    return found


def times(row: Row) -> Figure:
    """Every way to run one network: milliseconds a call, the fastest first."""
    ways = sorted((way for way in row.us if way != COPY), key=lambda way: row.us[way].median)
    drawn = []
    for way in ways:
        ms = row.us[way]
        css = row.verdict if way == OURS else "peer"
        css = f"{row.verdict} other" if way.startswith(f"{OURS} ") else css
        text = f"{ms_text(ms.median / 1e3)} ms"
        drawn.append((names(way), [Bar(ms.median / 1e3, text, css, ms.low / 1e3, ms.high / 1e3)]))
    longest = max(row.us[way].high for way in ways) / 1e3
    alt = ", ".join(f"{names(way)} {ms_text(row.us[way].median / 1e3)}" for way in ways)
    extra = [row.facets.get(facet, "") for facet in ("dtype", "direction", "threads", "malloc")]
    return Figure(
        ", ".join([row.name, *(e for e in extra if e and e not in ("forward", "default malloc"))]),
        f"Milliseconds a call: {alt}.",
        (bars(drawn, Axis(0, longest * 1.02), 0.0, 4),),
    )


# ---- the roofline ----


def roofline(rows: Sequence[Row], environments: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    """Work a second over work a byte, a figure a number of threads; every way of every layer."""
    able = [row for row in rows if row.flops and row.bytes and row.kind in ("layer", "pair")]
    by_threads: dict[str, list[Row]] = {}
    for row in able:
        by_threads.setdefault(row.facets.get("threads", ""), []).append(row)
    return [_roofline(group, threads, environments) for threads, group in by_threads.items()]


def _roofline(
    rows: Sequence[Row], threads: str, environments: Mapping[str, Mapping[str, Any]]
) -> Figure:
    peers = list(dict.fromkeys(way for row in rows for way in row.peers))
    look = {OURS: ("ours", "dot")}
    look |= {
        way: ("ours other", "dot") for row in rows for way in row.us if way.startswith(f"{OURS} ")
    }
    look |= {way: (f"p{i % 8}", SHAPES[i % len(SHAPES)]) for i, way in enumerate(peers)}
    marks = []
    for way in reversed(look):  # ours on top
        css, shape = look[way]
        for row in rows:
            if way in row.us:
                rate = _rate(row, way)
                facets = ", ".join(filter(None, (row.facets.get(f, "") for f in FACETS[:3])))
                tip = f"{names(way)}: {row.name} ({facets}): {rate:.3g} GFLOP/s"
                marks.append(Mark(_intensity(row), rate, css, tip, shape))
    roofs, compute = _roofs(rows, threads, environments)
    x = around([_intensity(row) for row in rows], log=True, margin=0.3)
    tops = [bandwidth * x.high for bandwidth in roofs.values()]
    highest = min(max(tops, default=0), max(compute.values(), default=float("inf")))
    y = around([*(mark.y for mark in marks), *([highest] if highest else [])], log=True)
    curves = []
    for name, bandwidth in roofs.items():
        curves.append(_clipped(x, y, bandwidth, 1, "roof", name))
    for name, rate in compute.items():
        if y.low < rate <= y.high:
            curves.append(_clipped(x, y, rate, 0, "roof flat", name))
    best = max(row.of_copy or 0 for row in rows)
    told = "; ".join(f"{name}" for name in (*roofs, *compute))
    return Figure(
        f"Every layer and every way to run it{', ' + threads if threads else ''}",
        f"Work a second over work a byte of {len(rows)} layers, ours and {len(peers)} peers. "
        f"Limits: {told or 'none was measured'}. We reach up to {best:.0%} of the copy speed.",
        tuple(
            plot(
                width, 460 if width == WIDE else 380, x, y, "FLOP a byte", "GFLOP/s", curves, marks
            )
            for width in (NARROW, WIDE)
        ),
        "",
        tuple((css, shape, names(way)) for way, (css, shape) in look.items()),
    )


def _clipped(x: Axis, y: Axis, rate: float, power: int, css: str, label: str) -> Curve:
    """What of ``rate * intensity**power`` is inside the frame."""
    steps = [x.low * (x.high / x.low) ** (i / 60) for i in range(61)]
    points = [(step, rate * step**power) for step in steps]
    inside = tuple(point for point in points if y.low <= point[1] <= y.high)
    return Curve(inside or ((x.low, y.low),), css, label if inside else "", begin=power == 0)


def _intensity(row: Row) -> float:
    assert row.flops and row.bytes
    return row.flops / row.bytes


def _rate(row: Row, way: str) -> float:
    assert row.flops
    return row.flops / row.us[way].median / 1e3


def _roofs(
    rows: Sequence[Row], threads: str, environments: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, float], dict[str, float]]:
    """GB/s and GFLOP/s with their names: measured for themselves, else the copies beside rows."""
    for environment in environments.values():
        ceilings = environment.get("ceilings") or {}
        count = threads.partition(" ")[0] or str(environment.get("threads", ""))
        told = ceilings.get("threads", ceilings).get(count) or {}
        copies = {int(size): float(rate) for size, rate in told.get("copy_gb_per_s", {}).items()}
        if copies:
            matrix = told.get("matrix_gflop_per_s", {})
            return _copy_roofs(copies), {
                f"matrix products, {dtype}: {rate:,.0f} GFLOP/s": float(rate)
                for dtype, rate in matrix.items()
            }
    copies = {
        int(row.bytes): row.bytes / row.us[COPY].median / 1e3
        for row in rows
        if COPY in row.us and row.bytes
    }
    return _copy_roofs(copies), {}


def _copy_roofs(copies: Mapping[int, float]) -> dict[str, float]:
    """In cache: the fastest; from memory: the largest."""
    if not copies:
        return {}
    cached, memory = max(copies.values()), copies[max(copies)]
    found = {f"copy in cache, {cached:.0f} GB/s": cached}
    if memory < 0.9 * cached:
        found[f"copy in memory, {memory:.0f} GB/s"] = memory
    return found


# ---- accuracy ----


def accuracy(rows: Sequence[Row]) -> Figure | None:
    """Our error as a multiple of that of the most accurate of the others, over the latter."""
    marks, smaller = [], 0
    dtypes = list(dict.fromkeys(row.facets.get("dtype", "") for row in rows))
    look = {
        dtype: ("ours", "dot") if i == 0 else (f"p{i}", SHAPES[i % len(SHAPES)])
        for i, dtype in enumerate(dtypes)
    }
    for row in rows:
        others = [e for way, e in row.error.items() if not way.startswith(OURS) and e]
        ours = row.error.get(OURS)
        if not others or not ours:
            continue
        best = min(others)
        smaller += ours <= best
        dtype = row.facets.get("dtype", "")
        css, shape = look[dtype]
        where = ", ".join(filter(None, (row.name, dtype)))
        tip = f"{where}: ours {error_text(ours)}, others at best {error_text(best)}"
        marks.append(Mark(best, ours / best, css if row.ok else "slower", tip, shape))
    if not marks:
        return None
    x = around([mark.x for mark in marks], log=True)
    y = around([0.5, 2.0, *(mark.y for mark in marks)], log=True)
    same = Curve(((x.low, 1.0), (x.high, 1.0)), "roof", "the same error")
    axes = "error of the most accurate of the others", "our error as a multiple of it"
    return Figure(
        "Our error beside the smallest of the others",
        f"In {smaller} of {len(marks)} rows our error is no larger than that of the most accurate "
        f"of the others; at most it is {max(mark.y for mark in marks):.2f} times as large.",
        tuple(plot(width, 300, x, y, *axes, [same], marks) for width in (NARROW, WIDE)),
        "Below the line ours is the more accurate.",
        tuple((css, shape, dtype) for dtype, (css, shape) in look.items() if dtype),
    )


# ---- training ----


def training(runs: Sequence[Run]) -> list[Figure]:
    """Loss and accuracy of all runs by epoch: validation solid, training dashed."""
    found = []
    for quantity, words in (("loss", "Loss"), ("accuracy", "Accuracy, %")):
        curves, told = [], []
        times_100 = 100 if quantity == "accuracy" else 1
        for i, run in enumerate(runs):
            for half in ("train", "validation"):
                key = f"{half}_{quantity}"
                points = tuple((row["epoch"], times_100 * row[key]) for row in run.rows)
                dashed = " dashed" if half == "train" else ""
                under = " under" if i == 0 and len(runs) > 1 else ""  # seen below an equal one
                curves.append(Curve(points, f"{_run_css(i)}{dashed}{under}"))
            last = run.rows[-1]
            told.append(
                f"{run.name} ends at {times_100 * last[f'validation_{quantity}']:.4g} "
                f"after {last['epoch']:.0f} epochs"
            )
        values = [y for curve in curves for _, y in curve.points]
        epochs = [x for curve in curves for x, _ in curve.points]
        x = Axis(min(0, *epochs), max(epochs))
        legend = [(_run_css(i), "line", f"{run.name}, validation") for i, run in enumerate(runs)]
        legend += [
            (f"{_run_css(i)} dashed", "line", f"{run.name}, training") for i, run in enumerate(runs)
        ]
        found.append(
            Figure(
                f"{words.partition(',')[0]} by epoch",
                f"Validation {quantity}: {'; '.join(told)}.",
                (plot(NARROW, 300, x, around(values), "epoch", words, curves),),
                "",
                tuple(legend),
            )
        )
    return found


def _run_css(i: int) -> str:
    return "ours" if i == 0 else f"p{(i - 1) % 8}"


# ---- the trade-off ----


def tradeoff(result: Mapping[str, Any]) -> Figure | None:
    """Top-1 over latency, native and swapped joined by a line; the front of the swapped ones."""
    rows = [row for row in result["rows"] if row.get("accuracy")]
    if not rows:
        return None
    curves, marks, points = [], [], []
    for row in rows:
        top1 = 100 * row["accuracy"]["top1"]
        native = row["latency_ms"][row["best_native"]]["median"]
        swapped = row["latency_ms"]["swapped"]["median"]
        points.append((swapped, top1))
        curves.append(Curve(((native, top1), (swapped, top1)), "joint"))
        label = row["label"]
        words = f"{label}: top-1 {top1:.1f} %"
        marks.append(Mark(native, top1, "peer", f"{words}, native {ms_text(native)} ms", "square"))
        marks.append(
            Mark(
                swapped,
                top1,
                "ours",
                f"{words}, swapped {ms_text(swapped)} ms",
                "dot",
                row["label"],
            )
        )
    front = pareto(points)
    curves.append(Curve(tuple(front), "front"))
    x = around([mark.x for mark in marks], log=True, margin=0.12)
    y = around([mark.y for mark in marks], margin=0.1)
    on_front = [row["label"] for row, point in zip(rows, points, strict=True) if point in front]
    axes = "ms a picture (batch 1)", "ImageNet top-1, %"
    return Figure(
        "Accuracy over latency",
        f"{len(rows)} networks; no other is both faster and more accurate than: "
        f"{', '.join(on_front)} (swapped).",
        tuple(
            plot(width, height, x, y, *axes, curves, marks)
            for width, height in ((NARROW, 420), (WIDE, 460))
        ),
        "",
        (
            ("ours", "dot", "with mnet_kernels"),
            ("peer", "square", "native PyTorch, the faster layout"),
            ("front", "line", "no other is faster and more accurate"),
        ),
    )


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of some points (cost, value) that no other beats in both; the cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front
