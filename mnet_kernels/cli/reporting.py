"""report: a page from results."""

from __future__ import annotations

from pathlib import Path

import click

from mnet_kernels.cli.common import Command, OutputPath, write


@click.command(cls=Command)
@click.argument(
    "results",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path, exists=True),
    metavar="PATH...",
)
@click.option(
    "-o",
    "--output",
    type=OutputPath(),
    default="report.html",
    show_default=True,
    help="Write the page here.",
)
@click.option("--title", default="mnet_kernels: results", show_default=True)
def report(results: tuple[Path, ...], output: Path, title: str) -> None:
    """One self-contained HTML page from results: speed, losses, limits, accuracy, training.

    PATH is the JSON of make bench, make gpu, compare or tradeoff, the metrics.csv of a training
    run, or a folder of these. The first usable one says which machine the page is about; what is
    of another machine or version, or cut off, is named and left out.
    """
    from mnet_kernels import report as pages
    from mnet_kernels.report.words import summary

    evidence = pages.read(results)
    for sentence in evidence.skipped:
        click.echo(f"Left out: {sentence}", err=True)
    if evidence.empty:
        raise click.ClickException("there is nothing to report: no result can be used")
    page = pages.render(evidence, title)
    for sentence in summary(evidence):
        click.echo(sentence)
    write(output, page, "Report")
