"""Modules that run a convolution, its normalisation and its activation in one pass.

``FusedConv2d`` is what :func:`mnet_kernels.swap` puts in the place of a convolution;
``DepthwiseConvBNAct`` is the layer to build new networks from.
"""

from mnet_kernels.nn.depthwise import DepthwiseConvBNAct
from mnet_kernels.nn.fused import FusedConv2d, Fusion, is_depthwise
from mnet_kernels.nn.padding import SamePad2d
from mnet_kernels.nn.pixel import PixelConv2d

__all__ = [
    "DepthwiseConvBNAct",
    "FusedConv2d",
    "Fusion",
    "PixelConv2d",
    "SamePad2d",
    "is_depthwise",
]
