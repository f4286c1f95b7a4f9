"""Convolutions that go strip by strip: the same bits as one by one, and which they are."""

from __future__ import annotations

import random

import pytest
import torch
from networks import image, randomize
from test_sequences import Inverted, Tail, both_dtypes, one_by_one, unit
from torch import nn

from mnet_kernels.runs.pairs import runners
from mnet_kernels.runs.runner import OTHER
from mnet_kernels.swap import swap

plan = torch.ops.mnet_kernels.conv_sequence_plan.default
conv_sequence = torch.ops.mnet_kernels.conv_sequence.default


def strips(fast, x) -> list[int]:
    """How many stages each group of a model's only run has."""
    (runner,) = runners(fast)
    _, _, stages, constants = runner.latest
    together = plan(x, stages, constants, torch.get_num_threads())[::3]
    sizes, size = [], 1
    for goes_on in together:
        if goes_on:
            size += 1
        else:
            sizes.append(size)
            size = 1
    return sizes


def random_net(seed: int) -> nn.Sequential:
    """A stem, a wide layer, and then depthwise and dense convolutions of any geometry."""
    draw = random.Random(seed)

    def spatial(inputs, outputs, groups, largest):
        kernel = (draw.randint(1, largest), draw.randint(1, largest))
        dilation = (draw.randint(1, 2), draw.randint(1, 2))
        padding = tuple(
            draw.randint(0, d * (k - 1) + 1) for k, d in zip(kernel, dilation, strict=True)
        )
        stride = (draw.choice([1, 1, 2]), draw.choice([1, 1, 2]))
        return unit(inputs, outputs, kernel, groups, draw.choice([nn.ReLU6, nn.Hardswish, None]),
                    stride=stride, padding=padding, dilation=dilation)  # fmt: skip

    channels = draw.choice([9, 16])
    layers = [spatial(3, channels, 1, 4)]
    wide = draw.choice([160, 184])
    layers += [unit(channels, wide), spatial(wide, wide, wide, 3), unit(wide, 12)]
    for _ in range(draw.randint(0, 2)):
        layers += draw.choice([
            [spatial(12, 12, 12, 5)], [unit(12, 12)], [spatial(12, 12, 1, 3)], [Wide(12, 100)],
        ])  # fmt: skip
    return randomize(nn.Sequential(*layers, nn.AdaptiveAvgPool2d((2, 1)), Tail(24, 5)), seed)


class Wide(Inverted):
    """An inverted residual block that goes through so many channels."""

    def __init__(self, channels, wide):
        super().__init__()
        self.conv = nn.Sequential(
            unit(channels, wide), unit(wide, wide, 3, wide, padding=1),
            unit(wide, channels, act=None),
        )  # fmt: skip
        self.adds = True


def two_blocks(channels, wide):
    return swap(randomize(nn.Sequential(
        unit(3, channels, 3, stride=2, padding=1), Wide(channels, wide), Wide(channels, wide),
        nn.AdaptiveAvgPool2d((2, 1)), Tail(2 * channels, 5),
    )))  # fmt: skip


@pytest.mark.parametrize("seed", range(14))
@both_dtypes
def test_the_same_bits_as_one_by_one(seed, dtype):
    net = random_net(seed).to(dtype)
    fast = swap(net)
    size = (420, 100) if dtype == torch.bfloat16 else (300, 70)
    x = image(1, 3, *size).to(dtype)
    grouped = []
    for threads, batch in [(1, 1), (2, 1), (3, 2)]:
        torch.set_num_threads(threads)
        many = torch.cat([x * (i + 1) for i in range(batch)])
        with torch.no_grad():
            y = fast(many)
            assert torch.equal(y, fast(many.contiguous(memory_format=torch.channels_last)))
        assert torch.equal(y, one_by_one(fast, many))
        grouped.append(max(strips(fast, many)) > 2)
    assert any(grouped)


def test_a_sum_inside_a_strip():
    """The block's input stays in its window until it has been added."""
    fast = two_blocks(24, 144)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        x = image(1, 3, 190, 151)
        with torch.no_grad():
            assert torch.equal(fast(x), one_by_one(fast, x))
        assert strips(fast, x)[0] == 4


def test_what_is_read_after_the_strips_is_written_to_memory():
    """A sum with what lies between the first two of three large convolutions, after a mean."""
    rows = torch.tensor([
        [1, 16, 96, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, -1, 0],
        [0, 96, 96, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, 2048],
        [1, 96, 16, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, -1, 4096],
        [4, 16, 16, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, -1, 0],
        [5, 16, 16, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 3, 0],
        [1, 16, 96, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 8192],
    ])  # fmt: skip
    constants = image(12000)
    x = image(1, 16, 80, 75).contiguous(memory_format=torch.channels_last)
    values = [x]
    for row in rows[:3]:
        values.append(conv_sequence(values[-1], row[None], constants))
    gate = rows[3:5].clone()
    gate[1, OTHER] = 0
    scaled = conv_sequence(values[3], gate, constants)
    last = rows[5:].clone()
    last[0, OTHER] = -1
    expected = conv_sequence(scaled, last, constants) + values[1]
    assert torch.equal(conv_sequence(x, rows, constants), expected)
    assert plan(x, rows, constants, 1)[::3] == [0, 1, 0, 0, 0, 0]
    rows[5, OTHER] = -1
    assert plan(x, rows, constants, 1)[::3] == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@both_dtypes
def test_planes_are_read_as_they_are(channels, dtype):
    """A contiguous image of few channels is put together a strip at a time."""
    net = nn.Sequential(
        unit(channels, 20, 3, stride=2, padding=1), unit(20, 8), nn.AdaptiveAvgPool2d((2, 1)),
        Tail(16, 5),
    )  # fmt: skip
    fast = swap(randomize(net).to(dtype))
    for height, width in [(1, 1), (2, 7), (33, 21), (64, 130)]:
        x = image(3, channels, height, width).to(dtype)
        with torch.no_grad():
            y = fast(x)
        assert torch.equal(y, one_by_one(fast, x.contiguous(memory_format=torch.channels_last)))


def test_the_gain_is_there_for_large_results_only():
    fast = two_blocks(16, 96)
    torch.set_num_threads(1)
    with torch.no_grad():
        fast(image(1, 3, 64, 64))
        assert max(strips(fast, image(1, 3, 64, 64))) <= 2
        fast(image(1, 3, 224, 224))
        assert max(strips(fast, image(1, 3, 224, 224))) >= 4


def test_flat_asks_for_one_pixel():
    rows = torch.tensor([[1, 8, 4, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, -1, 0]])
    constants = image(999)
    y = conv_sequence(image(2, 8, 1, 1), rows, constants, True)
    assert y.shape == (2, 4)
    assert torch.equal(y, conv_sequence(image(2, 8, 1, 1), rows, constants).flatten(1))
    with pytest.raises(RuntimeError, match="conv_sequence: flat: expected a result of one pixel"):
        conv_sequence(image(2, 8, 4, 4), rows, constants, True)
