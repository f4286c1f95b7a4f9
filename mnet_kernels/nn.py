"""Modules that run a convolution, its normalisation and its activation in one pass.

``FusedConv2d`` is what :func:`mnet_kernels.swap` puts in the place of a convolution;
``DepthwiseConvBNAct`` is the layer to build new networks from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnet_kernels import backends, ops
from mnet_kernels.fold import Snapshot, fold, scaled, statistics_of
from mnet_kernels.reference import ACTIVATIONS, same_padding

_Pair = int | tuple[int, int]
_Edges = tuple[int, int, int, int]
_Constants = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass
class Fusion:
    """What a :class:`FusedConv2d` does besides convolving.

    It is held in a plain attribute, so that its modules stay registered where they were:
    parameters, buffers and state_dict keys do not change.
    """

    #: Zeros added before the convolution's own padding: (top, left, bottom, right), or "same" in
    #: TensorFlow's sense.
    pad: _Edges | str = (0, 0, 0, 0)
    norm: nn.Module | None = None
    #: The norm uses the batch's statistics while it is in training mode.
    batch_statistics: bool = True
    #: The activation as the model wrote it, for native runs; None also if it is inside ``norm``.
    act: Callable[[Tensor], Tensor] | None = None
    activation: str = "identity"
    slope: float = 0.01
    backend: str | None = None
    #: Everything downstream takes any memory format: dense convolutions may choose theirs.
    free_layout: bool = False
    #: Why this site was set to run native, if it was.
    declined: str | None = None
    #: With ``backend`` None: the one to take where it can serve, before the usual order.
    preferred: str | None = None


class FusedConv2d(nn.Conv2d):
    """A Conv2d that also pads, normalises and activates: ``act(norm(conv(pad(x))))``.

    Parameters, buffers and state_dict are the Conv2d's. In eval mode (or with a norm that was
    frozen by ``.eval()``) it is one pass over memory; with batch statistics, or where no backend
    serves the input, it is :meth:`forward_native`. The norm is read at every call: nothing that is
    done to it later is missed. The exceptions are writes that leave no trace to look for: through
    ``.data``, of a single element of a large convolution weight on the CPU and of anything on a
    GPU. A CUDA graph holds what it was captured with until the next call outside of it.

    Args:
        x: ``(N, C_in, H, W)``.

    Returns:
        ``(N, C_out, H_out, W_out)``, x's dtype.
    """

    fusion: Fusion

    @classmethod
    def fuse(cls, conv: nn.Conv2d, fusion: Fusion) -> FusedConv2d:
        """Turn ``conv`` itself, a plain Conv2d, into a FusedConv2d."""
        conv.__class__ = cls
        fused = cast(FusedConv2d, conv)
        fused.fusion = fusion
        return fused

    @property
    def is_depthwise(self) -> bool:
        return self.groups == self.in_channels > 1

    def why_native(self, device: torch.device | str, dtype: torch.dtype) -> str | None:
        """The sentence why a call runs :meth:`forward_native`, or None if it runs fused."""
        fusion = self.fusion
        if fusion.declined is not None:
            return fusion.declined
        norm = fusion.norm
        if norm is not None and (
            (norm.training and fusion.batch_statistics) or norm._buffers["running_mean"] is None
        ):
            return "the norm uses the batch's statistics (training mode)"
        if not self.is_depthwise or torch.compiler.is_compiling():
            return None  # the fold needs nothing but native operators
        return _server(fusion.backend, fusion.preferred, str(device), dtype)[1]

    def serving(self, device: torch.device | str, dtype: torch.dtype) -> str:
        """The backend of a fused call; "folded" where it is the native convolution of a fold."""
        if not self.is_depthwise:
            packs = self.groups == 1 and ops.packs(dtype)
            on_cpu = self.fusion.backend in (None, "cpu") and torch.device(device).type == "cpu"
            return "cpu" if packs and on_cpu and self.fusion.free_layout else "folded"
        return _server(self.fusion.backend, self.fusion.preferred, str(device), dtype)[0]

    def forward(self, x: Tensor) -> Tensor:
        weight, device = cast(Tensor, self._parameters["weight"]), x.device
        if torch.is_autocast_enabled(device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        if (
            x.dim() != 4
            or x.dtype != weight.dtype
            or device != weight.device
            or _in_functorch()
            or self.why_native(device, x.dtype) is not None
        ):
            return self.forward_native(x)
        if self.is_depthwise:
            return self._depthwise(x, weight)
        return self._dense(x, weight)

    def forward_native(self, x: Tensor) -> Tensor:
        """``act(norm(conv(pad(x))))``, module by module, as before the swap."""
        fusion = self.fusion
        if fusion.pad != (0, 0, 0, 0):
            x = _zero_pad(x, self._edges(x))
        y = nn.Conv2d.forward(self, x)
        if fusion.norm is not None:
            y = type(fusion.norm).forward(fusion.norm, y)
        if isinstance(fusion.act, nn.Module):
            return type(fusion.act).forward(fusion.act, y)
        return y if fusion.act is None else fusion.act(y)

    def _depthwise(self, x: Tensor, weight: Tensor) -> Tensor:
        fusion = self.fusion
        # The CPU's and Triton's channels_last kernels read the weight tap by tap, CUDA's as it is.
        by_tap = x.is_cpu or (not x.is_contiguous() and self.serving(x.device, x.dtype) == "triton")
        constants = self._constants(x, weight, "by_tap" if by_tap else "as_is")
        return ops.dwconv_bn_act(
            x,
            *constants,
            stride=self.stride,
            padding="same" if fusion.pad == "same" else self.padding_edges(),
            dilation=self.dilation,
            activation=fusion.activation,
            slope=fusion.slope,
            backend=self.serving(x.device, x.dtype) if fusion.preferred else fusion.backend,
        )

    def _dense(self, x: Tensor, weight: Tensor) -> Tensor:
        """Every other convolution: packed where there is a kernel for it, else folded."""
        fusion = self.fusion
        if fusion.free_layout and x.is_cpu:
            x = x.contiguous(memory_format=torch.channels_last)  # the layout of the fast paths
        if self._packs(x):
            return ops.conv_bn_act_packed(
                x,
                *self._constants(x, weight, "packed"),
                kernel_size=self.kernel_size,
                out_channels=self.out_channels,
                stride=self.stride,
                padding="same" if fusion.pad == "same" else self.padding_edges(),
                dilation=self.dilation,
                activation=fusion.activation,
                slope=fusion.slope,
            )
        folded, _, bias = self._constants(x, weight, "folded")
        top, left, bottom, right = self.padding_edges() if fusion.pad != "same" else self._edges(x)
        if (top, left) != (bottom, right):
            x, top, left = _zero_pad(x, (top, left, bottom, right)), 0, 0
        if bias is not None:
            bias = bias.to(x.dtype)
        y = F.conv2d(x, folded, bias, self.stride, (top, left), self.dilation, self.groups)
        return _IN_PLACE[fusion.activation](y, fusion.slope)

    def _packs(self, x: Tensor) -> bool:
        """Whether this call goes to the packed convolution, which has no gradient."""
        return (
            self.fusion.backend in (None, "cpu")
            and ops.can_pack(x, self.groups)
            and not recorded()
            and not (torch.is_grad_enabled() and (x.requires_grad or self._requires_grad()))
        )

    def sources(self) -> list[Tensor]:
        """The tensors besides the weight that a call's constants are made from."""
        bias, norm = self._parameters["bias"], self.fusion.norm
        sources: list[Tensor] = [] if bias is None else [bias]
        if norm is not None:
            sources += [t for t in statistics_of(norm) if t is not None]
            # A BatchNorm's update of its statistics has no version; its counter's has.
            counter = norm._buffers.get("num_batches_tracked")
            if counter is not None and not counter.is_cpu:
                sources.append(counter)
        return sources

    def _requires_grad(self) -> bool:
        return any(t.requires_grad for t in (self.weight, *self.sources()))

    def _constants(self, x: Tensor, weight: Tensor, form: str) -> _Constants:
        """(weight, scale, shift) as the call wants them, kept for as long as nothing changes.

        Computed anew wherever a gradient must flow through them, and where the call is recorded
        (torch.compile, torch.export, torch.jit.trace), so that the recording holds no old values.

        Args:
            form: what becomes of the weight, a key of ``_FORMS``.
        """
        bias, norm, make = self._parameters["bias"], self.fusion.norm, _FORMS[form]
        sources = [weight, *self.sources()]
        if recorded() or (torch.is_grad_enabled() and any(t.requires_grad for t in sources)):
            scale, shift = fold(x.dtype, bias, norm)
            return scaled(weight, scale) if form == "folded" else weight, scale, shift
        key = form, x.dtype, 0.0 if norm is None else norm.eps
        kept = self.__dict__.get("_kept")
        if kept is None or kept[0] != key or not kept[1].holds(sources):
            # Made for use outside of inference mode too.
            with torch.inference_mode(False), torch.no_grad():
                scale, shift = fold(x.dtype, bias, norm)
                made = make(weight, scale), scale, shift
                if x.is_cuda:
                    if torch.cuda.is_current_stream_capturing():
                        return made  # has no values before the graph is replayed
                    if kept is not None and kept[0] == key:
                        made = _renewed(kept[2], made, sources)
                kept = key, Snapshot(sources), made
            self.__dict__["_kept"] = kept
        return kept[2]

    def padding_edges(self) -> _Edges:
        """The convolution's own padding and ``fusion.pad`` together."""
        if isinstance(self.padding, str):  # torch's "same" and "valid", worked out by Conv2d
            left, right, top, bottom = self._reversed_padding_repeated_twice
        else:
            top, left = bottom, right = self.padding
        before = cast(_Edges, self.fusion.pad)
        return top + before[0], left + before[1], bottom + before[2], right + before[3]

    def _edges(self, x: Tensor) -> _Edges:
        """The zeros to add before the convolution's own padding."""
        if self.fusion.pad == "same":
            return same_padding(x.shape[2:], self.kernel_size, self.stride, self.dilation)
        return cast(_Edges, self.fusion.pad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedConv2d:
        # Where this module is moved or converted on its own, the norm it runs must follow; as part
        # of a whole model it is done twice, and the second time there is nothing to do.
        super()._apply(fn, recurse)
        if self.fusion.norm is not None:
            self.fusion.norm._apply(fn)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def extra_repr(self) -> str:
        fusion = self.fusion
        parts = ["" if fusion.norm is None else "norm"]
        parts.append("" if fusion.activation == "identity" else fusion.activation)
        fused = "+".join(part for part in parts if part) or "nothing"
        pad = "" if fusion.pad == (0, 0, 0, 0) else f", pad={fusion.pad}"
        native = "" if fusion.declined is None else f" ({fusion.declined})"
        return f"{super().extra_repr()}{pad}, fused={fused}, backend={fusion.backend}{native}"


class DepthwiseConvBNAct(nn.Module):
    """``act(bn(depthwise_conv(x)))``, in one pass whenever the BatchNorm's statistics are fixed.

    Args:
        channels: C.
        kernel_size, stride, dilation: int or (h, w).
        padding: "same" in TensorFlow's sense (output = ceil(size / stride), the odd pixel at the
            bottom and right), or int or (h, w).
        depth_multiplier: M, outputs a channel.
        activation: a name in ``mnet_kernels.reference.ACTIVATIONS``; ``slope`` is leaky_relu's.
        eps, momentum: the BatchNorm's.
        bias: whether the convolution has one.
        backend: as for :func:`mnet_kernels.ops.dwconv_bn_act`.

    Shapes:
        x ``(N, C, H, W)`` -> ``(N, C*M, H_out, W_out)``.

    Raises:
        ValueError: an unknown activation, backend or padding.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: _Pair = 3,
        *,
        stride: _Pair = 1,
        padding: _Pair | str = "same",
        dilation: _Pair = 1,
        depth_multiplier: int = 1,
        activation: str = "relu",
        slope: float = 0.01,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        bias: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"DepthwiseConvBNAct: activation: expected one of {', '.join(ACTIVATIONS)}, "
                f"got {activation!r}"
            )
        if isinstance(padding, str) and padding != "same":
            raise ValueError(
                f'DepthwiseConvBNAct: padding: expected "same", int or (h, w), got {padding!r}'
            )
        check_backend("DepthwiseConvBNAct", backend)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        outputs = channels * depth_multiplier
        same = padding == "same"
        conv = nn.Conv2d(
            channels, outputs, kernel_size, stride, 0 if same else padding, dilation,
            groups=channels, bias=bias, **place,
        )  # fmt: skip
        bn = nn.BatchNorm2d(outputs, eps, momentum, **place)
        fusion = Fusion(
            pad="same" if same else (0, 0, 0, 0),
            norm=bn,
            act=_Named(activation, slope),
            activation=activation,
            slope=slope,
            backend=backend,
        )
        self.conv = FusedConv2d.fuse(conv, fusion)
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@dataclass(frozen=True)
class _Named:
    """One of ours as a callable that can be pickled."""

    activation: str
    slope: float

    def __call__(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](x, self.slope)


def check_backend(operator: str, backend: str | None) -> None:
    """Raises ValueError if there is no such backend."""
    if backend is not None and backend not in backends.NAMES:
        raise ValueError(
            f"{operator}: backend: expected one of {', '.join(backends.NAMES)}, got {backend!r}"
        )


def absorbed(x: Tensor) -> Tensor:
    """The forward of a module whose work a FusedConv2d does: it hands its input on."""
    return x


def _by_tap(weight: Tensor, scale: Tensor | None) -> Tensor:
    """The same values laid out tap by tap, as the CPU kernel reads them without a copy."""
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


#: What becomes of the weight, by the kind of call. The fused kernels apply the scale themselves.
_FORMS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "as_is": lambda weight, scale: weight,
    "by_tap": _by_tap,
    "packed": lambda weight, scale: ops.pack_conv_weight(weight),
    "folded": scaled,
}


def _renewed(kept: _Constants, made: _Constants, sources: list[Tensor]) -> _Constants:
    """``made``, what of it is new in the memory of ``kept``: captured CUDA graphs read it there."""
    given = {t.data_ptr() for t in sources}

    def renewed(old: Tensor | None, new: Tensor | None) -> Tensor | None:
        if old is None or new is None or new.data_ptr() in given:
            return new
        fits = (old.shape, old.device) == (new.shape, new.device)
        return old.copy_(new) if fits else new

    return cast(_Constants, tuple(map(renewed, kept, made)))


def recorded() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


_FUSED: tuple[str, ...] = tuple(name for name in backends.NAMES if name != "native")

_IN_PLACE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda z, slope: z,
    "relu": lambda z, slope: F.relu(z, inplace=True),
    "relu6": lambda z, slope: F.relu6(z, inplace=True),
    "leaky_relu": lambda z, slope: F.leaky_relu(z, slope, inplace=True),
    "hardswish": lambda z, slope: F.hardswish(z, inplace=True),
    "silu": lambda z, slope: F.silu(z, inplace=True),
    "hardsigmoid": lambda z, slope: F.hardsigmoid(z, inplace=True),
}


def _in_functorch() -> bool:
    """Inside torch.func.grad, vmap and the like, which the fused operators do not all support."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _zero_pad(x: Tensor, edges: _Edges) -> Tensor:
    top, left, bottom, right = edges
    return F.pad(x, (left, right, top, bottom))


@functools.cache
def _server(
    backend: str | None, preferred: str | None, place: str, dtype: torch.dtype
) -> tuple[str, str | None]:
    """The backend that serves, or "native" and why neither the named one nor any other does."""
    device = torch.device(place)
    reasons = []
    usual = _FUSED if backend is None else (backend,)
    for name in usual if preferred is None else (preferred, *usual):
        reason = backends.why_not(name, device=device, dtype=dtype)
        if reason is None:
            return name, None
        reasons.append(reason)
    return "native", "; ".join(reasons)
