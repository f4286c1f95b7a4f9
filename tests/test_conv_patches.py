"""conv_patches, which makes a 1x1 convolution of a first one, against torch's unfold."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from mnet_kernels import conv_training as module
from mnet_kernels.conv_training import conv_patches

LAST = torch.channels_last


def expected(x, weight, stride, padding):
    top, left, bottom, right = padding
    x = F.pad(x, (left, right, top, bottom)).permute(0, 2, 3, 1)
    for axis, size, step in zip((1, 2), weight.shape[2:], stride, strict=True):
        x = x.unfold(axis, size, step)
    return x.permute(0, 1, 2, 4, 5, 3).flatten(3).permute(0, 3, 1, 2)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("seed", range(8))
def test_bit_for_bit(seed):
    """Any kernel, stride and padding, one thread's share next to another's."""
    draw = random.Random(seed)
    torch.set_num_threads(1 + seed % 3)
    for _ in range(60):
        c, kh, kw, h, w = (draw.randint(1, n) for n in (4, 5, 17, 20, 20))
        stride = draw.randint(1, 4), draw.randint(1, 4)
        padding = tuple(draw.randint(0, 3) for _ in range(4))
        h, w = max(h, kh - padding[0] - padding[2]), max(w, kw - padding[1] - padding[3])
        x = torch.randn(draw.randint(1, 3), c, h, w)
        x = x.to(memory_format=draw.choice([LAST, torch.contiguous_format]))
        weight = torch.empty(5, c, kh, kw)
        got = conv_patches(x, weight, stride, padding)
        assert got.is_contiguous(memory_format=LAST)
        assert torch.equal(got, expected(x, weight, stride, padding)), (x.shape, weight.shape)


def test_padding_wider_than_the_kernel():
    x, weight = torch.randn(1, 3, 2, 2), torch.empty(4, 3, 2, 2)
    for padding in ((5, 5, 5, 5), (0, 7, 0, 0), (4, 0, 0, 6)):
        got = conv_patches(x, weight, (1, 1), padding)
        assert torch.equal(got, expected(x, weight, (1, 1), padding))


def test_empty_batch():
    assert conv_patches(
        torch.randn(0, 3, 8, 8), torch.empty(4, 3, 3, 3), (2, 2), (0, 0, 1, 1)
    ).shape == (0, 27, 4, 4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
def test_opcheck(layout):
    x = torch.randn(2, 3, 9, 8).to(memory_format=layout)
    opcheck(module._patches, (x, torch.empty(4, 3, 3, 2), (2, 1), (0, 1, 1, 0)))


@pytest.mark.parametrize(
    "x,weight,sentence",
    [
        (torch.randn(3, 8, 8), (4, 3, 3, 3), r"x: expected 4 dimensions .*shape \(3, 8, 8\)"),
        (torch.randn(2, 3, 8, 8).double(), (4, 3, 3, 3), "weight: expected x's dtype float64"),
        (torch.randn(2, 3, 8, 8), (4, 2, 3, 3), r"weight: expected shape \(C_out, 3, Kh, Kw\)"),
        (torch.randn(2, 3, 2, 2), (4, 3, 3, 3), "x: expected .* kernel"),
    ],
    ids=["dim", "dtype", "channels", "small"],
)
def test_bad_input(x, weight, sentence):
    with pytest.raises(RuntimeError, match="^conv_patches: " + sentence) as caught:
        conv_patches(x, torch.empty(weight), (1, 1), (0, 0, 0, 0))
    assert "\n" not in str(caught.value)
