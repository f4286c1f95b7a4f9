"""When one kernel pays on a GPU, of a separable block and of a dense convolution: a model on paper,
for where nothing was measured.

A dense convolution in one kernel saves the activation's trip to memory and its start. Of a block,
two passes move the middle tensor out to memory and back, and start two kernels; one pass saves
both, but computes the depthwise half beside the product, again for every split of the output
channels (csrc/cuda/separable_variants.cuh). Our kernels multiply with ``mma.sync``, where a library
may have faster instructions. So both pay where memory is the limit (large planes, few channels) and
at small batches, where a kernel's start is; not where wide products are on a GPU whose library
multiplies twice as fast.

The figures of :data:`GPUS` are data sheets' and others' measurements, none of ours: time both where
you can.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """What a GPU can do at best."""

    multiprocessors: int
    bytes_per_s: float  # of a large copy
    #: 16-bit multiply-adds per second, of our mma.sync kernels at their best; of TF32 half of it.
    product: float
    library_product: float  # of cuBLAS and cuDNN
    float32: float  # multiply-adds per second, either way with TF32 off
    library_tf32: float
    instructions: float  # of single lanes, per second
    launch_s: float = 2.5e-6  # the shortest kernel, its start included


#: By the major number of the compute capability.
GPUS = {
    8: Gpu(108, 1.6e12, 125e12, 125e12, 9.7e12, 62e12, 9.7e12),
    9: Gpu(132, 4.3e12, 200e12, 395e12, 30e12, 197e12, 30e12),
}

#: Lane-instructions of a depthwise element for each tap: its multiply-add, and its share of
#: conversions and addresses.
PER_TAP = 20 / 9


def separable_seconds(
    pixels: int, input_pixels: int, channels: int, outputs: int, element_bytes: int, gpu: Gpu,
    *, taps: int = 9, tf32: bool = False, copied: bool = False,
) -> tuple[float, float]:  # fmt: skip
    """What a depthwise convolution and the 1x1 convolution after it take, in seconds: (in one pass,
    in two).

    Args:
        pixels: N*OH*OW; ``input_pixels`` N*H*W.
        channels: of the middle; the input's are taken to be as many.
        outputs: of the pointwise half.
        element_bytes: 2 or 4.
        taps: of the depthwise half.
        tf32: float32 operands may be rounded to TF32 (``cudnn.allow_tf32``), ours and the
            library's.
        copied: x and the result are copied into and out of the kernel's layout.
    """
    products = pixels * channels * outputs
    ours, library = _products(element_bytes, gpu, tf32)
    element = channels * element_bytes
    moved_in, middle, moved_out = (
        input_pixels * element, pixels * element, pixels * outputs * element_bytes
    )  # fmt: skip
    # Tiles of 64 pixels by 128 outputs; where these do not fill the GPU, 16 by 32, split further.
    large = -(-pixels // 64) * -(-outputs // 128) >= gpu.multiprocessors
    tile, wide = (64, 128) if large else (16, 32)
    tiles, most = -(-pixels // tile), -(-outputs // wide)
    splits = min(most, -(-gpu.multiprocessors // tiles))
    depthwise = pixels * channels * taps * PER_TAP * splits / gpu.instructions
    # On the cores that multiply float32 without TF32, the depthwise half is not beside the product
    # but in turn.
    beside = element_bytes == 2 or tf32
    arithmetic = max(products / ours, depthwise) if beside else products / ours + depthwise
    one = max((moved_in + moved_out) / gpu.bytes_per_s, arithmetic, gpu.launch_s)
    if copied:
        one += sum(max(2 * n / gpu.bytes_per_s, gpu.launch_s) for n in (moved_in, moved_out))
    first = max((moved_in + middle) / gpu.bytes_per_s, gpu.launch_s)
    second = max((middle + moved_out) / gpu.bytes_per_s, products / library, gpu.launch_s)
    return one, first + second


def conv_seconds(
    pixels: int, input_pixels: int, channels: int, outputs: int, element_bytes: int, gpu: Gpu,
    *, taps: int = 1, activation: bool = True, tf32: bool = False, copied: bool = False,
) -> tuple[float, float]:  # fmt: skip
    """A dense convolution of ``taps`` taps, its affine and its activation: (in one kernel, a
    library's convolution with folded weights and the activation after it). Arguments as for
    :func:`separable_seconds`; ``channels`` are the input's.
    """
    products = pixels * channels * outputs * taps
    ours, library = _products(element_bytes, gpu, tf32)
    moved_in = input_pixels * channels * element_bytes
    moved_out = pixels * outputs * element_bytes
    bytes_s = (moved_in + moved_out) / gpu.bytes_per_s
    one = max(bytes_s, products / ours, gpu.launch_s)
    if copied:
        one += sum(max(2 * n / gpu.bytes_per_s, gpu.launch_s) for n in (moved_in, moved_out))
    folded = max(bytes_s, products / library, gpu.launch_s)
    if activation:
        folded += max(2 * moved_out / gpu.bytes_per_s, gpu.launch_s)
    return one, folded


def _products(element_bytes: int, gpu: Gpu, tf32: bool) -> tuple[float, float]:
    """Multiply-adds a second: ours, the library's."""
    if element_bytes == 2:
        return gpu.product, gpu.library_product
    return (gpu.product / 2, gpu.library_tf32) if tf32 else (gpu.float32, gpu.float32)


def gpu_of(device: torch.device) -> Gpu:
    """The figures for a device; an unknown one is taken for the newest that is known."""
    newest = max(GPUS)
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else newest
    return GPUS.get(major, GPUS[newest])
