"""conv_bn_act: packed dense convolutions against float64, and what is left to native."""

from __future__ import annotations

import pytest
import torch
from rulers import ROUNDING
from torch import Tensor

from mnet_kernels import ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# (N, C, H, W), C_out, kernel, constants: pixels and channels at every side of a tile (14 or 6
# pixels, 1 or 2 vectors, 32 channels), a leading dimension of 1024 floats, sums in pieces.
CASES = [
    ((1, 16, 1, 1), 8, 1, {}),
    ((2, 3, 33, 31), 32, 3, {"stride": 2, "padding": 1}),
    ((1, 3, 224, 30), 32, 3, {"stride": 2, "padding": (0, 0, 1, 1)}),
    ((3, 24, 13, 1), 24, 1, {}),
    ((1, 40, 14, 14), 33, 1, {}),
    ((1, 64, 7, 8), 100, 1, {}),
    ((2, 1024, 7, 7), 48, 1, {}),
    ((1, 1024, 3, 5), 31, 1, {"stride": 2}),
    ((2, 255, 5, 5), 65, 1, {}),
    ((2, 5, 9, 8), 7, 5, {"padding": 2, "dilation": (1, 2)}),
    ((1, 17, 6, 6), 16, 1, {"padding": (1, 0, 2, 1)}),
    ((2, 9, 8, 8), 40, 2, {"padding": "same", "stride": 3}),
    ((1, 130, 12, 12), 64, 3, {"padding": 1}),
]


both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def tensors(shape, outputs, kernel, dtype=torch.float32) -> tuple[Tensor, ...]:
    x = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(outputs, shape[1], kernel, kernel).to(dtype)
    return x, weight, torch.rand(outputs) + 0.5, torch.randn(outputs)


def check(x, weight, scale, shift, y, **constants) -> None:
    wide = [t if t is None else t.double() for t in (x, weight, scale, shift)]
    exact = ops.conv_bn_act(*wide, **constants, backend="native")
    linear = constants | {"activation": "identity"}
    magnitude = ops.conv_bn_act(
        *(t if t is None else t.abs() for t in wide), **linear, backend="native"
    )
    assert y.shape == exact.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    taps = weight[0].numel()
    # A sum of n terms in pieces of 128: at most 128 + n / 128 roundings.
    inner = (min(taps, 128 + taps / 128) + 8) * 2.0**-24 * magnitude
    allowed = inner + ROUNDING[x.dtype] * (exact.abs() + inner)
    assert y.dtype == x.dtype
    assert ((y.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("shape,outputs,kernel,constants", CASES, ids=str)
@pytest.mark.parametrize("activation", ["relu6", "silu"])
@both_dtypes
def test_packed(instruction_set, shape, outputs, kernel, constants, activation, dtype):
    x, weight, scale, shift = tensors(shape, outputs, kernel, dtype)
    constants = constants | {"activation": activation}
    check(
        x, weight, scale, shift, ops.conv_bn_act(x, weight, scale, shift, **constants), **constants
    )


@both_dtypes
def test_one_hot_inputs_find_every_index_error(instruction_set, dtype):
    values = 40 * 17 * 9 if dtype == torch.float32 else 251  # bfloat16 holds whole numbers to 256
    weight = (torch.arange(40 * 17 * 9) % values + 1.0).to(dtype).reshape(40, 17, 3, 3)
    for c, h, w in [(0, 0, 0), (16, 6, 8), (5, 3, 8), (9, 6, 0)]:
        x = torch.zeros(1, 17, 7, 9, dtype=dtype).to(memory_format=torch.channels_last)
        x[0, c, h, w] = 1
        call = dict(stride=2, padding=1, activation="identity")
        assert torch.equal(
            ops.conv_bn_act(x, weight, **call), ops.conv_bn_act(x, weight, **call, backend="native")
        )


@both_dtypes
def test_results_beyond_the_caches(instruction_set, dtype):
    """Many blocks of pixels, prefetched one ahead."""
    x, weight, scale, shift = tensors((5, 32, 225, 226), 64, 1, dtype)
    y = ops.conv_bn_act(x, weight, scale, shift)
    check(x[-1:], weight, scale, shift, y[-1:], activation="relu")
    assert torch.equal(y[:1], ops.conv_bn_act(x[:1], weight, scale, shift))


def test_without_scale_and_shift():
    x, weight, *_ = tensors((1, 8, 5, 5), 12, 1)
    check(x, weight, None, None, ops.conv_bn_act(x, weight), activation="relu")


@both_dtypes
def test_threads_share_the_work_without_a_trace(dtype):
    before = torch.get_num_threads()
    calls = [tensors(*case[:3], dtype) for case in CASES]
    try:
        torch.set_num_threads(3)
        results = [ops.conv_bn_act(*call) for call in calls]
        torch.set_num_threads(1)
        assert all(
            torch.equal(ops.conv_bn_act(*call), y) for call, y in zip(calls, results, strict=True)
        )
    finally:
        torch.set_num_threads(before)


@both_dtypes
def test_no_less_accurate_than_native(dtype):
    ours = native = 0.0
    for shape, outputs, kernel, constants in CASES:
        args = tensors(shape, outputs, kernel, dtype)
        exact = ops.conv_bn_act(*(t.double() for t in args), **constants, backend="native")
        for backend in ("cpu", "native"):
            error = (ops.conv_bn_act(*args, **constants, backend=backend) - exact).abs().mean()
            ours, native = (ours + error, native) if backend == "cpu" else (ours, native + error)
    assert ours <= native


@pytest.mark.parametrize(
    "dtype,groups,layout",
    [
        (torch.float32, 1, torch.contiguous_format),
        (torch.float32, 2, torch.channels_last),
        (torch.float16, 1, torch.channels_last),
        (torch.float64, 1, torch.channels_last),
    ],
)
def test_everything_else_is_native(dtype, groups, layout):
    x = torch.randn(2, 8, 6, 6).to(dtype).to(memory_format=layout)
    weight = torch.randn(12, 8 // groups, 3, 3).to(dtype)
    assert not ops.can_pack(x, groups)
    y = ops.conv_bn_act(x, weight, padding=1, groups=groups)
    assert torch.equal(y, torch.relu(torch.nn.functional.conv2d(x, weight, None, 1, 1, 1, groups)))


def test_bfloat16_is_left_to_native_where_it_has_matrix_tiles(monkeypatch):
    x = torch.randn(1, 8, 4, 4).to(torch.bfloat16).to(memory_format=torch.channels_last)
    assert ops.can_pack(x, 1)
    monkeypatch.setattr(ops, "_has_matrix_tiles", lambda: True)
    assert not ops.can_pack(x, 1)
    assert ops.can_pack(x.float(), 1)


def test_gradients_flow():
    x, weight, scale, shift = tensors((1, 8, 5, 5), 12, 1)
    weight.requires_grad_()
    ops.conv_bn_act(x, weight, scale, shift).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0
