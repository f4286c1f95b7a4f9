"""Tables from the JSON of `make bench`, for the terminal and for the README.

python benchmarks/tables.py RESULTS.json [...] [--write README.md]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path

from result_files import Result, Row, load

#: A network's columns: name, and of which candidates the fastest is shown.
COLUMNS = {
    "eager": ("eager", "eager channels_last"),
    "folded": ("folded", "folded channels_last"),
    "jit": ("jit optimize_for_inference",),
    "compile": ("torch.compile", "torch.compile frozen", "torch.compile max-autotune"),
    "ONNX Runtime": ("ONNX Runtime",),
    "OpenVINO": ("OpenVINO",),
    "XNNPACK": ("XNNPACK",),
    "ncnn": ("ncnn",),
    "ours": ("ours",),
}
LEGEND = (
    "Speed-ups are apart: against the best of plain PyTorch (eager, BatchNorm folded, jit, "
    "torch.compile; either layout) and against the best other engine (ONNX Runtime, OpenVINO, "
    "XNNPACK, ncnn). **Bold**: we lose. ~: within noise, less than four fifths of the rounds "
    "agree. Of matrix speed: all multiply-adds in our time, against PyTorch's large matrix product."
)
#: Rows that the second table sums up, one line a set: its name and what belongs to it.
SETS = {
    "MobileNet V1, batch 1": ("layer", "mobilenet_v1", 1, "warm"),
    "MobileNet V1, batch 1, cold cache": ("layer", "mobilenet_v1", 1, "cold"),
    "MobileNet V1, batch 16": ("layer", "mobilenet_v1", 16, None),
    "MobileNet V2, batch 1": ("layer", "mobilenet_v2", 1, "warm"),
    "MobileNet V3 large, 5x5, batch 1": ("layer", "mobilenet_v3_large", 1, "warm"),
    "ConvNeXt tiny's shapes, 7x7, batch 1": ("layer", "convnext_tiny", 1, "warm"),
    "V1's depthwise + pointwise pairs, batch 1": ("pair", "mobilenet_v1", 1, "warm"),
    "V1's depthwise + pointwise pairs, batch 16": ("pair", "mobilenet_v1", 16, None),
}
DTYPES = ("float32", "bfloat16")


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _table(head: list[str], lines: Iterable[list[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *lines)] + [""]


def _fastest(row: Row, names: Iterable[str]) -> str | None:
    there = [name for name in names if name in row["us"]]
    return min(there, key=lambda name: row["us"][name]["median"]) if there else None


def _us(row: Row, name: str | None) -> str:
    return "-" if name is None else f"{row['us'][name]['median']:.1f}"


def _ms(row: Row, name: str | None) -> str:
    return "-" if name is None else f"{row['us'][name]['median'] / 1e3:.3g}"


def _speedup(row: Row | None, family: str) -> str:
    s = None if row is None else row.get(f"speedup_{family}")
    if s is None:
        return "-"
    noise = s["p20"] < 1 < s["p80"]
    return _bold(s["median"], "~" if noise else "")


def _bold(speedup: float, mark: str = "") -> str:
    text = f"{speedup:.2f}x{mark}"
    return text if float(f"{speedup:.2f}") >= 1 else f"**{text}**"


def layer_table(rows: list[Row]) -> list[str]:
    """MobileNet V1's depthwise layers at batch 1, one line each."""
    chosen: dict[tuple[int, ...], dict[str, Row]] = {}
    for row in _of(rows, "layer", "mobilenet_v1", 1, "warm"):
        chosen.setdefault(tuple(row["shape"]), {})[row["dtype"]] = row
    if not chosen:
        return []
    lines = []
    for (channels, size, _, _, stride), found in chosen.items():
        cells = [f"{channels}, {size}, {stride}"]
        for dtype in DTYPES:
            row = found.get(dtype)
            if row is None:
                cells += ["-"] * (6 if dtype == "float32" else 5)
                continue
            cells += [_us(row, row["best_torch"]), _us(row, row.get("best_engine"))]
            cells += [f"{row['us']['ours']['median']:.1f}"]
            cells += [f"{row['fraction_of_copy']:.0%}"] if dtype == "float32" else []
            cells += [_speedup(row, "torch"), _speedup(row, "engine")]
        lines.append(cells)
    head = ["C, H, stride"]
    for name in ("float32", "bf16"):
        head += [f"{name}: best of PyTorch, µs", "best engine", "ours"]
        head += ["of copy speed"] if name == "float32" else []
        head += ["against PyTorch", "against engines"]
    return ["**Depthwise + BatchNorm + ReLU6 layers of MobileNet V1, batch 1, in cache**", "",
            *_table(head, lines)]  # fmt: skip


def _of(rows: list[Row], kind: str, model: str, batch: int, cache: str | None) -> list[Row]:
    most = max((row["threads"] for row in rows if "threads" in row), default=1)
    return [
        row for row in rows
        if (row["kind"], row.get("model"), row["batch"]) == (kind, model, batch)
        and cache in (None, row["cache"]) and row["threads"] == most
    ]  # fmt: skip


def set_table(rows: list[Row]) -> list[str]:
    """Geometric means of whole sets of rows, with how many of them are lost."""
    lines = []
    for name, wanted in SETS.items():
        chosen = _of(rows, *wanted)
        if not chosen:
            continue
        cells = [name]
        for dtype in DTYPES:
            for family in ("torch", "engine"):
                speedups = [
                    row[f"speedup_{family}"]["median"] for row in chosen
                    if row["dtype"] == dtype and f"speedup_{family}" in row
                ]  # fmt: skip
                cells.append(_bold(geometric_mean(speedups)) if speedups else "-")
        lost = sum(row["speedup"]["median"] < 1 for row in chosen)
        lines.append([*cells, f"**{lost}** of {len(chosen)}" if lost else f"0 of {len(chosen)}"])
    if not lines:
        return []
    head = ["geometric means", "float32: against PyTorch", "against engines",
            "bf16: against PyTorch", "against engines", "rows lost to anybody"]  # fmt: skip
    return ["**All layers and pairs**", "", *_table(head, lines)]


def overhead(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row["kind"] == "overhead":
            ours, peer = row["us"]["ours"]["median"], row["us"]["F.conv2d"]["median"]
            lines += [f"A call on a 1x8x4x4 input takes {ours:.1f} µs, {ours / peer:.2f} of "
                      f"F.conv2d's {peer:.1f} µs.", ""]  # fmt: skip
    return lines


def network_table(results: list[Result]) -> list[str]:
    """Every network against everybody, in milliseconds."""
    chosen = [
        (result.malloc, row) for result in results for row in result.rows
        if row["kind"] == "network"
    ]  # fmt: skip
    if not chosen:
        return []
    several = len({malloc for malloc, _ in chosen}) > 1
    columns = [c for c, names in COLUMNS.items() if any(_fastest(r, names) for _, r in chosen)]
    lines = []
    for malloc, row in chosen:
        short = {"float32": "f32", "bfloat16": "bf16"}.get(row["dtype"], row["dtype"])
        name = f"{row['model']}, {row['size']}, b{row['batch']}, {short}"
        name += f", {row['threads']} thread" + ("s" if row["threads"] > 1 else "")
        name += f", {malloc} malloc" if several and malloc == "tuned" else ""
        times = [_ms(row, _fastest(row, COLUMNS[column])) for column in columns]
        of_matrix = row.get("fraction_of_matrix")
        times.append("-" if of_matrix is None else f"{of_matrix:.0%}")
        lines.append([name, *times, _speedup(row, "torch"), _speedup(row, "engine")])
    head = ["network, batch", *columns, "of matrix speed", "against PyTorch", "against engines"]
    return ["**Networks, ms**", "", *_table(head, lines)]


def source(result: Result) -> str:
    """Where and with what a result was measured."""
    e = result.environment
    peers = ", ".join(f"{name} {v}" for name, v in e["peers"].items() if v is not None)
    tuned = "".join(f"; {k}={v}" for k, v in e["malloc"].items())
    return (
        f"<sub>{result.path.name}: {e['cpu']}, {e['threads']} threads, {e['instruction_set']}, "
        f"torch {e['torch']}, {peers or 'no other engine'}; commit {e['commit']}, "
        f"{e['date'][:10]}{tuned}</sub>"
    )


def render(paths: list[Path]) -> str:
    """Markdown of all tables, closing with where they were measured; bad files are left out.

    Raises:
        ValueError: no file is a result.
    """
    results, refused = [], []
    for path in paths:
        try:
            results.append(load(path))
        except ValueError as error:
            refused.append(str(error))
            print(f"tables.py: left out: {error}", file=sys.stderr)
    if not results:
        raise ValueError("; ".join(refused))
    lines = [LEGEND, "", *network_table(results)]
    for result in results:
        lines += layer_table(result.rows) + set_table(result.rows) + overhead(result.rows)
    lines += [line for result in results for line in (source(result), "")]
    return "\n".join(lines).strip() + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--write", type=Path, help="replace the marked part of this file")
    options = parser.parse_args(arguments)
    try:
        text = render(options.results)
    except ValueError:
        return 2
    if options.write is None:
        print(text)
        return 0
    begin, end = "<!-- measured: begin -->\n", "<!-- measured: end -->"
    page = options.write.read_text()
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        print(f"tables.py: {options.write} has no marked part", file=sys.stderr)
        return 2
    options.write.write_text(before + begin + text + end + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
