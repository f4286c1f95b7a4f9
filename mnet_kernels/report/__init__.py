"""A comparison's result, for people: a self-contained HTML page, or tables in a terminal."""

from mnet_kernels.report.html import render, write

__all__ = ["render", "write"]
