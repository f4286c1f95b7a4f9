"""Reading what `make bench` leaves: environment and rows, or one sentence why it is no result."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FORMAT = 2  # of the rows; 1: before threads, cache and engines
_NEEDED = ("kind", "batch", "dtype", "us", "best_peer", "speedup")


@dataclass(frozen=True)
class Result:
    path: Path
    environment: dict[str, Any]
    rows: list[Row]

    @property
    def malloc(self) -> str:
        return "tuned" if self.environment.get("malloc") else "default"


def load(path: Path) -> Result:
    """One result file.

    Raises:
        ValueError: one line: the file cannot be read, is cut short, is something else, or was
            written by another version.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # of the JSON, or of the text's encoding
        raise ValueError(f"{path}: not JSON, or cut short: {error}") from None
    try:
        environment = content["machine_info"]["mnet_kernels"]
        rows = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
        found = environment.get("format", 1)
        cpu = environment["cpu"]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: not a result of `make bench`") from None
    if found != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT}, got {found}: measure again")
    for row in rows:
        missing = [key for key in _NEEDED if key not in row]
        if missing or "ours" not in row["us"] or not isinstance(cpu, str):
            raise ValueError(f"{path}: a row has no {missing[0] if missing else 'time of ours'}")
    return Result(path, environment, rows)
