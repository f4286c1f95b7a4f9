"""A convolution that pads, normalises and activates too: what :func:`mnet_kernels.swap` makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from mnet_kernels import backends, ops
from mnet_kernels.nn import dense, training
from mnet_kernels.nn.constants import FORMS, Constants, renewed
from mnet_kernels.nn.fold import fold, scaled, statistics_of
from mnet_kernels.nn.server import FOLDED, dense_server, depthwise_server
from mnet_kernels.nn.snapshot import Snapshot
from mnet_kernels.reference import ACTIVATIONS, same_padding
from mnet_kernels.registration import layout_of

_Edges = tuple[int, int, int, int]


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
    #: Why that is left to the norm itself, if it is.
    native_training: str | None = None
    #: The activation as the model wrote it, for native runs; None also if it is inside ``norm``.
    act: Callable[[Tensor], Tensor] | None = None
    activation: str = "identity"
    slope: float = 0.01
    backend: str | None = None
    #: Everything downstream takes any memory format: dense convolutions may choose theirs.
    free_layout: bool = False
    #: Depthwise, with a 1x1 convolution after it in the same run: whether both go in one pass;
    #: None: as the cost model says (runs/pairs.py).
    pair: bool | None = None
    #: Why this site was set to run native, if it was.
    declined: str | None = None
    #: With ``backend`` None: the one to take where it can serve, before the usual order.
    preferred: str | None = None


class FusedConv2d(nn.Conv2d):
    """A Conv2d that also pads, normalises and activates: ``act(norm(conv(pad(x))))``.

    Parameters, buffers and state_dict are the Conv2d's. In eval mode (or with a norm that was
    frozen by ``.eval()``) it is one pass over memory; with the batch's statistics a depthwise one
    is one operator too, which keeps little but its input for backward, and a 1x1 in float32 on the
    CPU, which keeps its convolution too. Where no backend serves the input, and for all other
    convolutions with the batch's statistics, it is :meth:`forward_native`. The norm is read at
    every call: nothing that is done to it later is missed. The exceptions are writes that leave no
    trace to look for: through ``.data``, of a single element of a large convolution weight on the
    CPU and of anything on a GPU. A CUDA graph holds what it was captured with until the next call
    outside of it.

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

    def uses_batch_statistics(self) -> bool:
        """Whether the norm, as it is now, normalises by the batch's own mean and variance."""
        norm = self.fusion.norm
        return norm is not None and (
            (norm.training and self.fusion.batch_statistics)
            or norm._buffers["running_mean"] is None
        )

    def why_native(
        self, device: torch.device | str, dtype: torch.dtype, in_training: bool | None = None
    ) -> str | None:
        """The sentence why a call runs :meth:`forward_native`, or None if it runs fused.

        Args:
            in_training: with the batch's statistics or without; None: as the norm is now.
        """
        fusion = self.fusion
        if fusion.declined is not None:
            return fusion.declined
        weight = self._parameters.get("weight")
        if weight is None:
            return "its weight is no parameter, but computed (parametrised)"
        if not torch.jit.is_tracing() and weight.shape != declared_shape(self):
            return "its weight has been given another shape"
        if self.uses_batch_statistics() if in_training is None else in_training:
            why = fusion.native_training
            if isinstance(fusion.norm, nn.SyncBatchNorm):
                why = "SyncBatchNorm shares its statistics between processes"
            if why is not None:
                return f"{why}: native in training mode"
            if not is_depthwise(self):
                return training.why_not_dense(self, str(device), dtype)
            return depthwise_server(fusion.backend, None, str(device), dtype, True)[1]
        if not is_depthwise(self) or torch.compiler.is_compiling():
            return None  # the fold needs nothing but native operators
        return depthwise_server(fusion.backend, fusion.preferred, str(device), dtype)[1]

    def serving(
        self, device: torch.device | str, dtype: torch.dtype, in_training: bool = False
    ) -> str:
        """The backend of a fused call; "folded" where it is the native convolution of a fold. On a
        GPU a dense one may still be folded at some inputs (dense.py)."""
        fusion, device = self.fusion, torch.device(device)
        if not is_depthwise(self):
            if in_training:
                return "cpu"
            if self.groups > 1:
                return FOLDED
            packs = ops.packs(dtype) and fusion.free_layout
            if packs and fusion.backend in (None, "cpu") and device.type == "cpu":
                return "cpu"
            return dense_server(fusion.backend, fusion.preferred, str(device), dtype)
        preferred = None if in_training else fusion.preferred
        return depthwise_server(fusion.backend, preferred, str(device), dtype, in_training)[0]

    def forward(self, x: Tensor) -> Tensor:
        weight = self._parameters.get("weight")
        if weight is None or not isinstance(x, Tensor) or x.is_meta or x.layout != torch.strided:
            return self.forward_native(x)
        device = x.device
        if torch.is_autocast_enabled(device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device.type)
            x, weight = x.to(dtype), weight.to(dtype)  # type: ignore[assignment]
        traced = torch.jit.is_tracing()  # there it warns to look at sizes
        if x.dim() != 4 or not (traced or x.shape[1] == self.in_channels):
            return self.forward_native(x)  # which has words for that
        if x.dtype != weight.dtype or device != weight.device or in_functorch():
            return self.forward_native(x)
        if self.why_native(device, x.dtype) is not None:
            if self.fusion.free_layout and x.is_cpu and self.uses_batch_statistics():
                x = x.contiguous(memory_format=torch.channels_last)  # the layout of the fast paths
            return self.forward_native(x)
        depthwise = is_depthwise(self)
        if self.uses_batch_statistics():
            y = training.run(self, x, weight, depthwise)
            return self.forward_native(x) if y is None else y
        return self._depthwise(x, weight) if depthwise else self._dense(x, weight)

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
        return ops.dwconv_bn_act(
            x,
            *self._depthwise_constants(x, weight),
            stride=self.stride,
            padding="same" if fusion.pad == "same" else self.padding_edges(),
            dilation=self.dilation,
            activation=fusion.activation,
            slope=fusion.slope,
            backend=self.serving(x.device, x.dtype) if fusion.preferred else fusion.backend,
        )

    def _depthwise_constants(self, x: Tensor, weight: Tensor) -> Constants:
        """The CPU's and Triton's channels_last kernels read the weight tap by tap, CUDA's as it
        is."""
        by_tap = x.is_cpu or (not x.is_contiguous() and self.serving(x.device, x.dtype) == "triton")
        return self._constants(x, weight, "by_tap" if by_tap else "as_is")

    def _dense(self, x: Tensor, weight: Tensor) -> Tensor:
        """Every other convolution: one kernel where there is one for it, else folded."""
        fusion = self.fusion
        place: dict[str, Any] = {
            "stride": self.stride,
            "padding": "same" if fusion.pad == "same" else self.padding_edges(),
            "dilation": self.dilation,
            "activation": fusion.activation,
            "slope": fusion.slope,
        }
        if fusion.free_layout and (x.is_cpu or x.is_cuda):
            x = x.contiguous(memory_format=torch.channels_last)  # the layout of the fast paths
        if self._packs(x):
            y = ops.conv_bn_act_packed(
                x,
                *self._constants(x, weight, "packed"),
                kernel_size=self.kernel_size,
                out_channels=self.out_channels,
                **place,
            )
            return y if fusion.free_layout else y.contiguous(memory_format=layout_of(x))
        if not self._wants_gradient(x) and (backend := dense.decide(self, x)) != FOLDED:
            constants = self._constants(x, weight, "channels_last")
            return ops.conv_bn_act(x, *constants, backend=backend, **place)
        folded, _, bias = self._constants(x, weight, "folded")
        top, left, bottom, right = self._all_edges(x)
        if (top, left) != (bottom, right):
            x, top, left = _zero_pad(x, (top, left, bottom, right)), 0, 0
        if bias is not None:
            bias = bias.to(x.dtype)
        y = F.conv2d(x, folded, bias, self.stride, (top, left), self.dilation, self.groups)
        return ACTIVATIONS[fusion.activation](y, fusion.slope, inplace=True)

    def _packs(self, x: Tensor) -> bool:
        """Whether this call goes to the packed convolution, which has no gradient."""
        return (
            self.fusion.backend in (None, "cpu")
            and ops.can_pack(x, self.groups)
            and not self._wants_gradient(x)
        )

    def _wants_gradient(self, x: Tensor) -> bool:
        """Whether one may have to flow through this call; a recorded one is not known."""
        return recorded() or (
            torch.is_grad_enabled() and (x.requires_grad or self._requires_grad())
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

    def _constants(self, x: Tensor, weight: Tensor, form: str) -> Constants:
        """(weight, scale, shift) as the call wants them, kept for as long as nothing changes.

        Computed anew wherever a gradient must flow through them, and where the call is recorded
        (torch.compile, torch.export, torch.jit.trace), so that the recording holds no old values.

        Args:
            form: what becomes of the weight, a key of ``FORMS``.
        """
        bias, norm, make = self._parameters["bias"], self.fusion.norm, FORMS[form]
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
                        made = renewed(kept[2], made, sources)
                kept = key, Snapshot(sources), made
            self.__dict__["_kept"] = kept
        return kept[2]

    def refresh(self) -> None:
        """Bring the constants of the latest call up to date, for a graph that reads them."""
        kept = self.__dict__.get("_kept")
        if kept is not None:
            form, dtype, _ = kept[0]
            like = torch.empty(0, dtype=dtype, device=self.weight.device)
            self._constants(like, self.weight, form)

    def kept_constants(self) -> Constants | tuple[()]:
        """What :meth:`_constants` keeps for the next call."""
        kept = self.__dict__.get("_kept")
        return () if kept is None else kept[2]

    def padding_edges(self) -> _Edges:
        """The convolution's own padding and ``fusion.pad`` together."""
        if isinstance(self.padding, str):  # torch's "same" and "valid", worked out by Conv2d
            left, right, top, bottom = self._reversed_padding_repeated_twice
        else:
            top, left = bottom, right = self.padding
        before = cast(_Edges, self.fusion.pad)
        return top + before[0], left + before[1], bottom + before[2], right + before[3]

    def _all_edges(self, x: Tensor) -> _Edges:
        return self._edges(x) if self.fusion.pad == "same" else self.padding_edges()

    def output_size(self, x: Tensor) -> list[int]:
        """(height, width) of the result."""
        top, left, bottom, right = self._all_edges(x)
        padded = x.shape[2] + top + bottom, x.shape[3] + left + right
        taps = zip(padded, self.kernel_size, self.stride, self.dilation, strict=True)
        return [(n - (k - 1) * d - 1) // s + 1 for n, k, s, d in taps]

    def _edges(self, x: Tensor) -> _Edges:
        """The zeros to add before the convolution's own padding."""
        if self.fusion.pad == "same":
            return same_padding(x.shape[2:], self.kernel_size, self.stride, self.dilation)
        return cast(_Edges, self.fusion.pad)

    def __getstate__(self) -> dict[str, Any]:
        forgotten = ("_kept", "_decision")
        return {name: value for name, value in self.__dict__.items() if name not in forgotten}

    def extra_repr(self) -> str:
        fusion = self.fusion
        parts = ["" if fusion.norm is None else "norm"]
        parts.append("" if fusion.activation == "identity" else fusion.activation)
        fused = "+".join(part for part in parts if part) or "nothing"
        pad = "" if fusion.pad == (0, 0, 0, 0) else f", pad={fusion.pad}"
        native = "" if fusion.declined is None else f" ({fusion.declined})"
        return f"{super().extra_repr()}{pad}, fused={fused}, backend={fusion.backend}{native}"


def is_depthwise(conv: Any) -> bool:
    """Whether a Conv2d has one group an input channel, and more than one."""
    return conv.groups == conv.in_channels > 1


def declared_shape(conv: nn.Conv2d | nn.Linear) -> tuple[int, ...]:
    """The shape that a weight has by its module's attributes. It may have been given another one:
    native calls do not look at the attributes, the fused operators do."""
    if isinstance(conv, nn.Linear):
        return conv.out_features, conv.in_features
    return conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size


def check_backend(operator: str, backend: str | None) -> None:
    """Raises ValueError if there is no such backend."""
    if backend is not None and backend not in backends.NAMES:
        raise ValueError(
            f"{operator}: backend: expected one of {', '.join(backends.NAMES)}, got {backend!r}"
        )


def recorded() -> bool:
    """Whether the call is being compiled, exported or traced: nothing may be kept of it."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def in_functorch() -> bool:
    """Inside torch.func.grad, vmap and the like, or forward-mode differentiation, which the fused
    operators do not all support."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def _zero_pad(x: Tensor, edges: _Edges) -> Tensor:
    top, left, bottom, right = edges
    return F.pad(x, (left, right, top, bottom))
