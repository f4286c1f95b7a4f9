"""The constants of a fused call (weight, scale, shift) in the forms that the operators read."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from mnet_kernels import ops
from mnet_kernels.nn.fold import scaled

Constants = tuple[Tensor, Tensor | None, Tensor | None]


def _by_tap(weight: Tensor, scale: Tensor | None) -> Tensor:
    """The weight laid out tap by tap, (Kh, Kw, 1, C) in memory, as the CPU kernel reads it without
    a copy."""
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


#: What becomes of the weight, by the kind of call. The fused kernels apply the scale themselves.
FORMS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "as_is": lambda weight, scale: weight,
    "by_tap": _by_tap,
    "channels_last": lambda weight, scale: weight.contiguous(memory_format=torch.channels_last),
    "packed": lambda weight, scale: ops.pack_conv_weight(weight),
    "folded": scaled,
}


def renewed(kept: Constants, made: Constants, sources: list[Tensor]) -> Constants:
    """``made``, what of it is new in the memory of ``kept``: captured CUDA graphs read it there."""
    given = {t.data_ptr() for t in sources}

    def of(old: Tensor | None, new: Tensor | None) -> Tensor | None:
        if old is None or new is None or new.data_ptr() in given:
            return new
        fits = (old.shape, old.device) == (new.shape, new.device)
        return old.copy_(new) if fits else new

    return cast(Constants, tuple(map(of, kept, made)))
