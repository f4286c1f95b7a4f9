"""train and evaluate."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mnet_kernels.cli.common import (
    Command,
    OutputPath,
    device_of,
    load_extension,
    progress,
    set_threads,
)

if TYPE_CHECKING:
    from mnet_kernels.train import Progress, Row

_POSITIVE = click.IntRange(min=1)
_DEVICE = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Default: cuda where it is, to train; to evaluate, where --backend runs.",
)
_THREADS = click.option("--threads", type=_POSITIVE, help="CPU threads; default: torch's choice.")
_WORKERS = click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Processes that read pictures ahead; worth it for image folders.",
)


@click.command(cls=Command)
@click.option(
    "--data",
    default="digits",
    show_default=True,
    help="digits (scikit-learn's, offline), cifar10:PATH (the official archive, Python or binary, "
    "or its folder), fashion-mnist:PATH (a folder of IDX files), or imagefolder:PATH (with train/ "
    "and val/, else every fifth picture is held out).",
)
@click.option("--output", type=click.Path(path_type=Path), help="Folder; default: runs/DATA.")
@click.option("--resume", is_flag=True, help="Go on from the output folder's last checkpoint.")
@click.option("--alpha", type=float, default=0.5, show_default=True, help="Width multiplier.")
@click.option(
    "--size",
    type=click.IntRange(min=32),
    help="Of the square pictures; default: 32, for image folders 224.",
)
@click.option("--epochs", type=_POSITIVE, help="Default: 200; digits has settled after 60.")
@click.option(
    "--batch",
    type=click.IntRange(min=2),
    default=32,
    show_default=True,
    help="Pictures a step, of all processes together.",
)
@click.option(
    "--learning-rate", type=float, default=1e-3, show_default=True, help="NAdam's, as in Keras."
)
@click.option(
    "--shift",
    type=float,
    default=0.1,
    show_default=True,
    help="Largest random shift, as a fraction of height and width; edges repeat.",
)
@click.option("--flips/--no-flips", default=None, help="Mirror at random; default: not digits.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
    help="bf16 and fp16 by autocast; fp16 with scaled gradients.",
)
@click.option(
    "--layout",
    type=click.Choice(["contiguous", "channels_last"]),
    default="channels_last",
    show_default=True,
)
@click.option("--compile", is_flag=True, help="Run the network through torch.compile.")
@click.option(
    "--backend",
    type=click.Choice(["swap", "native", "cpu", "cuda", "triton"]),
    default="swap",
    show_default=True,
    help="swap: with the best kernels there are; native: plain PyTorch; else this backend only.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@_WORKERS
@_THREADS
@_DEVICE
def train(
    output: Path | None, resume: bool, threads: int | None, device: str | None, **settings: Any
) -> None:
    """Train a MobileNet V1; validate and save after every epoch.

    Leaves checkpoint.pt, best.pt, metrics.csv and curve.png in the output folder; for TensorBoard
    too, where it is installed. Runs under torchrun as it does alone:

    torchrun --nproc-per-node 2 -m mnet_kernels train
    """
    load_extension()
    from mnet_kernels.train import CHECKPOINT, Recipe, Stopped
    from mnet_kernels.train import train as run
    from mnet_kernels.training import distributed

    set_threads(threads)
    recipe = Recipe(**settings)
    output = output or Path("runs") / recipe.data.partition(":")[0]
    with distributed.group(_available(device)) as group:
        if group.is_main:
            _announce(recipe, output, group)
        try:
            with _training_bar(group.is_main) as (on_step, on_epoch):
                rows = run(
                    recipe, output, resume=resume, group=group, on_step=on_step, on_epoch=on_epoch
                )
        except Stopped as error:
            raise click.ClickException(str(error)) from None
        except KeyboardInterrupt:
            saved = (output / CHECKPOINT).exists()
            how = f"with --resume goes on from {output}" if saved else "begins anew"
            click.echo(f"Stopped. The same command {how}.", err=True)
            raise
    if group.is_main:
        best = max(rows, key=lambda row: row["validation_accuracy"])
        click.echo(
            f"Validation accuracy: {rows[-1]['validation_accuracy']:.2%}, best "
            f"{best['validation_accuracy']:.2%} after epoch {best['epoch']:.0f}. "
            f"Checkpoints, metrics.csv: {output}"
        )


@click.command(cls=Command)
@click.argument("model")
@click.option("--data", "spec", required=True, help="imagefolder:PATH, or as for train.")
@click.option("--weights", type=click.Path(path_type=Path), help="A file of weights.")
@click.option(
    "--preprocess",
    type=click.Choice(["keras", "torchvision", "timm"]),
    help="How pixels become numbers; default: as the model was trained.",
)
@click.option("--batch", type=_POSITIVE, default=32, show_default=True)
@click.option("--backend", help="Swapped uses this backend only; default: the best a layer.")
@click.option("--json", "json_file", type=OutputPath(), help="Write the result here.")
@_WORKERS
@_THREADS
@_DEVICE
def evaluate(
    model: str,
    spec: str,
    weights: Path | None,
    preprocess: str | None,
    backend: str | None,
    threads: int | None,
    device: str | None,
    json_file: Path | None,
    batch: int,
    workers: int,
) -> None:
    """Top-1 and top-5 of a model on labelled pictures, native and swapped.

    MODEL is as for compare (mobilenet_v1:alpha=0.5, a torchvision name, timm:NAME), or a
    checkpoint of train. An image folder has a folder a class: as many as the model has, in order,
    or some of ImageNet's by WordNet number. With a folder val in it, that is used.
    """
    load_extension()
    from mnet_kernels.evaluate import candidate
    from mnet_kernels.evaluate import evaluate as run
    from mnet_kernels.training import distributed

    set_threads(threads)
    device = _available(device) or device_of(backend)
    chosen = candidate(model, weights, preprocess)
    with distributed.group(device) as group, progress() as notify:
        try:
            result = run(
                chosen, spec, batch=batch, workers=workers, backend=backend, group=group,
                notify=notify,
            )  # fmt: skip
        except RuntimeError as error:
            if (reason := distributed.lost_process(error)) is None:
                raise
            raise click.ClickException(reason) from None
    if not group.is_main:
        return
    _show(result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
        click.echo(f"Result: {json_file}")


def _available(device: str | None) -> str | None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("expected cpu, torch finds no GPU here", param_hint="--device")
    return device


def _announce(recipe: Any, output: Path, group: Any) -> None:
    click.echo(
        f"Training MobileNet V1, alpha {recipe.alpha:g}, on {recipe.data}: {recipe.backend}, "
        f"{recipe.precision}, {recipe.layout}, {group.world} x {group.device.type}, into {output}"
    )
    from mnet_kernels.inputs import InputError, require

    try:
        require("matplotlib", "'mnet_kernels[train]'")
    except InputError as error:
        click.echo(f"No curve.png: {error}")


@contextmanager
def _training_bar(
    is_main: bool,
) -> Iterator[tuple[Callable[[Progress], None], Callable[[Row], None]]]:
    """A bar on stderr where somebody watches, a line an epoch on stdout; of the main process."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    console = Console(stderr=True)
    watched = is_main and console.is_terminal
    with Bar(
        *columns,
        console=console,
        transient=True,
        disable=not watched,
        redirect_stdout=sys.stdout.isatty(),  # a line an epoch goes above the bar, or to a file
    ) as bar:

        def on_step(now: Progress) -> None:
            done = (now.epoch - 1) * now.steps + now.step
            if not bar.tasks:  # a resumed run's past is no work of this one's
                bar.add_task("", total=now.epochs * now.steps, completed=done)
            text = (
                f"epoch {now.epoch}/{now.epochs}, step {now.step}/{now.steps}: "
                f"loss {now.loss:.4f}, accuracy {now.accuracy:.1%}, "
                f"{now.images_per_second:,.0f} images/s,"
            )
            bar.update(bar.tasks[0].id, description=text, completed=done)

        def on_epoch(row: Row) -> None:
            print(  # not click.echo, which goes past the bar
                f"epoch {row['epoch']:3.0f}  loss {row['train_loss']:.4f}  "
                f"accuracy {row['train_accuracy']:6.2%}  "
                f"validation loss {row['validation_loss']:.4f}  "
                f"accuracy {row['validation_accuracy']:6.2%}  "
                f"{row['images_per_second']:,.0f} images/s",
                flush=True,
            )

        if is_main:
            yield on_step, on_epoch
        else:
            yield (lambda now: None), (lambda row: None)


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("", "top-1", "top-5", "images/s"):
        table.add_column(column, justify="right" if column else "left")
    for way, row in result["ways"].items():
        table.add_row(
            way, f"{row['top1']:.2%}", f"{row['top5']:.2%}", f"{row['images_per_second']:,.0f}"
        )
    console = Console(highlight=False)
    console.print(f"{result['model']}, {result['images']:,} pictures of {result['data']}")
    console.print(table)
    console.print(
        f"Weights: {result['weights']}; preprocessing: {result['preprocess']}. The same best class "
        f"for {result['same_top1']:,} of {result['images']:,} pictures."
    )
