"""What got slower, and what is only noise: one result of `make bench` against an earlier one.

python benchmarks/compare_results.py BASE.json NEW.json [...] [--threshold 0.05]

The peers have not changed between two commits, so how much *they* changed in a row is how much the
machine did, and our own change is taken relative to that. A row got slower (or faster) if

    the times' 20th-80th percentiles, so corrected, do not overlap, and
    the medians differ by more than the threshold;

everything else is noise. Exit status: 1 if a row got slower, 2 if nothing could be compared, else
0. A file that is cut short, of another format or from another machine is named and left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from result_files import Result, Row, load

#: What tells one row from another.
_KEY = (
    "kind", "model", "size", "shape", "out_channels", "batch", "dtype", "layout", "threads",
    "direction", "cache",
)  # fmt: skip
#: What must be the same for times to be comparable at all.
_MACHINE = ("cpu", "instruction_set", "gpu")
SLOWER, FASTER, NOISE = "slower", "faster", "noise"


@dataclass(frozen=True)
class Change:
    """One row in both results. Times in microseconds; ratios are new over base."""

    name: str
    base_us: float
    new_us: float
    #: How much slower the peers got: the machine's part.
    drift: float
    #: How much slower we got, without that.
    ratio: float
    verdict: str


def change(name: str, base: Row, new: Row, threshold: float) -> Change:
    before, after = base["us"]["ours"], new["us"]["ours"]
    errors = new.get("error", {})
    peers = [
        peer for peer in base["us"]
        if peer in new["us"] and not peer.startswith("ours") and peer != "copy"
        and (not errors or peer in errors)
    ]  # fmt: skip
    drifts = [new["us"][peer]["median"] / base["us"][peer]["median"] for peer in peers]
    drift = statistics.median(drifts) if drifts else 1.0
    ratio = after["median"] / before["median"] / drift
    verdict = NOISE
    if ratio > 1 + threshold and after["p20"] > before["p80"] * drift:
        verdict = SLOWER
    elif ratio < 1 / (1 + threshold) and after["p80"] < before["p20"] * drift:
        verdict = FASTER
    return Change(name, before["median"], after["median"], drift, ratio, verdict)


def compare(base: Result, new: Result, threshold: float) -> list[Change]:
    """The rows that are in both, those that got slower first.

    Raises:
        ValueError: one line: measured on another machine or with another malloc; no common row.
    """
    for fact in _MACHINE:
        was, now = base.environment.get(fact), new.environment.get(fact)
        if was != now:
            raise ValueError(f"{new.path}: another machine: {fact} was {was}, is {now}")
    if base.malloc != new.malloc:
        raise ValueError(f"{new.path}: measured with {new.malloc} malloc, base with {base.malloc}")
    earlier = {_key(row): row for row in base.rows}
    changes = [
        change(describe(row), earlier[_key(row)], row, threshold)
        for row in new.rows if _key(row) in earlier
    ]  # fmt: skip
    if not changes:
        raise ValueError(f"{new.path}: has no row in common with {base.path}")
    order = {SLOWER: 0, FASTER: 1, NOISE: 2}
    return sorted(changes, key=lambda c: (order[c.verdict], -c.ratio))


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(str(row.get(field)) for field in _KEY)


def describe(row: Row) -> str:
    shape = "x".join(map(str, row["shape"])) if "shape" in row else row.get("size", "")
    threads = row.get("threads")
    parts = [row.get("model", ""), row["kind"], str(shape), f"batch {row['batch']}", row["dtype"],
             row.get("cache", ""), f"{threads} threads" if threads else ""]  # fmt: skip
    return " ".join(part for part in parts if part)


def render(base: Result, new: Result, changes: list[Change], verbose: bool) -> str:
    count = {v: sum(c.verdict == v for c in changes) for v in (SLOWER, FASTER, NOISE)}
    lines = [
        f"{base.path} (commit {base.environment.get('commit')}) -> {new.path} "
        f"(commit {new.environment.get('commit')}): {len(changes)} rows in both",
    ]
    for c in changes:
        if c.verdict != NOISE or verbose:
            lines.append(
                f"  {c.verdict:<7}{c.ratio:>6.2f}x the time  {c.base_us:>10.1f} -> "
                f"{c.new_us:>10.1f} us, peers {c.drift:.2f}x  {c.name}"
            )
    lines.append(f"{count[SLOWER]} slower, {count[FASTER]} faster, {count[NOISE]} within noise")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("new", nargs="+", type=Path)
    parser.add_argument(
        "--threshold", type=float, default=0.05, help="a smaller change is noise (default 0.05)"
    )
    parser.add_argument("--verbose", action="store_true", help="also the rows within noise")
    options = parser.parse_args(arguments)
    try:
        base = load(options.base)
    except ValueError as error:
        print(f"bench-compare: {error}", file=sys.stderr)
        return 2
    compared: list[Change] = []
    for path in options.new:
        try:
            new = load(path)
            changes = compare(base, new, options.threshold)
        except ValueError as error:
            print(f"bench-compare: left out: {error}", file=sys.stderr)
            continue
        print(render(base, new, changes, options.verbose))
        compared += changes
    if not compared:
        return 2
    return int(any(c.verdict == SLOWER for c in compared))


if __name__ == "__main__":
    sys.exit(main())
