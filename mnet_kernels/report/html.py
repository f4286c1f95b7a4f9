"""One HTML page that needs nothing else: no font, no network, nothing beside it."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from typing import Any

from mnet_kernels.report import figures, tables, words
from mnet_kernels.report.drawing import MARKS, Figure
from mnet_kernels.report.results import Evidence
from mnet_kernels.report.rows import Row

#: So many groups of layers are shown at once, the others on demand.
SHOWN = 4


@functools.cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mnet_kernels.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals["marks"] = MARKS
    return environment.get_template("page.html.j2")


def render(evidence: Evidence, title: str = "mnet_kernels: results") -> str:
    """The page about ``evidence`` as text."""
    comparisons = evidence.comparisons
    told = [found for result in comparisons if (found := words.labels(result))]
    return _template().render(
        title=title,
        openings=[words.opening(result) for result in comparisons],
        verdicts=[words.verdict(result) for result in comparisons],
        summary=[] if comparisons and not evidence.runs else words.summary(evidence),
        tiles=_tiles(evidence),
        sections=_sections(evidence),
        photographs=told[0] if told else None,
        environments={
            name: words.environment_text(facts) for name, facts in evidence.environments.items()
        },
        skipped=evidence.skipped,
    )


def _tiles(evidence: Evidence) -> list[tuple[str, str]]:
    """The numbers that a reader takes home: (number, what it is)."""
    found = []
    for kind, label in (("network", "networks"), ("pair", "pairs"), ("layer", "layers"),
                        ("training", "training steps")):  # fmt: skip
        rows = [row for row in evidence.rows if row.kind == kind]
        if rows:
            mean = figures.geometric_mean(rows)
            found.append((f"{mean:.2f}x", f"{label}, geometric mean against the fastest other"))
            alone = [row.torch.median for row in rows if row.torch and row.engine]
            if alone:
                mean = statistics.geometric_mean(alone)
                found.append((f"{mean:.2f}x", f"{label}, against PyTorch alone"))
    contests = [row for row in evidence.rows if row.kind in words.KINDS]
    if contests:
        lost = sum(row.verdict == "slower" for row in contests)
        noise = sum(row.verdict == "noise" for row in contests)
        words_lost = f"rows lost, {noise} within noise"
        other = [value for row in contests for value in row.others.values()]
        if other:
            words_lost += f"; {sum(v < 1 for v in other)} of {len(other)} in the other layout"
        found.append((f"{lost} of {len(contests)}", words_lost))
    if evidence.runs and not evidence.rows:
        for run in evidence.runs[:4]:
            best = max(row["validation_accuracy"] for row in run.rows)
            found.append((f"{best:.1%}", f"{run.name}, best validation accuracy"))
    return found


def _section(
    anchor: str, title: str, lead: str, *drawn: Sequence[Figure], **more: Any
) -> dict[str, Any]:
    """What the template shows as one section: figures, a grid or more, ``folded`` ones, a table."""
    return {"anchor": anchor, "title": title, "lead": lead, "grids": list(filter(None, drawn)),
            "folded": [], "table": None, "notes": (), "wide": False, **more}  # fmt: skip


def _more(count: int, what: str) -> str:
    return f"Show {count} more {what}{'s' if count != 1 else ''}"


def _sections(evidence: Evidence) -> list[dict[str, Any]]:
    found = []
    by_kind: dict[str, list[Row]] = {}
    for row in sorted(evidence.rows, key=lambda row: row.facets.get("malloc", "")):
        by_kind.setdefault(row.kind, []).append(row)
    bars = (
        "Bars begin at 1: to the right we are faster than the fastest of the others in that row, "
        "to the left slower. The line spans the 20th to 80th percentile of interleaved rounds."
    )
    for kind in ("network", "training"):
        rows = by_kind.get(kind)
        if rows:
            drawn = figures.speedups(rows)
            panels = [figures.times(row) for row in rows]
            title = {"network": "Networks", "training": "Training"}[kind]
            found.append(
                _section(
                    f"{kind}s",
                    title,
                    bars,
                    drawn,
                    panels[:2],
                    folded=panels[2:],
                    fold=_more(len(panels) - 2, "network" if kind == "network" else "step"),
                )
            )
    for kind, title, each in (
        ("layer", "Layers", "a depthwise layer (channels · height² · stride)"),
        ("pair", "Depthwise + pointwise pairs", "a pair (channels → channels · height² · stride)"),
    ):
        rows = by_kind.get(kind)
        if rows:
            drawn = figures.speedups(rows)
            shape = "·" in rows[0].name
            lead = f"Each bar is {each}. {bars}" if shape else bars
            found.append(
                _section(
                    f"{kind}s",
                    title,
                    lead,
                    drawn[:SHOWN],
                    folded=drawn[SHOWN:],
                    fold=_more(len(drawn) - SHOWN, "group"),
                )
            )
    found += _limits(evidence)
    if evidence.runs:
        found.append(
            _section(
                "curves", "Training curves",
                "After each epoch, on the validation pictures (solid) and over the epoch's own "
                "training pictures (dashed).",
                figures.training(evidence.runs),
            )
        )  # fmt: skip
    for number, result in enumerate(evidence.tradeoffs):
        found.append(_tradeoff(number, result))
    if evidence.rows:
        found.append(
            _section(
                "rows", "Every row", "Sort by a column's heading. Errors are the largest "
                "difference to float64, relative to the largest output.",
                table=tables.measured(evidence.rows, "Every row that was measured"),
            )
        )  # fmt: skip
    return found


def _limits(evidence: Evidence) -> list[dict[str, Any]]:
    """How far from the machine's limits, and how exact."""
    found = []
    roofs = figures.roofline(evidence.rows, evidence.environments)
    if roofs:
        found.append(
            _section(
                "roofline", "How far from the limit",
                "A depthwise layer does little work for each byte that it moves, so the slanted "
                "lines (how fast this machine copies) are its limit. Higher is faster; each dot "
                "is one layer run in one way.",
                roofs, wide=True,
            )
        )  # fmt: skip
    exact = figures.accuracy(evidence.rows)
    if exact:
        found.append(
            _section(
                "accuracy", "Accuracy against float64",
                "Errors are largest differences to a result computed in float64 on the same "
                "inputs, relative to its largest value. Each dot is a row.",
                [exact], wide=True,
            )
        )  # fmt: skip
    return found


def _tradeoff(number: int, result: dict[str, Any]) -> dict[str, Any]:
    drawn = figures.tradeoff(result)
    batch = result.get("settings", {}).get("batch", "several")
    lead = (
        "MobileNet V1 by width multiplier and resolution (0.75-192: alpha 0.75, pictures of "
        "192 x 192), and what the paper compares it with, in native PyTorch and swapped. "
        f"Pictures a second and peak memory at batch {batch}."
    )
    return _section(
        f"tradeoff{number or ''}", "Trade-off", lead, [drawn] if drawn else [], wide=True,
        table=tables.tradeoff(result), notes=tables.sources(result),
    )  # fmt: skip
