"""What a normalisation with fixed statistics comes to, and whether that is still so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mnet_kernels import _C

#: Tensors up to this size are compared whole to see whether a fold is stale, larger ones in
#: their first bytes, their address and their version.
_COMPARED_BYTES = 16384


def fold(dtype: torch.dtype, bias: Tensor | None, norm: Any) -> tuple[Tensor | None, Tensor | None]:
    """What a norm with fixed statistics and a bias come to.

    Args:
        dtype: the input's; scale and shift are float32, or float64 where it is.
        bias: the convolution's, ``(C,)`` or None.
        norm: with ``running_mean``, ``running_var``, ``eps``, and perhaps ``weight``, ``bias``.

    Returns:
        (scale, shift), ``(C,)`` each: ``norm(conv(x) + bias) = conv(x) * scale + shift``.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if norm is None:
        return None, None if bias is None else bias.to(wide)
    mean, var, gamma, beta = statistics_of(norm)
    scale = torch.rsqrt(var.to(wide) + norm.eps)
    mean = mean.to(wide)
    if gamma is not None:
        scale = scale * gamma.to(wide)
    if bias is not None:
        mean = mean - bias.to(wide)
    shift = -mean * scale if beta is None else torch.addcmul(beta.to(wide), mean, scale, value=-1)
    return scale, shift


def scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    """``weight`` ``(C, ...)`` times ``scale`` ``(C,)``, in weight's dtype."""
    if scale is None:
        return weight
    return (weight.to(scale.dtype) * scale.view(-1, 1, 1, 1)).to(weight.dtype)


def statistics_of(norm: nn.Module) -> tuple[Any, ...]:
    """(mean, var, weight, bias), past nn.Module's attribute search, which costs a microsecond."""
    buffers, parameters = norm._buffers, norm._parameters
    return (
        buffers["running_mean"],
        buffers["running_var"],
        parameters.get("weight", buffers.get("weight")),
        parameters.get("bias", buffers.get("bias")),
    )


class Snapshot:
    """What some tensors held, to tell later whether they still do.

    Autograd's version counter misses writes through ``.data`` and BatchNorm's own updates of its
    statistics, so what is small and on the CPU is compared itself.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        described = _describe(tensors)
        self._versions: list[Any] | None = None if described is None else described[0]
        self._bytes = _C.Bytes([] if described is None else described[1])
        # Their storage is kept alive, so that its addresses cannot be given to others meanwhile.
        self._alive = [t.detach() for t in tensors]

    def holds(self, tensors: list[Tensor]) -> bool:
        """Whether these tensors hold what those of the snapshot did; False if none can tell."""
        described = _describe(tensors)
        if described is None or self._versions is None:
            return False
        versions, spans = described
        return versions == self._versions and self._bytes.equal(spans)


def _describe(tensors: list[Tensor]) -> tuple[list[Any], list[tuple[int, int]]] | None:
    """(what to compare in Python, (address, bytes) of what to compare in memory), or None for
    tensors that offer neither."""
    versions: list[Any] = []
    spans = []
    try:
        for t in tensors:
            if type(t) is not Tensor and type(t) is not nn.Parameter:
                return None
            address, nbytes = t.data_ptr(), t.nbytes
            versions.append(t.dtype)
            on_cpu = t.is_cpu and nbytes and t.is_contiguous()
            if on_cpu:
                spans.append((address, min(nbytes, _COMPARED_BYTES)))
            if not on_cpu or nbytes > _COMPARED_BYTES:
                versions += [address, t._version]
    except RuntimeError:  # an inference tensor (no version) or one without memory of its own
        return None
    return versions, spans
