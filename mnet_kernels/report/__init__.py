"""Results for people: a self-contained HTML page, or tables in a terminal."""

from mnet_kernels.report.html import render, write
from mnet_kernels.report.results import Evidence, Run, of, read

__all__ = ["Evidence", "Run", "of", "read", "render", "write"]
