"""Results for people: a self-contained HTML page, or tables in a terminal."""

from mnet_kernels.report.html import render
from mnet_kernels.report.results import Evidence, of, read
from mnet_kernels.report.rows import Run

__all__ = ["Evidence", "Run", "of", "read", "render"]
