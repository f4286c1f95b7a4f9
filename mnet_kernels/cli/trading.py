"""tradeoff: width and resolution against time, memory and accuracy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mnet_kernels.cli.common import (
    ANSWERS_DIFFER,
    Command,
    OutputPath,
    fail,
    load_extension,
    progress,
    set_threads,
    write,
)


class _Numbers(click.ParamType):
    """Positive numbers with commas between."""

    def __init__(self, of: Callable[[str], Any], least: float) -> None:
        self.of, self.least = of, least
        self.name = "N[,N]"

    def convert(self, value: Any, param: Any, context: Any) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self.of(text) for text in str(value).split(","))
            good = all(self.least <= number < 10_000 for number in numbers)
        except ValueError:
            good = False
        if not good:
            kind = "whole numbers" if self.of is int else "numbers"
            self.fail(f"expected {kind} from {self.least:g}, got {value!r}", param, context)
        return tuple(dict.fromkeys(numbers))


@click.command(cls=Command)
@click.option("--alpha", "alphas", type=_Numbers(float, 0.03125), default="1,0.75,0.5,0.25",
              show_default=True, help="Width multipliers.")  # fmt: skip
@click.option("--size", "sizes", type=_Numbers(int, 32), default="224,192,160,128",
              show_default=True, help="Resolutions.")  # fmt: skip
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True,
              help="Pictures a call, for throughput and memory.")  # fmt: skip
@click.option("--others/--no-others", default=True, show_default=True,
              help="GoogLeNet and VGG16 too, of torchvision.")  # fmt: skip
@click.option("--quick", is_flag=True,
              help="Alpha 1 and 0.5 at 224 and 128 alone, three rounds each.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=1), help="Of timing; default: what fits 1.5 s.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: torch's choice.")
@click.option("--weights", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Measure accuracy with its files: mobilenet_7_5_192_tf.h5 and so on (Keras), "
              "vgg16-*.pth, googlenet-*.pth (torchvision). Needs --data.")  # fmt: skip
@click.option("--data", "images", help="ImageNet's validation pictures: imagefolder:PATH.")
@click.option("--json", "json_file", type=OutputPath(), help="Write the result here.")
@click.option("--csv", "csv_file", type=OutputPath(), help="The table as CSV.")
@click.option("--markdown", "markdown_file", type=OutputPath(), help="The table as Markdown.")
@click.option("--plot", "plot_file", type=OutputPath(), help="Accuracy over latency: .png, .svg.")
@click.option("--html", "html_file", type=OutputPath(), help="A page with all of it.")
def tradeoff(
    quick: bool,
    threads: int | None,
    json_file: Path | None,
    csv_file: Path | None,
    markdown_file: Path | None,
    plot_file: Path | None,
    html_file: Path | None,
    **settings: Any,
) -> None:
    """What width and resolution cost, native and swapped, beside GoogLeNet and VGG16.

    Time, memory and size are measured here; ImageNet accuracies are as published (the source is
    named) unless --weights and --data are given.
    """
    load_extension()
    from mnet_kernels import report
    from mnet_kernels import tradeoff as trading
    from mnet_kernels.report import curve

    if quick:
        settings |= {"alphas": (1.0, 0.5), "sizes": (224, 128), "others": False, "rounds": 3}
    chosen = trading.Settings(**settings)
    networks = trading.networks(chosen)
    if plot_file is not None:
        curve.check_kind(plot_file)
        if chosen.weights is None and not any(network.published() for network in networks):
            raise click.BadParameter(
                "expected networks whose accuracy is published, or --weights", param_hint="--plot"
            )
    set_threads(threads)
    quarters = max(1, round(4 * trading.minutes(chosen)))
    click.echo(
        f"Measures {len(networks)} network{'s' if len(networks) > 1 else ''}, native and swapped: "
        f"about {quarters / 4:g} minutes on two cores."
    )
    with progress() as notify:
        result = trading.tradeoff(chosen, notify)
    _show(result)
    outputs: dict[Path | None, Callable[[], bytes]] = {
        json_file: lambda: (json.dumps(result, indent=1, allow_nan=False) + "\n").encode(),
        csv_file: lambda: trading.to_csv(result).encode(),
        markdown_file: lambda: trading.to_markdown(result).encode(),
        plot_file: lambda: curve.draw_tradeoff(result, plot_file.suffix[1:]),  # type: ignore[union-attr]
        html_file: lambda: report.render(
            report.of("tradeoff", result), "MobileNet's trade-off"
        ).encode(),
    }
    for path, make in outputs.items():
        if path is not None:
            write(path, make(), "Written")
    wrong = trading.failures(result)
    for sentence in wrong:
        fail(f"answers differ: {sentence}", ANSWERS_DIFFER)
    if wrong:
        click.get_current_context().exit(ANSWERS_DIFFER)


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console

    from mnet_kernels.report import terminal
    from mnet_kernels.report.words import tradeoff as sentence

    console = Console(highlight=False)
    console.print()
    terminal.print_tradeoff(console, result)
    console.print(sentence(result), style="bold")
