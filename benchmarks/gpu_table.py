"""The result of `make gpu` as Markdown: what passed, and a table for each kind of row."""

from __future__ import annotations

from typing import Any

#: Rows of the second backend, beside those of CUDA, which are named by the layout alone.
TRITON = ("channels_last, triton", "contiguous, triton")


def table(result: dict[str, Any]) -> str:
    """Markdown of what is there so far."""
    facts, stages = result["environment"], result["stages"]
    lines = [
        f"{facts.get('gpu')}, torch {facts.get('torch')}, commit {facts.get('commit')}, "
        f"{facts.get('date')}; copy {facts.get('copy_gb_per_s', 0):.0f} GB/s", "",
    ]  # fmt: skip
    for name, stage in stages.items():
        verdict = stage.get("left_out") or ("passed" if stage["passed"] else "FAILED")
        verdict += ", out of time" if stage.get("out_of_time") else ""
        lines.append(f"- {name}: {verdict} {stage.get('counts', '')}")
    layers = stages.get("layers", {}).get("rows", [])
    lines += _goals(layers) + _layers(layers)
    for name in ("separable", "conv"):
        rows = stages.get(name, {}).get("rows", [])
        if rows:
            lines += _head(list(rows[0]["table"]))
            lines += [f"| {' | '.join(row['table'].values())} |" for row in rows]
    lines += _training(stages.get("training", {}).get("rows", []))
    for row in stages.get("profile", {}).get("rows", []):
        call = f"{row['shape']}, batch {row['batch']}, {row['dtype']}, {row['layout']}"
        lines += ["", f"{call}: " + "; ".join(f"{k} {v}" for k, v in row["figures"].items())]
    rows = stages.get("networks", {}).get("rows", [])
    if rows:
        lines += ["", "| network, batch, dtype | way | images/s | with a CUDA graph | peak MB |",
                  "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for row in rows:
        for way, rate in row["images_per_s"].items():
            lines.append(
                f"| {row['model']}, {row['batch']}, {row['dtype']} | {way} | {rate:.0f} "
                f"| {row['images_per_s_graph'][way]:.0f} | {row['peak_bytes'][way] / 1e6:.0f} |"
            )
    return "\n".join(lines) + "\n"


def _goals(rows: list[dict[str, Any]]) -> list[str]:
    """How far the layers are where they are meant to be."""
    lines = []
    for way in ("channels_last", "channels_last, triton"):
        found = [row for row in rows if way in row]
        large = [
            row[way]["fraction_of_copy"] for row in found
            if (row["model"], row["batch"], row["dtype"]) == ("mobilenet_v1", 256, "bfloat16")
        ]  # fmt: skip
        if large:
            lines.append(
                f"- {way}: {sum(part >= 0.85 for part in large)} of {len(large)} V1 layers at "
                f"batch 256 in bfloat16 reach 85 % of copy speed, the slowest {min(large):.0%}"
            )
        compiled = [row[way]["against_compile"]["median"] for row in found
                    if "against_compile" in row[way]]  # fmt: skip
        if compiled:
            lines.append(
                f"- {way}: slower than torch.compile in {sum(ratio < 1 for ratio in compiled)} of "
                f"{len(compiled)} rows, the slowest {min(compiled):.2f}x"
            )
    return lines


def _cells(found: dict[str, Any] | None, us: float) -> list[str]:
    """Time, part of copy speed and speed-up of a way of ours that ran."""
    if found is None:
        return ["-", "-", "-"]
    speedup = found["against_best_peer"]["median"]
    lost = "" if speedup >= 1 else " (we lose)"
    return [f"{us:.1f}", f"{found['fraction_of_copy']:.0%}", f"{speedup:.2f}x{lost}"]


def _head(columns: list[str]) -> list[str]:
    return ["", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]


def _layers(rows: list[dict[str, Any]]) -> list[str]:
    ways = ("channels_last", "contiguous", *TRITON)
    columns = ["C, H, kernel, stride", "batch", "dtype", "best peer", "µs"]
    for way in ways:
        columns += [f"ours, {way}", "of copy", "speed-up"]
    columns.append("Triton's first call, s")
    lines = _head(columns) if rows else []
    for row in rows:
        channels, height, _, kernel, stride = row["shape"]
        cells = [
            f"{channels}, {height}, {kernel}, {stride}", row["batch"],
            row["dtype"] + ("" if row["cold"] else " (in L2)"), row["best_peer"],
            f"{row['us'][row['best_peer']]['median']:.1f}",
        ]  # fmt: skip
        for way in ways:
            us = row["us"].get(f"ours {way}", {}).get("median", 0)
            wrong = f"ours {way}" in row["error"] and way not in row
            cells += ["WRONG", "-", "-"] if wrong else _cells(row.get(way), us)
        first = row["triton_first_call_s"].values()
        cells.append(" / ".join(f"{seconds:.1f}" for seconds in first) or "-")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _training(rows: list[dict[str, Any]]) -> list[str]:
    layers = [row for row in rows if "shape" in row]
    steps = [row for row in rows if "shape" not in row]
    lines = []
    if layers:
        lines += [
            "",
            "Depthwise layers, training, forward and backward; copy of five passes' bytes.",
        ]
        lines += _head(["C, H, kernel, stride", "batch", "dtype", "best peer", "µs", "way of ours",
                        "µs", "of copy", "speed-up"])  # fmt: skip
    for row in layers:
        channels, height, _, kernel, stride = row["shape"]
        best = row["best_peer"]
        for way, found in row["ours"].items():
            cells = [f"{channels}, {height}, {kernel}, {stride}", row["batch"], row["dtype"], best,
                     f"{row['us'][best]['median']:.1f}", way,
                     *_cells(found, row["us"][way]["median"])]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    if steps:
        lines += _head(["training step of", "batch", "dtype", "way", "images/s", "peak MB"])
    for row in steps:
        for way, rate in row["images_per_s"].items():
            lines.append(
                f"| {row['model']}, {row['size']} | {row['batch']} | {row['dtype']} | {way} "
                f"| {rate:.0f} | {row['peak_bytes'][way] / 1e6:.0f} |"
            )
    return lines
