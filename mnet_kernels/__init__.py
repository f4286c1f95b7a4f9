"""mnet_kernels: fused depthwise-conv + BatchNorm + activation kernels for PyTorch."""

from mnet_kernels import backends, models, nn
from mnet_kernels._version import __version__
from mnet_kernels.blocks import SeparableConv
from mnet_kernels.conv_training import conv_bn_act_training
from mnet_kernels.dwconv_training import dwconv_bn_act_training
from mnet_kernels.graphs import graphed
from mnet_kernels.ops import conv_bn_act, dwconv_bn_act
from mnet_kernels.separable import separable_conv
from mnet_kernels.swap import explain, restore, sites, swap

__all__ = [
    "SeparableConv",
    "__version__",
    "backends",
    "conv_bn_act",
    "conv_bn_act_training",
    "dwconv_bn_act",
    "dwconv_bn_act_training",
    "explain",
    "graphed",
    "models",
    "nn",
    "restore",
    "separable_conv",
    "sites",
    "swap",
]
