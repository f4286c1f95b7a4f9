"""Whether tensors, and the dictionaries that they were found in, are still what they were: what was
computed from them is kept for as long as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mnet_kernels import _C

#: Tensors up to this size are compared whole to see whether a fold is stale, larger ones in
#: some lines spread over them, their address and their version.
_COMPARED_BYTES = 16384
_LINE, _LINES = 64, 16


class Snapshot:
    """What some tensors held, to tell at every call whether they still do.

    Autograd's version counter misses writes through ``.data`` and BatchNorm's own updates of its
    statistics, so what is small and on the CPU is compared itself.

    Args:
        tensors: what a call's constants are made from; their storage is kept alive, so that its
            addresses cannot be given to others meanwhile.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._alive = [t.detach() for t in tensors]
        self._places: list[Any] | None = None  # None: there is nothing to tell by
        self._versions: dict[int, int] = {}  # by index, of those that are not compared whole
        spans = []
        if any(type(t) is not Tensor and type(t) is not nn.Parameter for t in tensors):
            return
        try:
            for i, t in enumerate(tensors):
                readable = t.is_cpu and _is_dense(t)
                whole = readable and t.nbytes <= _COMPARED_BYTES
                if whole:
                    spans.append((t.data_ptr(), t.nbytes, _LINE))
                elif readable:
                    # An odd number of lines: not always the same columns of a matrix.
                    step = (t.nbytes // _LINE // (_LINES + 1) | 1) * _LINE
                    spans.append((t.data_ptr(), _LINES * _LINE, step))
                if not whole:
                    self._versions[i] = t._version
            self._places = _places(tensors)
        except RuntimeError:  # an inference tensor (no version) or one without memory of its own
            return
        self._bytes = _C.Bytes(spans)

    def holds(self, tensors: list[Tensor]) -> bool:
        """Whether these are the same memory and hold the same; False if none can tell."""
        try:
            return (
                _places(tensors) == self._places
                and all(tensors[i]._version == version for i, version in self._versions.items())
                and self._bytes.unchanged()
            )
        except RuntimeError:
            return False


def _is_dense(t: Tensor) -> bool:
    """Whether a tensor's memory holds its elements, in any order, and nothing else."""
    return t.is_contiguous() or (
        t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    )


def _places(tensors: list[Tensor]) -> list[Any]:
    """Where tensors lie, and how."""
    return [(t.data_ptr(), t.is_contiguous() or t.stride()) for t in tensors]


class Watch:
    """A :class:`Snapshot` of tensors that are found in dictionaries, and of these, looked at in one
    go.

    Args:
        tensors: as for :class:`Snapshot`.
        entries: (dictionary, key, value): the very object that must be found there; Ellipsis: none.
        sizes: (dictionary, its length).
    """

    def __init__(
        self,
        tensors: list[Tensor],
        entries: list[tuple[dict[str, Any], str, Any]],
        sizes: list[tuple[dict[Any, Any], int]],
    ) -> None:
        self._snapshot = Snapshot(tensors)
        self._all: Any = None
        if self._snapshot._places is not None:
            kept = 0
            for t in tensors:
                kept = torch.ops.mnet_kernels.watch(t, kept)
            versions = self._snapshot._versions.items()
            versioned = [(tensors[i], version) for i, version in versions]
            self._all = _C.Watch(entries, sizes, kept, versioned)

    def unchanged(self) -> bool:
        """Whether all is as it was; False if nothing can tell."""
        try:
            return (
                self._all is not None
                and self._all.unchanged()
                and self._snapshot._bytes.unchanged()
            )
        except RuntimeError:  # a tensor that has no memory of its own any more
            return False
