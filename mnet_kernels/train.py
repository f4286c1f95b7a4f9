"""Train a MobileNet V1: native or swapped, one process or many, resumed to the bit.

Everything random is drawn from the seed, the epoch, and the picture's number: not from what ran
before, nor from how many workers or processes there are. So a run that was interrupted goes on
from its last checkpoint exactly as if nothing had happened.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mnet_kernels import backends, report
from mnet_kernels.inputs import InputError
from mnet_kernels.models import mobilenet_v1
from mnet_kernels.report import curve
from mnet_kernels.swap import swap
from mnet_kernels.timing import environment
from mnet_kernels.training import checkpoint, datasets
from mnet_kernels.training.batches import (
    AUGMENTATION,
    DROPOUT,
    Shuffled,
    deaf_to_workers,
    loader,
    random_generator,
    read,
    shard,
)
from mnet_kernels.training.datasets import Images
from mnet_kernels.training.distributed import Group, lost_process
from mnet_kernels.training.recipe import (
    DECISIVE,
    LAYOUTS,
    PRECISIONS,
    Recipe,
    augment,
    nadam,
    scale,
    step,
)

#: On a GPU the losses are read this often only: reading waits for the device.
READ_EVERY = 20
#: Epochs between two drawings of the curve, which takes a while.
DRAW_EVERY = 10

#: One epoch's metrics: the columns of metrics.csv.
Row = dict[str, float]
COLUMNS = (
    "epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy",
    "images_per_second", "seconds",
)  # fmt: skip


#: The file in a run's directory from which it goes on.
CHECKPOINT = "checkpoint.pt"


class Stopped(RuntimeError):
    """The run cannot go on; one line: where, why, and the last good checkpoint."""


@dataclass(frozen=True)
class Progress:
    """Where a run is: means over the epoch's steps so far, of this process."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    images_per_second: float


def train(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    group: Group | None = None,
    on_step: Callable[[Progress], None] = lambda progress: None,
    on_epoch: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Train; leave checkpoint.pt, best.pt, metrics.csv, curve.png, report.html in ``output``.

    Args:
        output: a folder; made where it is missing. Without ``resume`` it must hold no run.
        resume: go on from ``output``'s checkpoint.pt. The settings in ``DECISIVE`` must be its.
        group: the processes, see :func:`mnet_kernels.training.distributed.group`; None: this one.
        on_step, on_epoch: told how it goes.

    Returns:
        The metrics of every epoch, also of those before an interruption.

    Raises:
        InputError: the data, the recipe or the checkpoint cannot be used.
        Stopped: the loss is not finite, nothing can be saved, or another process is lost.
    """
    group = group or Group()
    images = datasets.open_images(recipe.data, recipe.size)
    recipe = dataclasses.replace(
        recipe,
        size=images.size,
        epochs=recipe.epochs or images.epochs,
        flips=images.flips if recipe.flips is None else recipe.flips,
    )
    run = _Run(recipe, images, output, group, on_step)
    if resume:
        run.resume()
    elif run.path.exists():
        raise InputError(f"output {output}: it holds a run already: resume it, or name another")
    try:
        for epoch in range(len(run.rows) + 1, (recipe.epochs or 0) + 1):
            on_epoch(run.epoch(epoch))
    except RuntimeError as error:
        with deaf_to_workers():
            reason = lost_process(error)
            if reason is None:
                raise
            del run.train_loader, run.validation_loader
            stopped = run.stopped(reason)
        raise stopped from error
    finally:
        run.parallel = None
    return run.rows


class _Run:
    """The state of a run: what its checkpoints hold."""

    def __init__(
        self,
        recipe: Recipe,
        images: Images,
        output: Path,
        group: Group,
        on_step: Callable[[Progress], None],
    ) -> None:
        count = len(images.train)  # type: ignore[arg-type]
        _check(recipe, count, group)
        self.recipe, self.images, self.group, self.on_step = recipe, images, group, on_step
        self.output, self.path = output, output / CHECKPOINT
        self.rows: list[Row] = []
        self.layout = LAYOUTS[recipe.layout]
        self.dtype = PRECISIONS[recipe.precision]

        torch.manual_seed(recipe.seed)
        try:
            model: nn.Module = mobilenet_v1(recipe.alpha, len(images.classes))
        except (ValueError, OverflowError) as error:
            raise InputError(f"alpha: {error}") from None
        model = model.to(group.device).to(memory_format=self.layout)
        named = None if recipe.backend == "swap" else recipe.backend
        self.model = model if recipe.backend == "native" else swap(model, named)
        self.optimizer = nadam(self.model, recipe.learning_rate)
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=recipe.precision == "fp16")
        # Named apart from the model itself, so that checkpoints do not depend on the wrapping.
        self.forward: Any = torch.compile(self.model) if recipe.compile else self.model
        self.parallel: Any = self.forward
        if group.world > 1:
            self.parallel = DistributedDataParallel(self.forward)

        self.batches = Shuffled(count, recipe.batch, recipe.seed, group.rank, group.world)
        pin = group.device.type == "cuda"
        self.train_loader = loader(images.train, self.batches, recipe.workers, pin)
        self.validation_loader = loader(
            images.validation,
            shard(
                len(images.validation),  # type: ignore[arg-type]
                4 * recipe.batch // group.world,
                group.rank,
                group.world,
            ),
            recipe.workers,
            pin,
        )
        if group.is_main:
            try:
                output.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"output {output}: expected a folder: {error.strerror}") from None
            if not os.access(output, os.W_OK):
                raise InputError(f"output {output}: expected a folder to write in")

    def resume(self) -> None:
        """Take on the checkpoint's state."""
        state = checkpoint.load(self.path)
        asked: dict[str, Any] = {"classes": list(self.images.classes)}
        asked |= {name: getattr(self.recipe, name) for name in DECISIVE}
        held = {**state["recipe"], "classes": state["classes"]}
        for name, value in asked.items():
            if held.get(name) != value:
                raise InputError(
                    f"checkpoint {self.path}: expected {name} {value}, as asked for now, "
                    f"got {held.get(name)}"
                )
        checkpoint.load_state(self.model, state, self.path)
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the run so far had none
            self.scaler.load_state_dict(state["scaler"])
        self.rows = state["rows"]
        if self.group.is_main:
            with self._saving("resuming"):
                self._report()  # the interruption may have come before it was done

    def epoch(self, number: int) -> Row:
        """Train, validate, save."""
        start = time.perf_counter()
        train_loss, train_accuracy, rate = self._train(number)
        loss, accuracy = self._validate()
        if not math.isfinite(loss):
            raise self.stopped(f"epoch {number}, validation: the loss is {loss}")
        values = (number, train_loss, train_accuracy, loss, accuracy, rate)
        row = dict(zip(COLUMNS, (*values, time.perf_counter() - start), strict=True))
        self.rows.append(row)
        if self.group.is_main:
            with self._saving(f"epoch {number}"):
                self._save(number)
                self._report()
        return row

    def stopped(self, reason: str) -> Stopped:
        """The error, with what is really there to go on from."""
        try:
            last = f"{self.path} (epoch {checkpoint.load(self.path)['epoch']})"
        except InputError:
            last = "none"
        return Stopped(f"{reason}; last good checkpoint: {last}")

    def _train(self, epoch: int) -> tuple[float, float, float]:
        """One epoch: mean loss, accuracy, pictures a second; of all processes."""
        recipe, device, steps = self.recipe, self.group.device, len(self.batches)
        self.batches.epoch = epoch
        order = self.batches.indices()
        augmentation = random_generator(recipe.seed, epoch, AUGMENTATION)
        draws = torch.rand(self.batches.count, 3, generator=augmentation)
        dropout = random_generator(recipe.seed, epoch, DROPOUT, self.group.rank)
        torch.manual_seed(dropout.initial_seed())
        losses, right = torch.zeros(2, steps, dtype=torch.float64, device=device)
        self.model.train()
        begin, checked = time.perf_counter(), 0
        for i, (x, y) in enumerate(read(self.train_loader)):
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            x = augment(x, draws[order[i]].to(device), recipe.shift, bool(recipe.flips))
            x = x.contiguous(memory_format=self.layout)
            losses[i], right[i] = step(self.parallel, self.optimizer, self.scaler, x, y, self.dtype)
            done = i + 1
            if device.type == "cpu" or done % READ_EVERY == 0 or done == steps:
                self._check_losses(epoch, checked, losses[checked:done])
                checked = done
                rate = done * recipe.batch / (time.perf_counter() - begin)
                seen = done * order.shape[1]
                now = float(losses[:done].mean()), float(right.sum()) / seen, rate
                self.on_step(Progress(epoch, recipe.epochs or 0, done, steps, *now))
        loss, hits = self.group.sum(torch.stack((losses.mean(), right.sum()))).tolist()
        return loss / self.group.world, hits / (steps * recipe.batch), rate

    def _check_losses(self, epoch: int, first: int, losses: Tensor) -> None:
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            i = int(bad[0])
            raise self.stopped(
                f"epoch {epoch}, step {first + i + 1}: the loss is {float(losses[i])}"
            )

    @torch.no_grad()
    def _validate(self) -> tuple[float, float]:
        """Mean loss and accuracy over the validation half, each picture counted once."""
        device = self.group.device
        self.group.share_buffers(self.model)
        self.model.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=device)
        for x, y in read(self.validation_loader):
            x, y = scale(x.to(device)).contiguous(memory_format=self.layout), y.to(device)
            with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
                logits = self.forward(x)
                loss = F.cross_entropy(logits, y, reduction="sum")
            right = (logits.argmax(1) == y).sum()
            totals += torch.stack((loss.double(), right.double(), right.new_tensor(len(y))))
        loss_sum, hits, count = self.group.sum(totals).tolist()
        return loss_sum / count, hits / count

    @contextmanager
    def _saving(self, when: str) -> Iterator[None]:
        """A disk that is full, or gone, stops the run."""
        try:
            yield
        except OSError as error:
            reason = f"{error.filename or self.output} cannot be written: {error.strerror}"
            raise self.stopped(f"{when}: {reason}") from None

    def _save(self, epoch: int) -> None:
        """The checkpoint first: the other files can be made from it."""
        accuracies = [row["validation_accuracy"] for row in self.rows]
        state = {
            "recipe": dataclasses.asdict(self.recipe),
            "classes": list(self.images.classes),
            "epoch": epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rows": self.rows,
        }
        checkpoint.save(self.path, state)
        if accuracies[-1] > max(accuracies[:-1], default=-1.0):
            checkpoint.save(self.output / "best.pt", state)

    def _report(self) -> None:
        """What people look at; all of it follows from the checkpoint."""
        checkpoint.write_atomically(self.output / "metrics.csv", _csv(self.rows))
        row = self.rows[-1]
        if self._board is not None:
            for name in COLUMNS[1:]:
                self._board.add_scalar(name, row[name], int(row["epoch"]))
        if row["epoch"] % DRAW_EVERY and row["epoch"] != self.recipe.epochs:
            return
        title = f"MobileNet V1, alpha {self.recipe.alpha:g}, {self.images.spec}"
        here = {self.output.name: self._environment | dataclasses.asdict(self.recipe)}
        run = report.Run(self.output.name, self.rows)
        page = report.render(report.Evidence(runs=[run], environments=here), title)
        checkpoint.write_atomically(self.output / "report.html", page.encode())
        try:
            picture = curve.draw(self.rows, title)
        except InputError:  # matplotlib is an extra; the command says so before it starts
            return
        checkpoint.write_atomically(self.output / "curve.png", picture)

    @functools.cached_property
    def _environment(self) -> dict[str, Any]:
        return environment()

    @functools.cached_property
    def _board(self) -> Any:
        """TensorBoard's writer, or None where it is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        # What an interrupted run wrote from here on is replaced.
        return SummaryWriter(str(self.output / "tensorboard"), purge_step=len(self.rows))


def _check(recipe: Recipe, count: int, group: Group) -> None:
    """What the types do not say about a recipe."""
    if recipe.batch % group.world or recipe.batch // group.world < 2:
        raise InputError(
            f"batch: expected a multiple of the {group.world} processes, at least two pictures "
            f"each (BatchNorm needs them), got {recipe.batch}"
        )
    if recipe.batch > count:
        raise InputError(
            f"batch: expected at most the {count} training pictures, got {recipe.batch}"
        )
    if recipe.backend != "swap":
        dtype = PRECISIONS[recipe.precision] or torch.float32
        reason = backends.why_not(recipe.backend, device=group.device, dtype=dtype)
        if reason is not None:
            raise InputError(
                f"backend: expected one that serves here, got {recipe.backend}: {reason}"
            )
    if not (math.isfinite(recipe.learning_rate) and recipe.learning_rate > 0):
        raise InputError(f"learning_rate: expected a number above 0, got {recipe.learning_rate}")
    if not 0 <= recipe.shift < 1:
        raise InputError(f"shift: expected a fraction from 0 to 1, got {recipe.shift}")


def _csv(rows: list[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
