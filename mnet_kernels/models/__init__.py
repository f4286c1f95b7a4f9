"""MobileNet V1, the Keras checkpoints it reads, and a summary table for any model."""

from mnet_kernels.models.mobilenet import MobileNetV1, mobilenet_v1
from mnet_kernels.models.summary import LayerRow, Summary, summary
from mnet_kernels.models.weights import LoadResult, load_keras_weights

__all__ = [
    "LayerRow",
    "LoadResult",
    "MobileNetV1",
    "Summary",
    "load_keras_weights",
    "mobilenet_v1",
    "summary",
]
