"""The CUDA backward in one pass over memory (csrc/cuda/dwconv_backward_one_pass.cuh), without a
GPU: what its own ways of sharing out work must not change. Small planes, padding, channels and
activations: with all variants, in test_cuda_emulation_backward.py and _training.py."""

from __future__ import annotations

import machine_code
import pytest
import torch
from emulation import dwconv_backward, dwconv_training, traffic
from emulation.emulator import emulator
from gradient_rulers import assert_gradients
from rulers import Problem, problem
from torch import Tensor
from training_rulers import Training
from training_rulers import assert_gradients as assert_training_gradients

FROZEN, TRAINING = "one_pass,one_pass", "stream,one_pass,one_pass"
strides = pytest.mark.parametrize("stride", [1, 2])


def gradient_of_output(p: Problem) -> Tensor:
    y = p.run("native")
    return torch.randn(y.shape).to(y.dtype).to(memory_format=torch.channels_last)


def check(shape: tuple[int, ...], stride: int, dtype=torch.float32, sanitizer: str = "", **more):
    """Frozen and through the batch's statistics, each written once and twice to the same bits."""
    constants = {"padding": 1, "activation": "relu6"} | more
    p = problem(shape, dtype=dtype, channels_last=True, stride=stride, **constants)
    dy, program, count = gradient_of_output(p), emulator(sanitizer), not sanitizer
    t = Training(p)
    (_, *statistics), _ = dwconv_training.forward(program, t, "stream,stream,general")

    def frozen():
        return dwconv_backward.run(program, p, dy, FROZEN, count=count)

    def through():
        return dwconv_training.backward(program, t, dy, *statistics, TRAINING, count=count)

    for run, right in ((frozen, lambda g: assert_gradients(p, dy, g)),
                       (through, lambda g: assert_training_gradients(t, dy, g))):  # fmt: skip
        found, said = run()
        right(found)
        if sanitizer:
            continue
        assert "outside" not in said.traffic and "dconv" not in said.traffic
        assert said.traffic["dx"]["bytes"] == p.x.nbytes
        again, _ = run()
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@strides
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_several_tiles(stride, dtype):
    """Of more than 32 strips: two tiles, three; at their ends dconv is computed twice."""
    for width in (129, 250):
        check((1, 8, 4, width * stride), stride, dtype)


@strides
def test_several_row_blocks(stride):
    """Where blocks are few: at their ends rows of dconv are computed twice, and added once."""
    for height in (57, 130):
        check((1, 8, height * stride, 5), stride)
    check((1, 8, 58 * stride, 4), stride, padding=(3, 0, 2, 1))


@strides
def test_images_side_by_side_and_in_turns(stride):
    """Blocks of several small images and more than one turn, the last ones of which are missing."""
    check((32 * 600 - 7, 4, 2, 1), stride)
    check((40 * 6 + 1, 24, 3, 9), stride, torch.float16)


@strides
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_under_a_sanitizer(sanitizer, stride):
    """Out of bounds, of shared memory too; races of the ring and of the copies."""
    if sanitizer == "thread":
        return check((3, 24, 4, 5), stride, torch.bfloat16, sanitizer)
    check((1, 8, 3, 130 * stride), stride, sanitizer=sanitizer)
    check((1, 8, 57 * stride, 2), stride, torch.bfloat16, sanitizer)
    check((35, 24, 3, 3), stride, torch.bfloat16, sanitizer)


def layer(batch: int, shape: tuple[int, ...], dtype, layout=torch.channels_last) -> Problem:
    c, h, w, kernel, stride = shape
    x = torch.empty(batch, c, h, w, dtype=dtype, device="meta").to(memory_format=layout)
    weight = torch.empty(c, 1, kernel, kernel, dtype=dtype, device="meta")
    return Problem(x, weight, None, None, {"stride": stride, "padding": kernel // 2})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_multiprocessor_has_two_blocks_and_enough_on_its_way(dtype):
    """By shared memory; by registers: test_cuda_machine_code.py. The goal is its."""
    for shape in traffic.layers():
        for batch in (32, 256):
            threads, shared, blocks, coming = dwconv_backward.one_pass(
                emulator(), layer(batch, shape, dtype)
            )
            assert blocks >= 2 * 120, (shape, batch, blocks)  # of an H100's 132 multiprocessors
            held = machine_code.blocks_per_sm(90, threads, 128, shared)
            assert held >= 2 and held * coming >= 32 << 10, (shape, batch, held, coming)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_chosen_where_it_fills_the_machine(dtype):
    def chosen(*call):
        return dwconv_backward.chosen(emulator(), layer(call[0], call[1], dtype, *call[2:]))

    for shape in traffic.layers():
        for batch in (32, 256):
            assert chosen(batch, shape) == FROZEN, (batch, shape)
        # Not where a few blocks would walk alone, nor where it cannot run.
        assert "one_pass" not in chosen(1, (16, *shape[1:]))
        assert "one_pass" not in chosen(256, shape, torch.contiguous_format)
        assert "one_pass" not in chosen(256, (shape[0] + 2, *shape[1:]))
        assert "one_pass" not in chosen(256, (*shape[:3], 5, shape[4]))
