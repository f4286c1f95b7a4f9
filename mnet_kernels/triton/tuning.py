"""Which configurations the autotuner tries: few, each with a reason, fewer still for a shape.

A program has 128 threads. In channels_last a thread moves 16 bytes of channels (8 of bfloat16, 4 of
float32), and in contiguous as many columns as the width allows. Larger patches load an input fewer
times, (ROWS + 2) * (COLS + 2) tiles instead of 9 * ROWS * COLS for a 3x3 kernel with stride 1, and
take more registers: 64 float32 sums a thread is the most.

The choice is kept for a layer and an input size whatever the batch, and on disk by Triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton

_THREADS = 128
_WARP = 64 if torch.version.hip else 32
_BLOCKS = (64, 32, 16, 8)  # channels; 64 of bfloat16 are a 128-byte line
#: Multiply-adds of tiles in a program: what its registers hold in channels_last, where a thread's
#: part of a tile is a vector; what its code may grow to in contiguous, where it is one number.
_MOST_UNROLLED = {True: 128, False: 400}
#: What a thread's inputs, taps and sums take in channels_last if all are held at once: compilers
#: move loads to the front.
_MOST_REGISTERS = 256


class Patches:
    """The patches that a kernel may have.

    Args:
        channels_last: (ROWS, COLS), smallest first.
        rows: ROWS for contiguous, each with every number of COLS.
    """

    def __init__(self, channels_last: list[tuple[int, int]], rows: list[int]) -> None:
        self.channels_last = channels_last
        self.contiguous = [(r, cols) for r in rows for cols in (8, 4, 2, 1)]
        self.configs = {
            patch: triton.Config(
                dict(zip(("ROWS", "COLS"), patch, strict=True)), num_warps=_THREADS // _WARP
            )
            for patch in channels_last + self.contiguous
        }


FORWARD = Patches([(1, 1), (1, 2), (1, 4), (2, 2), (4, 2)], [1, 2, 4, 7])
# Next to the patch: two sums a channel; the whole of dx before it is stored; a sum for every tap.
CONV = Patches([(1, 1), (1, 2), (1, 4)], [1, 2, 4, 7])
DATA = Patches([(1, 1), (1, 2), (1, 4), (2, 2), (4, 2)], [1, 2, 4, 7])
WEIGHT = Patches([(1, 1), (1, 2), (2, 2)], [1, 2])

# separable_conv: more output channels compute the depthwise half less often, more pixels load the
# weights less often; at most 64 float32 sums a thread, next to that half's vectors for every tap.
SEPARABLE = [
    triton.Config(
        {"PIXELS": pixels, "BLOCK_K": block_k, "BLOCK_C": block_c},
        num_warps=threads // _WARP, num_stages=2,
    )
    for pixels, block_k, threads in [
        (64, 32, 128), (128, 32, 256),
        (32, 64, 128), (64, 64, 128), (128, 64, 256),
        (32, 128, 128), (64, 128, 256),
        (32, 256, 256), (64, 256, 256),
    ]
    for block_c in (16, 32)
]  # fmt: skip

# conv_bn_act: (PIXELS, BLOCK_K, threads) by the most output channels that they are for; above 64
# from what fills a GPU with a single image to what reads x and the weights least often.
_DENSE = {
    16: [(64, 16, 128), (128, 16, 128)],
    32: [(64, 32, 128), (128, 32, 256)],
    64: [(32, 64, 128), (64, 64, 128), (128, 64, 128)],
    128: [(32, 64, 128), (64, 128, 128), (128, 128, 256)],
    math.inf: [(32, 64, 128), (64, 128, 128), (128, 128, 256), (128, 256, 256)],
}
#: Blocks of depth on the chip: three where shared memory is filled asynchronously.
_STAGES = 2 if torch.version.hip else 3
_DENSE_CONFIGS = {
    (pixels, block_k, threads): triton.Config(
        {"PIXELS": pixels, "BLOCK_K": block_k}, num_warps=threads // _WARP, num_stages=_STAGES
    )
    for tiles in _DENSE.values() for pixels, block_k, threads in tiles
}  # fmt: skip
DENSE = list(_DENSE_CONFIGS.values())

#: What the choice depends on, besides dtypes. No batch size: that would tune again for each.
_KEY = [
    "H", "W", "OH", "OW", "C", "M", "KH", "KW", "SH", "SW", "DH", "DW", "TOP", "LEFT",
    "CHANNELS_LAST", "K",
]  # fmt: skip


def autotune(kind: Patches | list[triton.Config]) -> Callable:
    """Triton's decorator with our configurations, pruned for each shape, kept on disk."""
    return triton.autotune(
        configs=kind if isinstance(kind, list) else list(kind.configs.values()),
        key=_KEY,
        prune_configs_by={"early_config_prune": _Prune(kind)},
        cache_results=True,
    )


def block(channels: int, itemsize: int, channels_last: bool) -> dict[str, int]:
    """How a program's threads are shared out between channels and patches: nothing to choose.

    The widest block of channels that leaves at most an eighth of its threads idle."""
    if not channels_last:
        return {"LANES": _THREADS, "BLOCK_C": 1}
    fitting = (b for b in _BLOCKS if -(-channels // b) * b * 8 <= channels * 9)
    block_c = next(fitting, _BLOCKS[-1])
    return {"LANES": _THREADS * (16 // itemsize) // block_c, "BLOCK_C": block_c}


def prune(kind: Patches, itemsize: int, shape: dict[str, Any]) -> list[triton.Config]:
    """At most three configurations: the largest patches that fit.

    Args:
        itemsize: of x, bytes.
        shape: the kernel's arguments by name.
    """
    patches = kind.channels_last if shape["CHANNELS_LAST"] else kind.contiguous
    fitting = [patch for patch in patches if _fits(kind, *patch, itemsize, shape)]
    if not shape["CHANNELS_LAST"]:  # the widest vectors that fit
        widest = max(cols for _, cols in fitting)
        fitting = [patch for patch in fitting if patch[1] == widest]
    return [kind.configs[patch] for patch in fitting[-3:]]


def _fits(kind: Patches, rows: int, cols: int, itemsize: int, shape: dict[str, Any]) -> bool:
    channels_last = shape["CHANNELS_LAST"]
    of_x = kind is DATA  # patches of x, a stride larger
    height, width = (shape["H"], shape["W"]) if of_x else (shape["OH"], shape["OW"])
    patch = rows * cols * (shape["SH"] * shape["SW"] if of_x else 1)
    if rows * cols > 1:
        if not shape.get("UNROLL", True) or rows > height or cols > width:
            return False
        kh, kw = (shape[n] for n in (("TAP_ROWS", "TAP_COLS") if kind is WEIGHT else ("KH", "KW")))
        of_conv = kind is CONV and channels_last
        if rows * cols * kh * kw > _MOST_UNROLLED[channels_last] // (2 if of_conv else 1):
            return False
        if channels_last and (
            patch > 16
            or _registers(kind, rows, cols, kh, kw, patch, itemsize, shape) > _MOST_REGISTERS
        ):
            return False
    if kind is WEIGHT and (height % rows or width % cols):
        return False  # its patches cover the plane exactly
    if channels_last:
        return True
    if rows == 7 and height % 7:
        return False
    columns = cols * shape["SW"]  # of x, for cols of y
    whole = columns & (columns - 1) == 0 and shape["W"] % columns == 0 and shape["OW"] % cols == 0
    return cols == 1 or (whole and columns * itemsize <= 16)


def _registers(
    kind: Patches, rows: int, cols: int, kh: int, kw: int, sums: int, itemsize: int, shape: dict
) -> int:
    """Registers that a thread takes: for loads of 16 bytes and float32 sums of as many channels."""
    sh, sw = shape["SH"], shape["SW"]
    if kind is DATA:  # of dy, for patches of x
        inputs = (rows + (kh - 1) // sh) * (cols + (kw - 1) // sw)
    else:
        inputs = ((rows - 1) * sh + kh) * ((cols - 1) * sw + kw)
    beside = 6 if kind is CONV else 0  # dy, two sums a channel
    return 4 * (inputs + kh * kw + beside) + 16 // itemsize * sums


def prune_separable(itemsize: int, shape: dict[str, Any]) -> list[triton.Config]:
    """The configurations of SEPARABLE with the narrowest block that holds K channels, or else with
    the widest there is; in between 32 channels at a time where registers have room for them."""
    widest = 256 if shape["CHANNELS_LAST"] else 128
    blocks = sorted({c.kwargs["BLOCK_K"] for c in SEPARABLE if c.kwargs["BLOCK_K"] <= widest})
    block = next((b for b in blocks if b >= shape["K"]), blocks[-1])

    def fits(config: dict[str, int]) -> bool:
        room = itemsize == 2 and shape["CHANNELS_LAST"] and block < 256 and config["PIXELS"] >= 64
        return config["BLOCK_K"] == block and config["BLOCK_C"] == (32 if room else 16)

    return [c for c in SEPARABLE if fits(c.kwargs)]


def dense(
    width: int, itemsize: int, *, C: int, KH: int, KW: int, PRECISION: str, CHANNELS_LAST: bool,
    **_: Any,
) -> dict[str, int]:  # fmt: skip
    """What conv_bn_act has no choice of: BLOCK_C, 128 bytes of the depth at most, and VECTOR, how
    many pixels of contiguous one access moves: they divide rows of `width`."""
    # Without matrix units all factors of a block wait in registers.
    most = 16 if itemsize == 4 and PRECISION == "ieee" else 128 // itemsize
    block_c = _block_of_depth(C, most)
    if KH * KW > 1 and block_c > C:  # of several taps
        block_c = _block_of_depth(KH * KW * C, most)
    vectors = (1,) if CHANNELS_LAST else (16 // itemsize, 4, 2, 1)
    return {"BLOCK_C": block_c, "VECTOR": next(v for v in vectors if width % v == 0)}


def _block_of_depth(depth: int, most: int) -> int:
    """The widest that adds at most an eighth to what the best one covers."""
    blocks = [b for b in _BLOCKS if 16 <= b <= most]
    covered = [-(-depth // b) * b for b in blocks]
    return next(b for b, n in zip(blocks, covered, strict=True) if n * 8 <= min(covered) * 9)


def prune_dense(itemsize: int, shape: dict[str, Any]) -> list[triton.Config]:
    """Those for K output channels; a thread has 64 float32 sums at most, and twice that next to
    factors of 16 bits."""
    tiles = next(tiles for most, tiles in _DENSE.items() if shape["K"] <= most)
    return [_DENSE_CONFIGS[t] for t in tiles if t[0] * t[1] <= 64 * (4 // itemsize) * t[2]]


class _Prune:
    """early_config_prune of one kernel. Triton gives the positional arguments by name, torch's
    tracing the same."""

    def __init__(self, kind: Patches | list[triton.Config]) -> None:
        self.kind = kind

    def __call__(self, configs, named, **constants):
        itemsize = named["w_ptr" if self.kind is not WEIGHT else "x_ptr"].dtype.itemsize
        shape = named | constants
        if isinstance(self.kind, Patches):
            return prune(self.kind, itemsize, shape)
        return (prune_dense if self.kind is DENSE else prune_separable)(itemsize, shape)
