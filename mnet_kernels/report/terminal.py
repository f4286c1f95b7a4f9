"""A comparison's result as tables in a terminal, 80 columns and up."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mnet_kernels.report.tables import sources
from mnet_kernels.report.words import (
    WAYS,
    environment_text,
    error_text,
    ms_text,
    size_text,
    time_text,
    top5_text,
    verdict,
)

#: The columns of a network's block, and their widths: all blocks stand in line.
NETWORK_COLUMNS = {"": 22, "ms": 17, "speed-up": 8, "error": 7, "allowed": 7, "top-5": 5}

LEGEND = (
    "ms: median (20th-80th percentile) of interleaved rounds; speed-up: against the faster native, "
    "marked *, pair by pair; error: largest difference to float64, relative to the largest output; "
    "top-5: how many images get the same five best classes in the same order."
)

TRADEOFF_LEGEND = (
    "native > swapped; native is the faster of its two layouts. ms: a picture alone; pictures/s: "
    "{batch} at a time; peak: memory that a process of its own holds then, beyond what it holds "
    "without the network; *: published."
)


def print_networks(console: Console, result: dict[str, Any]) -> None:
    """One block a network and batch: time, speed-up, error and answers of each way to run."""
    for number, row in enumerate(result["rows"]):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=number == 0)
        for heading, width in NETWORK_COLUMNS.items():
            table.add_column(heading, width=width, justify="right" if heading else "left")
        for way, label in WAYS.items():
            cells: list[str | Text] = [
                f"{label} *" if way == row["best_native"] else label,
                time_text(row["time_ms"][way]),
                "",
                _error(row, way),
            ]
            if way == "swapped":
                cells[2] = _speed(row["speedup"])
                cells += [error_text(row["error"]["tolerance"]), top5_text(row["answers"])]
            table.add_row(*cells)
        title = Text(f"{row['model']}, batch {row['batch']}", style="bold")
        title.append(f"  {row['dtype']}, {row['size']}x{row['size']}", style="not bold dim")
        console.print(title, table, Text(), sep="\n")
    console.print(Text(LEGEND, style="dim"))


def print_layers(console: Console, layers: list[dict[str, Any]]) -> None:
    """One line a fused layer."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("layer")
    for heading in ("input", "native", "swapped, ms", "speed-up", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in layers:
        table.add_row(
            Text(row["layer"], overflow="fold"),
            "x".join(str(n) for n in row["input"]),
            ms_text(row["time_ms"][row["best_native"]]["median"]),
            ms_text(row["time_ms"]["swapped"]["median"]),
            _speed(row["speedup"]),
            _error(row, "swapped"),
        )
    console.print(table, Text(), sep="\n")


def print_labels(console: Console, photographs: list[dict[str, Any]]) -> None:
    """Each photograph's three best labels, native and swapped side by side."""
    table = Table("photograph", "native", "swapped", box=box.SIMPLE_HEAD, pad_edge=False)
    for told in photographs:
        sides = [
            "\n".join(f"{best['probability']:6.1%}  {best['label']}" for best in told[way])
            for way in ("native", "swapped")
        ]
        same = [b["label"] for b in told["native"]] == [b["label"] for b in told["swapped"]]
        table.add_row(
            told["photograph"], sides[0], Text(sides[1], style="" if same else "bold red")
        )
        table.add_section()
    console.print(table)


def print_tradeoff(console: Console, result: dict[str, Any]) -> None:
    """A line a network: its size, what it costs native > swapped, and its accuracy."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("network", no_wrap=True)
    headings = ("params", "madds", "top-1", "ms", "", "pictures/s", "", "peak MB")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result["rows"]:
        accuracy = row["accuracy"]
        ms = [row["latency_ms"][way]["median"] for way in (row["best_native"], "swapped")]
        rates = [row["images_per_second"][way] for way in ("native", "swapped")]
        peaks = [row["peak_bytes"][way] for way in ("native", "swapped")]
        mark = "" if not accuracy else "" if accuracy["kind"] == "measured" else "*"
        table.add_row(
            row["label"],
            size_text(row["params"]),
            size_text(row["multiply_adds"]),
            f"{accuracy['top1']:.1%}{mark}" if accuracy else "-",
            " > ".join(map(ms_text, ms)),
            _speed(row["latency_speedup"]),
            " > ".join(f"{rate:,.0f}" for rate in rates),
            _speed(row["throughput_speedup"]),
            "-" if None in peaks else " > ".join(f"{peak / 1e6:.0f}" for peak in peaks),
        )
    console.print(table, Text(), sep="\n")
    legend = TRADEOFF_LEGEND.format(batch=result["settings"]["batch"])
    console.print(Text(legend, style="dim"))
    for source in sources(result):
        console.print(Text(source, style="dim"))


def print_verdict(console: Console, result: dict[str, Any]) -> None:
    """Answers and speed in a sentence each, and where they were measured."""
    here = environment_text(result["environment"])
    keys = ("cpu", "gpu", "instruction set", "threads", "torch")
    place = ", ".join(f"{key} {here[key]}" for key in keys if key in here)
    console.print(Text(verdict(result), style="bold"))
    console.print(Text(f"Measured on: {place}", style="dim"))


def _speed(speedup: dict[str, float]) -> Text:
    return Text(f"{speedup['median']:.2f}x", style="green" if speedup["median"] >= 1 else "red")


def _error(row: dict[str, Any], way: str) -> Text:
    wrong = way == "swapped" and not row["ok"]
    return Text(error_text(row["error"][way]), style="bold red" if wrong else "")
