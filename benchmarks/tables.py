"""Tables from the JSON of `make bench`, for the terminal and for the README.

python benchmarks/tables.py RESULTS.json [...] [--write README.md]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """(environment, rows) of a result file; ValueError where it is not one."""
    try:
        result = json.loads(path.read_text())
        environment = result["machine_info"]["mnet_kernels"]
        return environment, [b["extra_info"] for b in result["benchmarks"]]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a result of `make bench`: {error}") from None


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _time(row: Row, name: str) -> str:
    us = row["us"][name]["median"]
    return f"{us / 1e3:.2f} ms" if us >= 1000 else f"{us:.1f} µs"


def _speedup(row: Row) -> str:
    """Bold where we lose; said where we cannot tell: a fifth of the rounds are below 1."""
    s = row["speedup"]
    text = _lost(s["median"])
    return f"{text} (within noise)" if s["p20"] < 1 <= s["median"] else text


def _lost(speedup: float) -> str:
    return f"{speedup:.2f}x" if speedup >= 1 else f"**{speedup:.2f}x (we lose)**"


def layer_tables(rows: list[Row]) -> list[str]:
    lines = []
    for batch in (1, 16):
        for dtype in ("float32", "bfloat16"):
            chosen = [
                r for r in rows
                if r["kind"] == "layer" and r["batch"] == batch and r["dtype"] == dtype
                and r["model"] == "mobilenet_v1"
            ]  # fmt: skip
            if not chosen:
                continue
            lines += [
                f"**{dtype}, batch {batch}**", "",
                "| C, H, stride | best of plain PyTorch | ours, channels_last | speed-up "
                "| of copy speed | ours, contiguous | speed-up |",
                "| --- | --- | --- | --- | --- | --- | --- |",
            ]  # fmt: skip
            others = []
            for row in chosen:
                peer, (channels, size, _, _, stride) = row["best_peer"], row["shape"]
                us = {name: times["median"] for name, times in row["us"].items()}
                others.append(us[peer] / us["ours contiguous"])
                lines.append(
                    f"| {channels}, {size}, {stride} | {_time(row, peer)} ({peer}) "
                    f"| {_time(row, 'ours')} | {_speedup(row)} | {row['fraction_of_copy']:.0%} "
                    f"| {_time(row, 'ours contiguous')} | {_lost(others[-1])} |"
                )
            mean = geometric_mean([r["speedup"]["median"] for r in chosen])
            lines += [
                f"| geometric mean | | | {mean:.2f}x | | | {geometric_mean(others):.2f}x |", ""
            ]  # fmt: skip
    for row in rows:
        if row["kind"] == "overhead":
            share = row["us"]["ours"]["median"] / row["us"]["F.conv2d"]["median"]
            lines += [
                f"A call on a 1x8x4x4 input takes {_time(row, 'ours')}, {share:.2f} of F.conv2d's "
                f"{_time(row, 'F.conv2d')}.", "",
            ]  # fmt: skip
    return lines


def network_table(rows: list[Row], malloc: str) -> list[str]:
    chosen = [r for r in rows if r["kind"] == "network"]
    if not chosen:
        return []
    peers = ["eager", "eager channels_last", "torch.compile"]
    lines = [
        f"**Networks, float32, {malloc} malloc**", "",
        f"| network, batch | {' | '.join(peers)} | swapped | against eager's best | against all |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in chosen:
        times = [_time(row, p) if p in row["us"] else "-" for p in peers]
        eager = min(row["us"][p]["median"] for p in peers[:2]) / row["us"]["ours"]["median"]
        lines.append(
            f"| {row['model']}, {row['size']}, {row['batch']} | {' | '.join(times)} "
            f"| {_time(row, 'ours')} | {eager:.2f}x | {_speedup(row)} |"
        )
    return [*lines, ""]


def render(paths: list[Path]) -> str:
    """Markdown of all tables, closing with where they were measured."""
    lines: list[str] = []
    for path in paths:
        environment, rows = load(path)
        tuned = bool(environment["malloc"])
        lines += layer_tables(rows) + network_table(rows, "tuned" if tuned else "default")
        lines += [
            f"<sub>{path.name}: {environment['cpu']}, {environment['threads']} threads, "
            f"{environment['instruction_set']}, torch {environment['torch']}, commit "
            f"{environment['commit']}, {environment['date'][:10]}; medians of interleaved rounds"
            + "".join(f"; {k}={v}" for k, v in environment["malloc"].items() if tuned)
            + "</sub>",
            "",
        ]  # fmt: skip
    return "\n".join(lines).strip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--write", type=Path, help="replace the marked part of this file")
    options = parser.parse_args()
    try:
        text = render(options.results)
    except ValueError as error:
        print(f"tables.py: {error}", file=sys.stderr)
        return 2
    if options.write is None:
        print(text)
        return 0
    page = options.write.read_text()
    begin, end = "<!-- measured: begin -->\n", "<!-- measured: end -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    options.write.write_text(before + begin + text + end + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
