"""Layers of networks, a file each."""

import csv
from pathlib import Path


def shapes(model: str) -> list[tuple[int, ...]]:
    """(C, H, W, kernel, stride, count) of each line of MODEL.csv."""
    with open(Path(__file__).parent / f"{model}.csv") as lines:
        return [tuple(map(int, row)) for row in csv.reader(lines) if not row[0].startswith("#")]
