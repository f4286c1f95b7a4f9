"""How results are put in words: one place, for the terminal and the page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnet_kernels.report.results import Evidence
    from mnet_kernels.report.rows import Row, Spread

#: The ways to run, and what readers call them.
WAYS = {
    "native": "native",
    "native_channels_last": "native channels_last",
    "swapped": "swapped",
}


def opening(result: dict[str, Any]) -> str:
    """What was compared, in a sentence or two."""
    row = result["rows"][0]
    models = ", ".join(dict.fromkeys(row["model"] for row in result["rows"]))
    return (
        f"{models} in {row['dtype']}: PyTorch's own layers against the same networks with "
        "mnet_kernels swapped in, on the same weights and images."
    )


def verdict(result: dict[str, Any]) -> str:
    """Same answers? How much faster? In one sentence each."""
    checks = result["rows"] + result["layers"]
    wrong = sum(not row["ok"] for row in checks)
    moved = sum(row["answers"]["images"] - row["answers"]["top5_same"] for row in result["rows"])
    if wrong:
        answers = f"The answers differ: {wrong} of {len(checks)} checks exceed the tolerance."
    elif moved:
        answers = (
            f"All {len(checks)} checks are within the tolerance; {moved} times that was enough "
            "to change the order of the five best classes."
        )
    else:
        answers = f"The answers are the same: all {len(checks)} checks are within the tolerance."
    speeds = [row["speedup"]["median"] for row in result["rows"]]
    low, high = f"{min(speeds):.2f}", f"{max(speeds):.2f}"
    span = low if low == high else f"{low} to {high}"
    return f"{answers} Speed: {span} times the faster of the two natives."


def labels(result: dict[str, Any]) -> dict[str, Any] | None:
    """What the first network that was told about its photographs sees: "model", and of each
    photograph its name and the lines of its best labels, native and swapped."""
    for row in result["rows"]:
        if row.get("photographs"):
            lines = [
                (
                    photograph["photograph"],
                    *(
                        [f"{best['label']} {best['probability']:.1%}" for best in photograph[way]]
                        for way in ("native", "swapped")
                    ),
                )
                for photograph in row["photographs"]
            ]
            return {"model": row["model"], "lines": lines}
    return None


def error_text(error: float | None) -> str:
    """An error relative to the output's scale; None is one that is not finite."""
    return "not finite" if error is None else f"{error:.1e}"


def ms_text(ms: float) -> str:
    """Milliseconds, with about three digits."""
    return f"{ms:.{_digits(ms)}f}"


def time_text(time: dict[str, float]) -> str:
    """Milliseconds with their spread: the median, and the 20th to 80th percentile."""
    digits = _digits(time["median"])
    return f"{time['median']:.{digits}f} ({time['p20']:.{digits}f}-{time['p80']:.{digits}f})"


def _digits(ms: float) -> int:
    return next((digits for digits, top in ((3, 1), (2, 10), (1, 100)) if ms < top), 0)


def top5_text(answers: dict[str, int]) -> str:
    """How many images got the same five best classes in the same order."""
    return f"{answers['top5_same']}/{answers['images']}"


def environment_text(environment: dict[str, Any]) -> dict[str, str]:
    """Facts that are known, with their labels."""
    told = {key.replace("_", " "): _fact_text(value) for key, value in environment.items()}
    return {key: text for key, text in told.items() if text}


def _fact_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_fact_text(v)}" for key, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_fact_text, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None or value is False else str(value)


def us_text(us: float) -> str:
    """Microseconds, or milliseconds from 1000 on, with their unit."""
    return f"{ms_text(us / 1e3)} ms" if us >= 1000 else f"{us:.1f} µs"


def names(way: str) -> str:
    """What readers call a way to run a row: ours has the package's name."""
    return f"mnet_kernels{way[4:]}" if way.split(" ")[0] == "ours" else way


def percent_text(fraction: float | None) -> str:
    """Whole per cent; nothing for what is not known."""
    return "" if fraction is None else f"{fraction:.0%}"


def size_text(count: float) -> str:
    """A large number with its unit: 4.2 M, 569 M, 15.5 G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            value = count / size
            return f"{value:.{2 if value < 1 else 1 if value < 100 else 0}f} {unit}"
    return f"{count:.0f}"


#: Kinds of rows, and how a sentence begins that is about all rows of the kind.
KINDS = {
    "network": "Whole networks",
    "layer": "Single layers",
    "pair": "Depthwise + pointwise pairs",
    "training": "Training steps",
}


def summary(evidence: Evidence) -> list[str]:
    """The page in a few sentences, losses as plain as gains."""
    said = []
    for kind, words in KINDS.items():
        rows = [row for row in evidence.rows if row.kind == kind]
        if rows:
            said.append(f"{words}: {_speeds(rows)}")
    if evidence.rows:
        said.append(_errors(evidence.rows))
    for row in evidence.rows:
        if row.kind == "overhead":
            said.append(
                f"The smallest call takes {us_text(row.us['ours'].median)}, that of {row.best} "
                f"{us_text(row.us[row.best].median)}."
            )
            break
    for run in evidence.runs:
        best = max(run.rows, key=lambda r: r["validation_accuracy"])
        last = run.rows[-1]
        said.append(
            f"The run {run.name} reached {best['validation_accuracy']:.1%} of the validation "
            f"pictures at best (epoch {best['epoch']:.0f}) and ended at "
            f"{last['validation_accuracy']:.1%}."
        )
    for result in evidence.tradeoffs:
        said.append(tradeoff(result))
    return said


def _speeds(rows: Sequence[Row]) -> str:
    mean = statistics.geometric_mean(row.speedup.median for row in rows)
    counts = {
        verdict: [row for row in rows if row.verdict == verdict]
        for verdict in ("faster", "slower", "noise")
    }
    faster = len(counts["faster"])
    wins = "all" if faster == len(rows) else f"{faster}"
    text = (
        f"{mean:.2f} times as fast as the fastest of the others (geometric mean); "
        f"{wins} of {len(rows)} {'is' if wins == '1' else 'are'} faster"
    )
    if counts["noise"]:
        text += f", {len(counts['noise'])} within noise"
    if counts["slower"]:
        worst = min(counts["slower"], key=lambda row: row.speedup.median)
        text += (
            f", {len(counts['slower'])} slower (the worst, {worst.name}, at "
            f"{worst.speedup.median:.2f} times)"
        )
    others = [(value, layout) for row in rows for layout, value in row.others.items()]
    lost = [layout for value, layout in others if value < 1]
    if lost:
        text += f". In the other layout ({lost[0]}) {len(lost)} of {len(others)} are slower"
    engines = [row for row in rows if row.engine and row.torch]
    if engines:
        text += f". Against PyTorch alone: {_against([r.torch for r in engines])}"
        named = ", ".join(sorted({row.best_engine for row in engines}))
        text += f"; against the fastest engine ({named}): {_against([r.engine for r in engines])}"
    return f"{text}."


def _against(spreads: Sequence[Spread | None]) -> str:
    found = [spread for spread in spreads if spread]
    mean = statistics.geometric_mean(spread.median for spread in found)
    return f"{mean:.2f} times, {sum(s.low > 1 for s in found)} of {len(found)} faster"


def _errors(rows: Sequence[Row]) -> str:
    wrong = [row for row in rows if not row.ok]
    if wrong:
        return f"Answers differ in {len(wrong)} of {len(rows)} rows: {wrong[0].name} is the first."
    by_dtype: dict[str, float] = {}
    for row in rows:
        error = row.error.get("ours")
        if error:
            dtype = row.facets.get("dtype") or "float32"
            by_dtype[dtype] = max(by_dtype.get(dtype, 0.0), error)
    if not by_dtype:
        return "No error was recorded."
    told = ", ".join(f"{error_text(error)} in {dtype}" for dtype, error in by_dtype.items())
    return f"Answers are right: against float64 our largest error is {told}."


def tradeoff(result: dict[str, Any]) -> str:
    """How much swapping gives over the whole table, in a sentence."""
    rows = result["rows"]
    speeds = [row["latency_speedup"]["median"] for row in rows]
    small, large = min(speeds), max(speeds)
    slower = [row["label"] for row in rows if row["latency_speedup"]["p80"] < 1]
    lost = f"; slower: {', '.join(slower)}" if slower else ""
    return (
        f"The trade-off of {len(rows)} networks at batch 1: swapped, they are {small:.2f} to "
        f"{large:.2f} times as fast as native PyTorch{lost}."
    )
