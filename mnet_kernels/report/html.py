"""One HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from mnet_kernels.report.words import (
    WAYS,
    environment_text,
    error_text,
    ms_text,
    opening,
    speed_text,
    top5_text,
    verdict,
)

#: The template's bars: the slowest of a row fills this many of its 116 units.
BAR_WIDTH = 100


def write(result: dict[str, Any], path: Path) -> None:
    """Write ``result``, as :func:`mnet_kernels.compare.compare` returns it, to ``path``."""
    path.write_text(render(result), encoding="utf-8")


def render(result: dict[str, Any]) -> str:
    """``result`` as the text of an HTML page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mnet_kernels.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "error": error_text,
        "ms": ms_text,
        "speed": speed_text,
        "top5": top5_text,
    }
    return environment.get_template("template.html.j2").render(
        opening=opening(result),
        verdict=verdict(result),
        rows=result["rows"],
        charts=[_chart(row) for row in result["rows"]],
        layers=result["layers"],
        layer_speedup=_geometric_mean(layer["speedup"]["median"] for layer in result["layers"]),
        told=next((row for row in result["rows"] if row["photographs"]), None),
        environment=environment_text(result["environment"]),
        ways=WAYS,
    )


def _chart(row: dict[str, Any]) -> dict[str, Any]:
    """One bar a way to run, on a common scale that starts at zero; whiskers span p20 to p80."""
    longest = max(time["p80"] for time in row["time_ms"].values())
    bars = []
    for way, label in WAYS.items():
        time = row["time_ms"][way]
        scaled = {key: BAR_WIDTH * time[key] / longest for key in ("median", "p20", "p80")}
        bars.append({"way": way, "label": label, "ms": time["median"], **scaled})
    alt = ", ".join(f"{bar['label']} {ms_text(bar['ms'])} milliseconds" for bar in bars)
    return {"title": f"{row['model']}, batch {row['batch']}", "alt": alt, "bars": bars}


def _geometric_mean(values: Any) -> float | None:
    values = list(values)
    return statistics.geometric_mean(values) if values else None
