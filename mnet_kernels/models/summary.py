"""A Keras-style table of a model: its layers, output shapes, parameters and multiply-adds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

if TYPE_CHECKING:
    from rich.box import Box
    from rich.console import Group


@dataclass(frozen=True)
class LayerRow:
    """One layer. ``output_shape`` is in torch's order, None for the batch; None if never called."""

    name: str
    type: str
    output_shape: tuple[int | None, ...] | None
    params: int
    multiply_adds: int


@dataclass(frozen=True)
class Summary:
    """A model's layers and totals; ``print(summary.render())`` shows the table.

    Parameters are counted as Keras counts them: BatchNorm's running mean and variance belong to
    the non-trainable ones. Multiply-adds are for one input, and are those of all convolutions and
    linear layers, the head included; biases, BatchNorm, activations and pooling are left out, as
    in the paper.
    """

    rows: tuple[LayerRow, ...]
    total_params: int
    trainable_params: int
    non_trainable_params: int
    multiply_adds: int

    def render(self) -> str:
        """The table as plain ASCII text, without colour codes; rich consoles print it in colour."""
        from rich import box
        from rich.console import Console

        # Wider than any row, so that no cell wraps; the table takes only what it needs.
        console = Console(file=io.StringIO(), width=10_000, color_system=None, highlight=False)
        with console.capture() as capture:
            console.print(self._layout(box.ASCII))
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def __rich__(self) -> Group:
        from rich import box

        return self._layout(box.HEAVY_HEAD)

    def _layout(self, lines: Box) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=lines, header_style="bold")
        table.add_column("Layer (type)", style="cyan", no_wrap=True)
        table.add_column("Output Shape", no_wrap=True)
        table.add_column("Param #", justify="right", style="green", no_wrap=True)
        table.add_column("Multiply-adds", justify="right", style="green", no_wrap=True)
        for row in self.rows:
            table.add_row(
                Text(f"{row.name} ({row.type})"),
                "?" if row.output_shape is None else str(row.output_shape),
                f"{row.params:,}",
                f"{row.multiply_adds:,}",
            )
        totals = (
            f"Total params: {self.total_params:,}",
            f"Trainable params: {self.trainable_params:,}",
            f"Non-trainable params: {self.non_trainable_params:,}",
            f"Multiply-adds: {self.multiply_adds:,} (one input; convolutions and linear layers)",
        )
        return Group(table, *map(Text, totals))


def summary(model: nn.Module, input_size: Sequence[int] = (1, 3, 224, 224)) -> Summary:
    """Run ``model`` once on zeros of ``input_size`` and describe its layers.

    Rows are the modules that hold no others or own parameters themselves, in the order in which
    the model defines them. The model runs in eval mode without gradients, on the device and in the
    floating dtype of its first parameter; its modes and hooks are as before afterwards.

    Args:
        model: any module that takes one tensor.
        input_size: the input's shape, the batch first, e.g. ``(1, 3, 224, 224)``.

    Raises:
        ValueError: ``input_size`` is not a sequence of positive integers.
    """
    size = tuple(input_size) if isinstance(input_size, Sequence) else ()
    if not size or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(
            "summary: input_size must be positive integers with the batch first, "
            f"e.g. (1, 3, 224, 224), got {input_size!r}"
        )

    layers = {
        name: module
        for name, module in model.named_modules()
        if not any(True for _ in module.children()) or _own_weights(module)
    }
    shapes: dict[nn.Module, tuple[int | None, ...]] = {}
    multiply_adds = dict.fromkeys(layers.values(), 0)

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tensor = _first_tensor(output)
        if tensor is not None:
            shapes[module] = (None, *tensor.shape[1:])
        multiply_adds[module] += _multiply_adds(module, inputs, output) // size[0]

    hooks = [layer.register_forward_hook(record) for layer in layers.values()]
    try:
        _run_on_zeros(model, size)
    finally:
        for hook in hooks:
            hook.remove()

    rows = []
    seen: set[Tensor] = set()  # a weight shared by two layers counts once, with the first
    for name, layer in layers.items():
        own = _own_weights(layer) - seen
        seen |= own
        rows.append(
            LayerRow(
                name=name or type(model).__name__.lower(),
                type=type(layer).__name__,
                output_shape=shapes.get(layer),
                params=sum(w.numel() for w in own),
                multiply_adds=multiply_adds[layer],
            )
        )
    total = sum(w.numel() for w in seen)
    trainable = sum(w.numel() for w in seen if w.requires_grad)
    return Summary(
        rows=tuple(rows),
        total_params=total,
        trainable_params=trainable,
        non_trainable_params=total - trainable,
        multiply_adds=sum(row.multiply_adds for row in rows),
    )


def _own_weights(module: nn.Module) -> set[Tensor]:
    """The parameters and stored floating buffers that belong to ``module`` itself.

    Counters (``num_batches_tracked``) and buffers that no checkpoint stores are not weights.
    """
    buffers = {k: b for k, b in module.named_buffers(recurse=False) if b.is_floating_point()}
    stored = module.state_dict() if buffers else {}
    return {*module.parameters(recurse=False), *(b for k, b in buffers.items() if k in stored)}


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return next((t for t in map(_first_tensor, output) if t is not None), None)
    return output if isinstance(output, Tensor) else None


def _multiply_adds(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> int:
    """Multiply-adds of one call, for the whole batch."""
    if isinstance(module, _ConvTransposeNd):  # each input element meets one kernel
        return int(inputs[0].numel() * module.weight[0].numel())
    if isinstance(module, (_ConvNd, nn.Linear)):  # each output element is one dot product
        return int(output.numel() * module.weight[0].numel())
    return 0


def _run_on_zeros(model: nn.Module, size: tuple[int, ...]) -> None:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(size, dtype=like.dtype, device=like.device))
    finally:
        for module, mode in modes.items():
            module.training = mode
