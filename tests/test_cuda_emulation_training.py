"""Training on CUDA without a GPU: dwconv_bn_act_training's kernels compiled for the CPU and run
(tests/emulation), forward and backward, against float64 autograd, and again under sanitizers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from emulation import dwconv_training
from emulation.emulator import EmulationError, emulator
from rulers import Problem, problem
from torch import Tensor
from training_rulers import (
    Training,
    assert_forward,
    assert_gradients,
    depthwise,
    forward,
    gradients,
)

from mnet_kernels.reference import ACTIVATIONS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
FAST_PATHS = [(3, 1), (3, 2), (5, 1), (5, 2)]


def gradient_of_output(p: Problem) -> Tensor:
    y = p.run("native")
    layout = torch.contiguous_format if p.x.is_contiguous() else torch.channels_last
    return torch.randn(y.shape).to(y.dtype).to(memory_format=layout)


def variants(t: Training, dy: Tensor, offset: int = 0) -> list[str]:
    """Each variant of the passes that sum and of dconv's that can run; dx's are the backward's."""
    able = [v.split(",") for v in dwconv_training.able(emulator(), t, dy, offset)]
    pairs = [v for v in able if v[0] == v[1] or (v[0] != "general" and v[1] == "one_pass")]
    return list({v[1]: ",".join(v) for v in pairs}.values())


def check(p: Problem, sanitizer: str = "", offset: int = 0) -> None:
    """Every variant that can run this problem computes it and its gradients and writes each output
    once."""
    t, program, dy = Training(p), emulator(sanitizer), gradient_of_output(p)
    for variant in variants(t, dy, offset):
        try:
            found, said = dwconv_training.forward(
                program, t, variant, count=not sanitizer, offset=offset
            )
            assert_forward(t, *found)
            grads, told = dwconv_training.backward(
                program, t, dy, *found[1:], variant, count=not sanitizer, offset=offset
            )
            assert_gradients(t, dy, grads)
        except (AssertionError, EmulationError) as error:
            raise AssertionError(f"{variant}: {error}") from error
        if sanitizer:
            continue
        for answer, names, tensors in (
            (said, ("y", "mean", "var"), found),
            (told, ("dx", "dweight", "dgamma", "dbeta"), grads),
        ):
            assert "outside" not in answer.traffic, f"{variant}: {answer.traffic}"
            for name, tensor in zip(names, tensors, strict=True):
                assert answer.traffic[name]["bytes"] == tensor.nbytes, (variant, name)


@every_dtype
@both_layouts
@pytest.mark.parametrize("kernel,stride", FAST_PATHS)
def test_fast_paths(dtype, channels_last, kernel, stride):
    for size in ((1, 2), (7, 9), (8, 13)):
        check(
            problem(
                (2, 12, *size), (kernel, kernel), dtype=dtype, channels_last=channels_last,
                stride=stride, padding=kernel // 2, activation="relu6",
            )
        )  # fmt: skip


@every_dtype
@both_layouts
@pytest.mark.parametrize("channels", (1, 3, 8, 34, 40, 72))
def test_channels_at_every_side_of_a_vector_and_of_a_block(dtype, channels_last, channels):
    check(problem((2, channels, 6, 5), dtype=dtype, channels_last=channels_last, padding=1))


@both_layouts
@pytest.mark.parametrize("padding", [0, (2, 0, 1, 3), "same", 6], ids=str)
@pytest.mark.parametrize("kernel,stride", [(3, 1), (3, 2), (5, 2)])
def test_padding(channels_last, kernel, stride, padding):
    check(
        problem(
            (1, 8, 9, 10), (kernel, kernel), channels_last=channels_last, stride=stride,
            padding=padding,
        )
    )  # fmt: skip


@both_layouts
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(channels_last, activation):
    p = problem(
        (2, 8, 6, 7), channels_last=channels_last, padding=1, activation=activation, slope=0.2
    )
    p.shift *= 4  # reach all branches
    check(p)


ANY = [
    ((1, 1), {}),
    ((7, 7), {"padding": 3, "stride": 2}),
    ((4, 4), {"stride": 4}),
    ((3, 3), {"stride": (1, 2), "padding": (2, 0)}),
    ((3, 3), {"dilation": 2, "padding": 2}),
    ((3, 5), {"dilation": (3, 2), "padding": (3, 4), "stride": (2, 3)}),
]


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kernel,constants", ANY, ids=str)
def test_any_kernel_stride_dilation_multiplier(dtype, channels_last, kernel, constants):
    for multiplier in (1, 3):
        check(
            problem(
                (2, 5, 11, 12), kernel, multiplier=multiplier, dtype=dtype,
                channels_last=channels_last, affine=multiplier == 1, **constants,
            )
        )  # fmt: skip


@both_layouts
@pytest.mark.parametrize("kernel,stride", [(3, 1), (5, 2)])
def test_many_chunks_add_up_and_twice_to_the_same_bits(channels_last, kernel, stride):
    p = problem(
        (4, 8, 30, 36), (kernel, kernel), channels_last=channels_last, padding="same", stride=stride
    )
    t, dy = Training(p), gradient_of_output(p)
    for variant in variants(t, dy):
        twice = []
        for _ in range(2):
            found, _ = dwconv_training.forward(emulator(), t, variant)
            grads, _ = dwconv_training.backward(emulator(), t, dy, *found[1:], variant)
            twice.append((*found, *grads))
        assert_forward(t, *found)
        assert_gradients(t, dy, grads)
        assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True)), variant


@both_layouts
def test_in_parts(channels_last):
    """What is not asked for is not written, and what is does not change."""
    for stride in (1, 2):
        p = problem((2, 8, 7, 9), channels_last=channels_last, padding=1, stride=stride)
        t, dy = Training(p), gradient_of_output(p)
        for variant in variants(t, dy):
            (_, *statistics), _ = dwconv_training.forward(emulator(), t, variant)
            call = (emulator(), t, dy, *statistics, variant)
            whole, _ = dwconv_training.backward(*call)
            data, _ = dwconv_training.backward(*call, sums=False)
            sums, _ = dwconv_training.backward(*call, data=False)
            assert torch.equal(data[0], whole[0]) and data[1:] == (None,) * 3
            assert sums[0] is None
            assert all(torch.equal(a, b) for a, b in zip(sums[1:], whole[1:], strict=True))


@every_dtype
@both_layouts
@pytest.mark.parametrize("offset", [2, 8, 18])
def test_misaligned_slices(dtype, channels_last, offset):
    if offset % dtype.itemsize:
        pytest.skip("not where an element can lie")
    p = problem((1, 16, 8, 8), dtype=dtype, channels_last=channels_last, padding=1)
    check(p, offset=offset)


def _off(mine: Tensor, exact: Tensor) -> Tensor:
    return (mine.double() - exact).norm() / exact.norm()


@both_layouts
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("mean", [0, 1e3, -1e3])
def test_statistics_of_a_mean_far_from_zero_are_as_good_as_natives(channels_last, mean, stride):
    """x of mean 1e3 and standard deviation 1e-2: sums of squares would have no digit left."""
    noise = 1e-2 * torch.randn(4, 48, 12, 13, dtype=torch.float64)
    x = (mean + noise).float()
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    weight = torch.rand(48, 1, 3, 3) + 0.5
    constants = {"stride": stride, "activation": "silu"}  # whose derivative has no jumps
    p = Problem(x, weight, torch.rand(48) + 0.5, torch.randn(48), constants)
    t, dy = Training(p), gradient_of_output(p)
    y, exact_mean, exact_var, _ = forward(t)
    running_mean, running_var = torch.zeros(48), torch.zeros(48)
    conv = depthwise(p, p.x, p.weight)
    F.batch_norm(conv, running_mean, running_var, training=True, momentum=1)
    values = conv.numel() // 48
    native = (forward(t, *p.tensors)[0], *gradients(t, dy, *p.tensors))
    for variant in variants(t, dy):
        (mine, *statistics), _ = dwconv_training.forward(emulator(), t, variant)
        mine = (mine, *dwconv_training.backward(emulator(), t, dy, *statistics, variant)[0])
        # The rounding of the convolution decides, and here, unlike on a GPU, products are rounded
        # before they are added. Where both sum in float32, so does the order of the terms.
        for ours, theirs, right in zip(mine, native, (y, *gradients(t, dy)), strict=True):
            assert _off(ours, right) <= 1.5 * _off(theirs, right) + 5e-7, variant
        for ours, theirs, right, unit in (
            (statistics[0], running_mean, exact_mean, exact_var.sqrt()),
            (statistics[1], running_var * (values - 1) / values, exact_var, exact_var),
        ):
            ours, theirs = (((v.double() - right) / unit).norm() for v in (ours, theirs))
            assert ours <= 1.5 * theirs + 1e-6, variant


@every_dtype
@both_layouts
@pytest.mark.parametrize("kernel,stride", [(3, 1), (5, 2)])
def test_no_worse_than_native(dtype, channels_last, kernel, stride):
    """Against float64, in the norm; native rounds the convolution, z, dz and dconv to the dtype."""
    p = problem(
        (2, 16, 13, 13), (kernel, kernel), dtype=dtype, channels_last=channels_last,
        padding="same", stride=stride, activation="relu6",
    )  # fmt: skip
    t, dy = Training(p), gradient_of_output(p)
    (y, mean, var), _ = dwconv_training.forward(emulator(), t)
    mine, _ = dwconv_training.backward(emulator(), t, dy, mean, var)
    exact = (forward(t)[0], *gradients(t, dy))
    native = (forward(t, *p.tensors)[0], *gradients(t, dy, *p.tensors))
    for ours, theirs, right in zip((y, *mine), native, exact, strict=True):
        assert _off(ours, right) <= 1.1 * _off(theirs, right) + 2e-7


# Real threads are slow, and all kernels meet in the same few functions.
@pytest.mark.parametrize("sanitizer,kernel,stride", [
    *(("address", *each) for each in (*FAST_PATHS, (2, 1))), ("thread", 3, 1), ("thread", 2, 1),
])  # fmt: skip
@both_layouts
def test_under_a_sanitizer(sanitizer, channels_last, kernel, stride):
    """Out-of-bounds and misaligned accesses, undefined arithmetic; races."""
    for dtype, channels in ((torch.float32, 3), (torch.bfloat16, 16)):
        for size in [(1, 2), (5, 6)] if sanitizer == "address" else [(5, 6)]:
            p = problem(
                (2, channels, *size), (kernel, kernel), dtype=dtype, channels_last=channels_last,
                stride=stride, padding=kernel // 2,
            )  # fmt: skip
            check(p, sanitizer)
