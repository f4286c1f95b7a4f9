"""The paper model of mnet_kernels/gpu_cost.py says what its docstring says."""

from __future__ import annotations

import pytest

from mnet_kernels.gpu_cost import GPUS, separable_seconds

#: channels, height and width, stride, outputs: MobileNet V1's blocks.
BLOCKS = [
    (32, 112, 1, 64), (64, 112, 2, 128), (128, 56, 1, 128), (128, 56, 2, 256), (256, 28, 1, 256),
    (256, 28, 2, 512), (512, 14, 1, 512), (512, 14, 2, 1024), (1024, 7, 1, 1024),
]  # fmt: skip


def arguments(block: tuple[int, ...], batch: int) -> tuple[int, int, int, int]:
    channels, size, stride, outputs = block
    return batch * (size // stride) ** 2, batch * size**2, channels, outputs


def pays(block: tuple[int, ...], batch: int, element_bytes: int, capability: int, **more) -> bool:
    one, two = separable_seconds(*arguments(block, batch), element_bytes, GPUS[capability], **more)
    return one <= two


@pytest.mark.parametrize("capability", [8, 9])
def test_small_batches_and_large_planes_pay(capability):
    assert all(pays(block, 1, 2, capability) for block in BLOCKS)
    assert all(pays(block, 256, 2, capability) for block in BLOCKS[:6])


def test_wide_products_do_not_where_a_library_multiplies_faster():
    """9.0's library has instructions (wgmma) twice as fast as ours; 8.0's has not."""
    assert not pays(BLOCKS[6], 256, 2, 9)
    assert not pays(BLOCKS[8], 256, 2, 9)
    assert pays(BLOCKS[6], 256, 2, 8)


def test_copies_into_another_layout_do_not_pay():
    assert not any(pays(block, 256, 2, 9, copied=True) for block in BLOCKS)


def test_tf32_makes_both_faster_and_more_taps_the_depthwise_half_slower():
    wide = BLOCKS[8]
    assert pays(wide, 256, 4, 9) and not pays(wide, 256, 4, 9, tf32=True)
    for block in BLOCKS:
        plain, fast = (
            separable_seconds(*arguments(block, 256), 4, GPUS[9], tf32=tf32)
            for tf32 in (False, True)
        )
        assert fast[0] <= plain[0] and fast[1] <= plain[1]
    assert all(pays(block, 256, 4, 9, tf32=True) for block in BLOCKS[:4])
    few, many = (
        separable_seconds(*arguments(BLOCKS[0], 256), 4, GPUS[9], taps=n)[0] for n in (9, 49)
    )
    assert many > 2 * few


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_no_pass_is_faster_than_its_bytes_and_its_start(element_bytes):
    for gpu in GPUS.values():
        for block in BLOCKS:
            for batch in (1, 32, 256):
                pixels, inputs, channels, outputs = arguments(block, batch)
                one, two = separable_seconds(pixels, inputs, channels, outputs, element_bytes, gpu)
                nbytes = element_bytes * (inputs * channels + pixels * outputs)
                assert one >= max(nbytes / gpu.bytes_per_s, gpu.launch_s)
                assert two >= max(nbytes / gpu.bytes_per_s, 2 * gpu.launch_s)
