"""dwconv_bn_act with the batch's own statistics: act(batch_norm(depthwise(x, weight))).

The convolution is computed twice and kept never. One pass over x sums it up, a small kernel merges
the sums to mean and variance, and a second pass over x computes it again, normalised:
three transfers of a tensor instead of the seven of convolution, statistics, normalisation and
activation one after the other.

A variance is the sum of squares about a pivot near the mean, or nothing is left of it where the
mean is large: every lane sums about the first value it sees, a program brings its lanes to the
pivot of one of them, and the merge goes by the parallel formula
(Chan, Golub, LeVeque: Algorithms for computing the sample variance, 1983). All in a fixed order:
the same call gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mnet_kernels.registration import same_device
from mnet_kernels.triton import arguments, launch, tuning
from mnet_kernels.triton.dwconv_bn_act import convolve, launch_forward
from mnet_kernels.triton.dwconv_bn_act_backward import chunks_of, partials
from mnet_kernels.triton.launch import wrap_triton
from mnet_kernels.triton.tile import channels, patches, per_channel, weights_of_turn

#: In the schemas, behind the tensors.
CONSTANTS = f"{arguments.CONSTANTS}, float eps"
MERGED = 32  # channels, and partials at a time, of a program that merges


@tuning.autotune(tuning.CONV)
@triton.jit(do_not_specialize=(*arguments.SIZES, "CHUNKS"))
def _statistics(
    x_ptr,  # (N, C, H, W), contiguous or channels_last
    w_ptr,  # (C*M, KH*KW); (KH*KW, C*M) for channels_last
    partial_ptr,  # (CHUNKS, 4, C*M) float32: count, pivot, sums of (conv - pivot) and its square
    N, H, W, OH, OW, CHUNKS,
    C: tl.constexpr, M: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, UNROLL: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, LANES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = tl.cdiv(C * M, BLOCK_C)
    GH = tl.cdiv(OH, ROWS)
    GW = tl.cdiv(OW, COLS)
    chunk = tl.program_id(0) // BLOCKS
    k, k_exists = channels(tl.program_id(0) % BLOCKS, C * M, BLOCK_C)
    count = tl.full((LANES, 1), 0.0, tl.float32)
    pivot = tl.full((LANES, BLOCK_C), 0.0, tl.float32)
    sum = tl.full((LANES, BLOCK_C), 0.0, tl.float32)
    squares = tl.full((LANES, BLOCK_C), 0.0, tl.float32)
    for tile in range(chunk, tl.cdiv(N * GH * GW, LANES), CHUNKS):
        n, gh, gw, exists = patches(tile, N, GH, GW, LANES, WIDE)
        taps_ptr = weights_of_turn(w_ptr, tile, chunk, CHUNKS, KH * KW)
        conv = convolve(
            x_ptr, taps_ptr, n, gh, gw, exists, k, k_exists, H, W, C, M, KH, KW, SH, SW, DH, DW,
            TOP, LEFT, CHANNELS_LAST, UNROLL, ROWS, COLS, LANES, BLOCK_C,
        )  # fmt: skip
        pivot = tl.where(count == 0, conv[0], pivot)  # every patch has a first pixel
        for r in tl.static_range(ROWS):
            for t in tl.static_range(COLS):
                inside = exists & (gh * ROWS + r < OH) & (gw * COLS + t < OW)
                off = tl.where(inside, conv[r * COLS + t] - pivot, 0.0)
                count += tl.where(inside, 1.0, 0.0)
                sum += off
                squares += off * off
    # To the pivot of lane 0, which exists where any does; the others' count is 0 then.
    first = (tl.arange(0, LANES) == 0)[:, None]
    common = tl.sum(tl.where(first, pivot, 0.0), 0)[None, :]
    off = tl.where(count > 0, pivot - common, 0.0)
    squares += (2 * sum + count * off) * off
    sum += count * off
    partial = partial_ptr + chunk * (4 * C * M) + k
    tl.store(partial, tl.sum(count, 0)[None, :] + tl.zeros_like(common), k_exists)
    tl.store(partial + C * M, common, k_exists)
    tl.store(partial + 2 * C * M, tl.sum(sum, 0)[None, :], k_exists)
    tl.store(partial + 3 * C * M, tl.sum(squares, 0)[None, :], k_exists)


@triton.jit
def _load_partials(ptr, first, k, CHUNKS, K: tl.constexpr, MERGED: tl.constexpr):
    """Count, pivot and sums of MERGED programs from `first` on, each (MERGED, channels)."""
    chunk = (first + tl.arange(0, MERGED))[:, None]
    at = ptr + chunk * (4 * K) + k
    mask = (chunk < CHUNKS) & (k < K)
    count = tl.load(at, mask, other=0.0)
    mask &= count > 0
    pivot = tl.load(at + K, mask, other=0.0)
    sum = tl.load(at + 2 * K, mask, other=0.0)
    return count, pivot, sum, tl.load(at + 3 * K, mask, other=0.0)


@triton.jit(do_not_specialize=("CHUNKS",))
def _merge_statistics(
    partial_ptr,  # (CHUNKS, 4, K) float32, as _statistics writes it
    gamma_ptr,  # (K,) float32 or None
    mean_ptr,  # (K,) float32
    var_ptr,  # (K,) float32, biased
    scale_ptr,  # (K,) float32: gamma / sqrt(var + eps)
    CHUNKS, eps, K: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    k, k_exists = channels(tl.program_id(0), K, MERGED)
    pivot = tl.load(partial_ptr + K + k, k_exists, other=0.0)  # of the first chunk, never empty
    total = tl.full((MERGED, MERGED), 0.0, tl.float32)
    counts = tl.full((MERGED, MERGED), 0.0, tl.float32)
    for first in range(0, CHUNKS, MERGED):
        count, own_pivot, sum, _ = _load_partials(partial_ptr, first, k, CHUNKS, K, MERGED)
        total += sum + count * (own_pivot - pivot)
        counts += count
    pixels = tl.maximum(tl.sum(counts, 0), 1)[None, :]  # of channels that exist, never 0
    mean = tl.sum(total, 0)[None, :] / pixels  # from the pivot on
    spread = tl.full((MERGED, MERGED), 0.0, tl.float32)
    for first in range(0, CHUNKS, MERGED):
        count, own_pivot, sum, squares = _load_partials(partial_ptr, first, k, CHUNKS, K, MERGED)
        own_mean = sum / tl.where(count > 0, count, 1.0)
        off = own_pivot - pivot + own_mean - mean
        spread += squares - sum * own_mean + tl.where(count > 0, count * off * off, 0.0)
    var = tl.sum(spread, 0)[None, :] / pixels
    var = tl.where(var < 0, 0.0, var)  # lets NaN through
    tl.store(mean_ptr + k, pivot + mean, k_exists)
    tl.store(var_ptr + k, var, k_exists)
    gamma = per_channel(gamma_ptr, k, k_exists, 1.0)
    tl.store(scale_ptr + k, gamma / tl.sqrt_rn(var + eps), k_exists)


def check(x, weight, gamma, beta, y) -> None:
    """What is not dwconv_bn_act's to check."""
    for name, t in (("gamma", gamma), ("beta", beta)):
        if t is not None and (t.shape != weight.shape[:1] or t.dtype != torch.float32):
            raise RuntimeError(
                f"dwconv_bn_act_training: {name}: expected shape ({weight.shape[0]},) of float32, "
                f"got shape {tuple(t.shape)} of {str(t.dtype).removeprefix('torch.')}"
            )
    torch._check(
        y.shape[0] * y.shape[2] * y.shape[3] != 1,
        lambda: (
            "dwconv_bn_act_training: x: expected more than one value a channel in training, "
            f"got an output of shape {tuple(y.shape)}"
        ),
    )


@launch.operator(
    "mnet_kernels::dwconv_bn_act_training_triton",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, {CONSTANTS}) -> "
    "(Tensor, Tensor, Tensor)",
)
def dwconv_bn_act_training(
    x, weight, gamma, beta, stride, padding, dilation, activation, slope, eps
):
    """(y, mean, var): what is normalised has mean and (biased) var, each (C*M,) float32."""
    arguments.check(
        x, weight, None, None, stride, padding, dilation, activation, slope,
        op="dwconv_bn_act_training",
    )  # fmt: skip
    y, mean, var = _output(
        x, weight, gamma, beta, stride, padding, dilation, activation, slope, eps
    )
    check(x, weight, gamma, beta, y)
    if x.shape[0] == 0:
        return y, mean.zero_(), var.zero_()
    call = arguments.Depthwise(x, weight, y, stride, padding, dilation)
    x, taps = call.dense(x), call.taps(weight)
    chunks, partial, K = chunks_of(y), partials(y, 4), y.shape[1]

    def grid(meta):
        return (chunks * call.blocks(K),)

    wrap_triton(_statistics)[grid](
        x, taps, partial, *call.sizes, chunks, UNROLL=call.unrolled, **call.constants,
        **call.block(K),
    )  # fmt: skip
    scale = torch.empty_like(mean)
    wrap_triton(_merge_statistics)[(arguments.cdiv(K, MERGED),)](
        partial, arguments.dense(gamma), mean, var, scale, chunks, eps, K=K, MERGED=MERGED
    )
    launch_forward(call, x, taps, scale, arguments.dense(beta), mean, y, activation, slope)
    return y, mean, var


@dwconv_bn_act_training.register_fake
def _output(x, weight, gamma, beta, stride, padding, dilation, activation, slope, eps):
    """The results, uninitialised."""
    same_device("dwconv_bn_act_training", x, weight=weight, gamma=gamma, beta=beta)
    y = arguments.empty_output(x, weight, stride, padding, dilation)
    mean = torch.empty(weight.shape[0], dtype=torch.float32, device=x.device)
    return y, mean, torch.empty_like(mean)
