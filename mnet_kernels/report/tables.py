"""The page's tables: what has no value in any row has no column."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mnet_kernels.report.rows import FACETS, OURS, Row, Spread, verdict_of
from mnet_kernels.report.words import error_text, ms_text, percent_text, size_text, us_text


@dataclass(frozen=True)
class Cell:
    """``value`` is what the column is sorted by: a number, else the text."""

    text: str
    value: float | None = None
    css: str = ""


@dataclass(frozen=True)
class Table:
    """A table as the page shows it."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    #: Of each column: numbers stand at the right.
    numeric: tuple[bool, ...]


_Columns = Mapping[str, Callable[[Any], Cell]]


def table(caption: str, columns: _Columns, things: Iterable[Any]) -> Table:
    """A row for each thing; columns that are empty in all rows are left out."""
    grid = [[make(thing) for make in columns.values()] for thing in things]
    kept = [i for i in range(len(columns)) if any(row[i].text for row in grid)]
    return Table(
        caption,
        tuple(heading for i, heading in enumerate(columns) if i in kept),
        tuple(tuple(row[i] for i in kept) for row in grid),
        tuple(any(row[i].value is not None for row in grid) for i in kept),
    )


def measured(rows: Sequence[Row], caption: str) -> Table:
    """Everything about every row, the losses too."""
    always = ("model", "dtype", "batch")
    telling = [
        facet
        for facet in FACETS
        if facet in always or len({row.facets.get(facet, "") for row in rows}) > 1
    ]

    def facet(name: str) -> Callable[[Row], Cell]:
        def cell(row: Row) -> Cell:
            text = row.facets.get(name, "")
            number = text.rpartition(" ")[2] if name == "batch" else text.partition(" ")[0]
            return Cell(text, float(number) if number.isdecimal() else None)

        return cell

    def speedup(row: Row) -> Cell:
        spread = row.speedup
        text = f"{spread.median:.2f}x ({spread.low:.2f}-{spread.high:.2f})"
        words = {"slower": " we lose", "noise": " noise"}.get(row.verdict, "")
        return Cell(text + words, spread.median, row.verdict)

    def other(row: Row) -> Cell:
        told = row.others
        value = min(told.values(), default=None)
        if value is None:
            return Cell("")
        return Cell(f"{value:.2f}x", value, "slower" if value < 1 else "")

    def time(way: Callable[[Row], str]) -> Callable[[Row], Cell]:
        def cell(row: Row) -> Cell:
            us = row.us[way(row)].median
            return Cell(us_text(us), us)

        return cell

    def error(of: Callable[[Row], float | None], marked: bool) -> Callable[[Row], Cell]:
        def cell(row: Row) -> Cell:
            value = of(row)
            if value is None and not (marked and OURS in row.error):
                return Cell("")
            css = "slower" if marked and not row.ok else ""
            return Cell(error_text(value), value if value is not None else float("inf"), css)

        return cell

    def others_error(row: Row) -> float | None:
        found = [e for way, e in row.error.items() if not way.startswith(OURS) and e is not None]
        return min(found, default=None)

    def against(spread: Spread | None) -> Cell:
        if spread is None:
            return Cell("")
        verdict = verdict_of(spread)
        return Cell(f"{spread.median:.2f}x", spread.median, verdict)

    def missing(row: Row) -> Cell:
        reasons: dict[str, list[str]] = {}
        for name, reason in row.missing.items():
            reasons.setdefault(reason, []).append(name)
        told = [f"{', '.join(named)}: {reason}" for reason, named in reasons.items()]
        return Cell("; ".join(told), css="wrap")

    def share(value: float | None) -> Cell:
        return Cell(percent_text(value), value)

    columns: _Columns = {
        "Row": lambda row: Cell(row.name),
        **{name.capitalize(): facet(name) for name in telling},
        "Pattern": lambda row: Cell(row.pattern),
        "Speed-up": speedup,
        "Against PyTorch": lambda row: against(row.torch),
        "Against engines": lambda row: against(row.engine),
        "Other layout": other,
        "Ours": time(lambda row: OURS),
        "Fastest other": time(lambda row: row.best),
        "which is": lambda row: Cell(row.best),
        "Of copy speed": lambda row: share(row.of_copy),
        "Of matrix rate": lambda row: share(row.of_matrix),
        "Our error": error(lambda row: row.error.get(OURS), True),
        "Others' best": error(others_error, False),
        "Allowed": error(lambda row: row.allowed, False),
        "Same top-5": lambda row: Cell(row.top5),
        "Fused layers": lambda row: Cell("" if row.fused is None else str(row.fused), row.fused),
        "Weights": lambda row: Cell(row.weights),
        "Missing": missing,
    }
    return table(caption, columns, rows)


def tradeoff(result: Mapping[str, Any]) -> Table:
    """The trade-off as a table; accuracies say where they are from."""

    def time(way: str) -> Callable[[Any], Cell]:
        def cell(row: Any) -> Cell:
            ms = row["latency_ms"][row["best_native"] if way == "native" else way]["median"]
            return Cell(ms_text(ms), ms)

        return cell

    def rate(way: str) -> Callable[[Any], Cell]:
        def cell(row: Any) -> Cell:
            images = row["images_per_second"].get(way)
            return Cell("" if images is None else f"{images:,.0f}", images)

        return cell

    def memory(way: str) -> Callable[[Any], Cell]:
        def cell(row: Any) -> Cell:
            peak = (row.get("peak_bytes") or {}).get(way)
            return Cell("" if peak is None else f"{peak / 1e6:.1f}", peak)

        return cell

    def speedup(row: Any) -> Cell:
        told = row["latency_speedup"]
        lost = told["p80"] < 1
        text = f"{told['median']:.2f}x{' we lose' if lost else ''}"
        return Cell(text, told["median"], "slower" if lost else "")

    def top1(row: Any) -> Cell:
        accuracy = row.get("accuracy")
        if not accuracy:
            return Cell("")
        return Cell(f"{accuracy['top1']:.1%} {accuracy['kind']}", accuracy["top1"])

    def paper(row: Any) -> Cell:
        told = (row.get("accuracy") or {}).get("paper_top1")
        return Cell("" if told is None else f"{told:.1%}", told)

    columns: _Columns = {
        "Network": lambda row: Cell(row["label"]),
        "Parameters": lambda row: Cell(size_text(row["params"]), row["params"]),
        "Multiply-adds": lambda row: Cell(size_text(row["multiply_adds"]), row["multiply_adds"]),
        "Model, MB": lambda row: Cell(f"{row['model_bytes'] / 1e6:.1f}", row["model_bytes"]),
        "Top-1": top1,
        "Top-1 in the paper": paper,
        "Native, ms": time("native"),
        "Swapped, ms": time("swapped"),
        "Speed-up": speedup,
        "Native, pictures/s": rate("native"),
        "Swapped, pictures/s": rate("swapped"),
        "Native peak, MB": memory("native"),
        "Swapped peak, MB": memory("swapped"),
    }
    return table("All networks", columns, result["rows"])


def sources(result: Mapping[str, Any]) -> list[str]:
    """Where the accuracies of a trade-off are from, a sentence each."""
    found: dict[str, list[str]] = {}
    for row in result["rows"]:
        accuracy = row.get("accuracy") or {}
        if accuracy:
            source = f"Accuracy {accuracy['kind']}: {accuracy['source']}"
            found.setdefault(source, []).append(row["label"])
        if "paper" in accuracy:
            found.setdefault(f'"In the paper": {accuracy["paper"]}', [])
    return [
        f"{source}{' (' + ', '.join(labels) + ')' if len(labels) == 1 else ''}."
        for source, labels in found.items()
    ]


def markdown(table: Table) -> str:
    """The table in GitHub's Markdown."""
    ruler = ["---:" if number else "---" for number in table.numeric]
    rows = [table.headings, ruler, *([cell.text for cell in row] for row in table.rows)]
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
