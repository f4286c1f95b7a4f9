"""The paper model of mnet_kernels/separable_cost.py says what its docstring says."""

from __future__ import annotations

import pytest

from mnet_kernels.separable_cost import GPUS, pays, seconds

#: channels, height and width, stride, outputs: MobileNet V1's blocks.
BLOCKS = [
    (32, 112, 1, 64), (64, 112, 2, 128), (128, 56, 1, 128), (128, 56, 2, 256), (256, 28, 1, 256),
    (256, 28, 2, 512), (512, 14, 1, 512), (512, 14, 2, 1024), (1024, 7, 1, 1024),
]  # fmt: skip


def arguments(block: tuple[int, ...], batch: int) -> tuple[int, int, int, int]:
    channels, size, stride, outputs = block
    return batch * (size // stride) ** 2, batch * size**2, channels, outputs


@pytest.mark.parametrize("capability", [8, 9, 12])
def test_small_batches_and_large_planes_pay(capability):
    assert all(pays(*arguments(block, 1), 2, capability) for block in BLOCKS)
    assert all(pays(*arguments(block, 256), 2, capability) for block in BLOCKS[:6])


def test_wide_products_do_not_where_a_library_multiplies_faster():
    """9.0's library has instructions (wgmma) twice as fast as ours; 8.0's has not."""
    assert not pays(*arguments(BLOCKS[6], 256), 2, 9)
    assert not pays(*arguments(BLOCKS[8], 256), 2, 9)
    assert pays(*arguments(BLOCKS[6], 256), 2, 8)


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_no_pass_is_faster_than_its_bytes_and_its_start(element_bytes):
    for gpu in GPUS.values():
        for block in BLOCKS:
            for batch in (1, 32, 256):
                pixels, inputs, channels, outputs = arguments(block, batch)
                one, two = seconds(pixels, inputs, channels, outputs, element_bytes, gpu)
                nbytes = element_bytes * (inputs * channels + pixels * outputs)
                assert one >= max(nbytes / gpu.bytes_per_s, gpu.launch_s)
                assert two >= max(nbytes / gpu.bytes_per_s, 2 * gpu.launch_s)
