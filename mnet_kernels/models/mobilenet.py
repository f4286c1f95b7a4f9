"""MobileNet V1 (Howard et al., arXiv:1704.04861, table 1) as ``keras.applications.MobileNet``.

Layers carry Keras' names, so that a checkpoint's weights map one to one (see ``weights.py``), and
padding follows TensorFlow, which is not symmetric where the stride is 2.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from torch import nn

from mnet_kernels.nn import SamePad2d

STEM_WIDTH = 32

#: (width, stride) of each depthwise separable block, before alpha: table 1 of the paper.
BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)


class MobileNetV1(nn.Sequential):
    """MobileNet V1: ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``, any floating dtype.

    A stem convolution and thirteen depthwise separable blocks, each convolution followed by
    BatchNorm (eps 1e-3, momentum 0.99 in Keras' sense) and ReLU6, then a convolutional head. Keras
    puts a softmax after it; here the logits come out. H and W of 32 and more work.

    The layers are children named as in Keras (``conv1``, ``conv_dw_1``, ``conv_dw_1_bn``,
    ``conv_pw_1``, ..., ``conv_preds``), in order. A slice is an ``nn.Sequential`` that shares them:
    ``model[:-4]`` gives the last feature map.

    Args:
        alpha: the width multiplier; a layer of the paper's width w has ``int(w * alpha)`` channels.
        num_classes: the number of logits.
        in_channels: the input's channels, 3 for colour images.
        depth_multiplier: depthwise outputs for each input channel.
        dropout: the probability of dropping a feature before the last convolution.
        padding: "same" pads as Keras does: the stem by TensorFlow's rule, which depends on the
            input's size, and stride-2 depthwise layers at the bottom and right only. "torch" pads
            every 3x3 layer by 1 on each side, as most PyTorch ports do.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Source: arXiv:1704.04861, ``keras.applications.mobilenet``.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        depth_multiplier: int = 1,
        dropout: float = 1e-3,
        padding: str = "same",
    ) -> None:
        _check_real("alpha", alpha, "a finite number above 0", lambda a: a > 0)
        _check_real("dropout", dropout, "a probability from 0 to 1", lambda p: 0 <= p <= 1)
        _check_count("num_classes", num_classes)
        _check_count("in_channels", in_channels)
        _check_count("depth_multiplier", depth_multiplier)
        if padding not in ("same", "torch"):
            raise ValueError(
                f'mobilenet_v1: padding must be "same" (as Keras) or "torch" (1 on each side), '
                f"got {padding!r}"
            )
        channels = int(STEM_WIDTH * alpha)
        if channels < 1:
            raise ValueError(
                f"mobilenet_v1: alpha must be at least {1 / STEM_WIDTH} to leave the stem a "
                f"channel, got {alpha!r}"
            )

        same = padding == "same"
        layers: OrderedDict[str, nn.Module] = OrderedDict()

        def add_conv(name: str, conv: nn.Conv2d) -> None:
            layers[name] = conv
            layers[f"{name}_bn"] = nn.BatchNorm2d(conv.out_channels, eps=1e-3, momentum=0.01)
            layers[f"{name}_relu"] = nn.ReLU6()

        if same:
            layers["conv1_pad"] = SamePad2d(3, stride=2)
        add_conv(
            "conv1",
            nn.Conv2d(in_channels, channels, 3, 2, padding=0 if same else 1, bias=False),
        )
        for i, (width, stride) in enumerate(BLOCKS, start=1):
            pad_apart = same and stride == 2
            if pad_apart:
                layers[f"conv_pad_{i}"] = nn.ZeroPad2d((0, 1, 0, 1))
            deep = channels * depth_multiplier
            depthwise = nn.Conv2d(
                channels,
                deep,
                3,
                stride,
                padding=0 if pad_apart else 1,
                groups=channels,
                bias=False,
            )
            add_conv(f"conv_dw_{i}", depthwise)
            channels = int(width * alpha)
            add_conv(f"conv_pw_{i}", nn.Conv2d(deep, channels, 1, bias=False))
        layers["global_average_pooling2d"] = nn.AdaptiveAvgPool2d(1)
        layers["dropout"] = nn.Dropout(dropout)
        layers["conv_preds"] = nn.Conv2d(channels, num_classes, 1)
        layers["reshape_2"] = nn.Flatten(1)
        super().__init__(layers)
        self.apply(_initialise_as_keras)

    def __getitem__(self, index: Any) -> Any:
        # nn.Sequential would build a slice by calling this class' own constructor.
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self.named_children())[index]))
        return super().__getitem__(index)


def mobilenet_v1(
    alpha: float = 1.0,
    num_classes: int = 1000,
    *,
    in_channels: int = 3,
    depth_multiplier: int = 1,
    dropout: float = 1e-3,
    padding: str = "same",
) -> MobileNetV1:
    """A MobileNet V1 with random weights; arguments and errors as :class:`MobileNetV1`."""
    return MobileNetV1(
        alpha,
        num_classes,
        in_channels=in_channels,
        depth_multiplier=depth_multiplier,
        dropout=dropout,
        padding=padding,
    )


def _initialise_as_keras(module: nn.Module) -> None:
    """Keras' defaults: Glorot-uniform kernels (a depthwise kernel's fan-out is M, not C*M)."""
    if isinstance(module, nn.Conv2d):
        fan_in, fan_out = module.in_channels, module.out_channels // module.groups
        limit = math.sqrt(6 / (math.prod(module.kernel_size) * (fan_in + fan_out)))
        nn.init.uniform_(module.weight, -limit, limit)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_real(argument: str, value: Any, expected: str, accepts: Callable[[Any], bool]) -> None:
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_real and math.isfinite(value) and accepts(value)):
        raise ValueError(f"mobilenet_v1: {argument} must be {expected}, got {value!r}")


def _check_count(argument: str, value: Any) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"mobilenet_v1: {argument} must be an integer of at least 1, got {value!r}"
        )
