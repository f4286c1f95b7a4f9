"""Results from files: what can be used, and a sentence about whatever cannot."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mnet_kernels._version import __version__
from mnet_kernels.report import figures, rows, tables, words
from mnet_kernels.report.rows import Row, Run

#: Every run of `mnet-kernels train` leaves one; see :mod:`mnet_kernels.train` for its columns.
METRICS = "metrics.csv"
#: What makes a machine another one.
MACHINE = ("cpu", "gpu", "instruction_set")


@dataclass
class Evidence:
    """Everything that a page shows."""

    rows: list[Row] = field(default_factory=list)
    #: Comparisons as they are, for their verdict and their photographs.
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    tradeoffs: list[dict[str, Any]] = field(default_factory=list)
    #: Where each file was measured.
    environments: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: One sentence a file that could not be used.
    skipped: list[str] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.rows or self.runs or self.tradeoffs)

    def add(self, name: str, result: Mapping[str, Any]) -> None:
        """Take in a result.

        Raises:
            ValueError: it is none that this version knows, or of another machine; one sentence.
        """
        if not isinstance(result, Mapping):
            raise ValueError("expected a result of mnet_kernels, got other JSON")
        try:
            self._add(name, dict(result))
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"expected a result of mnet_kernels, got one with: {what}") from None

    def _add(self, name: str, result: dict[str, Any]) -> None:
        kind, environment = _kind(result)
        self._check(environment, result)
        found: list[Row] = []
        if kind == "benchmarks":
            found = rows.of_benchmarks(result, malloc=bool(environment.get("malloc")))
        elif kind == "gpu":
            found = rows.of_gpu(result)
        elif kind == "comparison":
            found = rows.of_comparison(result)
            # Put into words now: a result that these cannot read is refused here, not on the page.
            words.opening(result), words.verdict(result), words.labels(result)
        else:
            result.get("settings", {}).get("batch")
            words.tradeoff(result), tables.tradeoff(result), tables.sources(result)
            figures.tradeoff(result)
        if not found and kind != "tradeoff":
            raise ValueError("it has no rows")
        figures.roofline(found, {name: environment})
        self.rows += found
        self.comparisons += [result] if kind == "comparison" else []
        self.tradeoffs += [result] if kind == "tradeoff" else []
        self.environments[name] = environment

    def _check(self, environment: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        version = environment["mnet_kernels"]
        if version != __version__:
            raise ValueError(f"it is of mnet_kernels {version}, this is {__version__}")
        if result.get("schema", 1) != 1:
            raise ValueError(f"expected schema 1, got {result['schema']}")
        if not self.environments:
            return
        first, known = next(iter(self.environments.items()))
        for fact in MACHINE:
            here, there = known.get(fact), environment.get(fact)
            if here != there:
                name = fact.replace("_", " ")
                raise ValueError(f"it is of another machine: {name} {there}, {first} has {here}")


def _kind(result: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if "benchmarks" in result:
        machine = result["machine_info"]
        if "mnet_kernels" not in machine:
            raise ValueError("expected a result of mnet_kernels, got pytest-benchmark's of another")
        return "benchmarks", machine["mnet_kernels"]
    if result.get("kind") == "tradeoff":
        return "tradeoff", result["environment"]
    if "stages" in result:
        return "gpu", result["environment"]
    if "rows" in result and "layers" in result:
        return "comparison", result["environment"]
    raise ValueError("expected a result of mnet_kernels (bench, gpu, compare or tradeoff)")


def of(name: str, result: Mapping[str, Any]) -> Evidence:
    """The evidence of one result that is at hand."""
    evidence = Evidence()
    evidence.add(name, result)
    return evidence


def read(paths: Iterable[Path]) -> Evidence:
    """Read result files, metrics.csv files, and folders of these.

    The first result that can be used says which machine the page is about.
    """
    evidence = Evidence()
    seen: set[Path] = set()
    for given in paths:
        files = _files(given)
        if not files:
            evidence.skipped.append(f"{given}: there is no result in it")
        for path in files:
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            try:
                _read(evidence, path)
            except ValueError as error:
                evidence.skipped.append(f"{path}: {' '.join(str(error).split())}")
    return evidence


def _files(path: Path) -> list[Path]:
    """A folder holds results and runs; a run is a folder with metrics.csv."""
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*.json"))
    return [*found, *sorted(path.glob(METRICS)), *sorted(path.glob(f"*/{METRICS}"))]


def _read(evidence: Evidence, path: Path) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError("expected JSON or CSV, got something that is no text") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if path.suffix == ".csv":
        evidence.runs.append(Run(path.parent.name or "run", read_metrics(text)))
        return
    try:
        result = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"truncated, or no JSON: {error}") from None
    evidence.add(path.name, result)


def read_metrics(text: str) -> list[dict[str, float]]:
    """The rows of a metrics.csv.

    Raises:
        ValueError: it is none, or cut off; one sentence.
    """
    lines = list(csv.reader(text.splitlines()))
    needed = {f"{half}_{what}" for half in ("train", "validation") for what in ("loss", "accuracy")}
    if not lines or not needed | {"epoch"} <= set(lines[0]):
        raise ValueError(f"expected a {METRICS} of mnet-kernels train")
    columns, found = lines[0], []
    for number, line in enumerate(lines[1:], 2):
        try:
            found.append(dict(zip(columns, map(float, line), strict=True)))
        except ValueError:
            raise ValueError(
                f"truncated: line {number}: expected {len(columns)} numbers, got {','.join(line)!r}"
            ) from None
    if not found:
        raise ValueError("it has no epochs")
    return found
