"""A model as one CUDA graph for inputs like one example, safely: what is wrong with a call is said,
and what changed since the recording is honoured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mnet_kernels.nn import FusedConv2d

_WARM_UPS = 3


class Graphed:
    """What :func:`graphed` returns: call it as the model, with one tensor like the example."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.model = model
        self._input = example.clone(memory_format=torch.preserve_format)
        self._capture()

    def __call__(self, x: Tensor) -> Any:
        _checked_input(x, self._input)
        _in_eval_mode(self.model)
        with torch.no_grad():
            if not self._holds():
                self._capture()
            self._input.copy_(x)
            self._replay()
            return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, self._output)

    def _capture(self) -> None:
        with torch.no_grad():
            self._output, self._replay = record(lambda: self.model(self._input), self._input.device)
        self._read = _addresses(self.model)

    def _holds(self) -> bool:
        """Folded constants are renewed in the memory that the graph reads; whether nothing it
        reads has moved."""
        for module in self.model.modules():
            if isinstance(module, FusedConv2d):
                module.refresh()
        return _addresses(self.model) == self._read


def graphed(model: nn.Module, example: Tensor) -> Graphed:
    """Record ``model(example)`` as a CUDA graph, which calls no Python and no launch one by one.

    The graph is replayed for every input of the example's shape, dtype and device; results are the
    caller's own. Parameters and statistics that change in place are honoured at the next
    call, those that were exchanged or moved by recording anew. Hooks and Python control flow run at
    recording only.

    Args:
        model: a Module in eval mode, on the example's GPU.
        example: the input to record with, a CUDA tensor.

    Raises:
        TypeError: ``model`` is no Module or ``example`` no Tensor.
        RuntimeError: ``example`` is not on a GPU, or the model is in training mode; at a call: the
            input differs from the example. The message says what was expected and what came.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"graphed: model: expected a Module, got {type(model).__name__}")
    if not isinstance(example, Tensor):
        raise TypeError(f"graphed: example: expected a Tensor, got {type(example).__name__}")
    if not example.is_cuda:
        raise RuntimeError(f"graphed: example: expected a CUDA tensor, got one on {example.device}")
    _in_eval_mode(model)
    return Graphed(model, example)


def record(call: Callable[[], Any], device: torch.device | str) -> tuple[Any, Callable[[], None]]:
    """(the result, a function that computes it again in the same memory).

    Streams and captures are of the current device, which need not be the call's."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):  # kernels are chosen and constants made outside of the graph
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # A capture stream of its own: torch keeps one for all captures, on the device of the first.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            result = call()
    return result, graph.replay


def _checked_input(x: object, example: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"graphed: x: expected a Tensor, got {type(x).__name__}")
    for name, now, then in (
        ("shape", tuple(x.shape), tuple(example.shape)),
        ("dtype", x.dtype, example.dtype),
        ("device", x.device, example.device),
    ):
        if now != then:
            raise RuntimeError(
                f"graphed: x: expected the example's {name} {then}, got {now}: a graph serves one "
                "kind of input, call graphed again for another"
            )


def _in_eval_mode(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training:
            raise RuntimeError(
                f"graphed: model: expected eval mode, got {name or 'the model'} in training mode"
            )


def _addresses(model: nn.Module) -> list[int]:
    """Where everything lies that a graph of the model reads."""
    read = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    for module in model.modules():
        if isinstance(module, FusedConv2d):
            read += [0 if t is None else t.data_ptr() for t in module.kept_constants()]
    return read
