"""The command ``mnet-kernels``: info, summary, compare, demo, train, evaluate, tradeoff, report.

Exit status: 0; 1 where answers differ; 2 for input that cannot be used and runs that cannot go on,
with one line that says what was expected; 130 after Ctrl-C. A broken pipe is quiet, which click and
rich see to. Heavy packages are imported by the command that needs them, so that --help is there at
once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import click

from mnet_kernels._version import __version__
from mnet_kernels.cli.common import BAD_INPUT, INTERRUPTED, NOT_BUILT, Command, fail
from mnet_kernels.cli.comparing import compare, demo
from mnet_kernels.cli.reporting import report
from mnet_kernels.cli.trading import tradeoff
from mnet_kernels.cli.training import evaluate, train

__all__ = ["NOT_BUILT", "cli", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Bad input is one line on stderr."""
    try:
        status = cli.main(arguments, prog_name="mnet-kernels", standalone_mode=False)
        return status or 0
    except click.Abort:  # what click makes of Ctrl-C
        return fail("interrupted", INTERRUPTED)
    except click.ClickException as error:
        return fail(f"error: {error.format_message()}", BAD_INPUT)
    except OSError as error:  # a full disk, say, behind the output
        return fail(f"error: {error}", BAD_INPUT)


@click.group(invoke_without_command=True)
@click.version_option(__version__, message="mnet_kernels %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Fused depthwise convolution + BatchNorm + activation for MobileNets in PyTorch."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command(cls=Command, short_help="What is built, and which backends serve here.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def info(as_json: bool) -> None:
    """What is built, which instruction set is used, which backends are there."""
    from mnet_kernels.timing import build_info, environment

    facts, build = environment(), build_info()
    rows = []
    if build is not None:
        from mnet_kernels import backends

        rows = [dataclasses.asdict(row) for row in backends.table()]
    if as_json:
        click.echo(json.dumps({"environment": facts, "build": build, "backends": rows}, indent=2))
        return
    del facts["date"]
    for name, value in facts.items():
        click.echo(f"{name.replace('_', ' '):<17}{'-' if value is None else value}")
    click.echo()
    if build is None:
        click.echo(NOT_BUILT)
        return
    for name, value in build.items():
        words = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        click.echo(f"{name.replace('_', ' '):<17}{words}")
    click.echo()
    for row in rows:
        click.echo(
            f"{row['backend']:<9}{'yes' if row['available'] else 'no':<5}{row['reason'] or ''}"
        )


@cli.command(cls=Command, short_help="MobileNet V1's layers, as Keras prints them.")
@click.option("--alpha", type=float, default=1.0, show_default=True, help="Width multiplier.")
@click.option("--size", type=click.IntRange(min=32), default=224, show_default=True)
@click.option("--classes", type=click.IntRange(min=1), default=1000, show_default=True)
def summary(alpha: float, size: int, classes: int) -> None:
    """MobileNet V1's layers, parameters and multiply-adds, as Keras prints them."""
    from mnet_kernels import models

    try:
        table = models.summary(models.mobilenet_v1(alpha, classes), (1, 3, size, size))
    except (ValueError, OverflowError, RuntimeError) as error:  # the last: beyond memory
        raise click.BadParameter(str(error), param_hint="--alpha") from None
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(table)
    else:
        click.echo(table.render())


# In the list of commands; cut off at a sentence, not within one.
for command, words in (
    (compare, "Native against swapped: the same answers? how much faster?"),
    (demo, "The same with a trained MobileNet V2 and five photographs."),
    (train, "Train a MobileNet V1."),
    (evaluate, "Top-1 and top-5 on labelled pictures, native and swapped."),
    (tradeoff, "Width and resolution against time, memory and accuracy."),
    (report, "One HTML page from the results of all of these."),
):
    command.short_help = words
    cli.add_command(command)
