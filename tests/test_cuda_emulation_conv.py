"""conv_bn_act's CUDA kernels, in emulation: every variant against float64 at the edges of its
tiles, chunks and vectors, with every way to gather patches; and under the sanitizers."""

from __future__ import annotations

import pytest
import torch
from emulation import conv as convs
from emulation.conv import Conv, assert_correct, conv
from emulation.emulator import EmulationError, emulator

from mnet_kernels.reference import ACTIVATIONS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: What the tensors hold, and whether products are TF32's.
every_product = pytest.mark.parametrize(
    "dtype,tf32", [*((d, False) for d in DTYPES), (torch.float32, True)],
    ids=["float32", "float16", "bfloat16", "tf32"],
)  # fmt: skip
#: Elements of either size; float16 and bfloat16 differ in conversion and instruction only.
both_sizes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


def check(p: Conv, sanitizer: str = "", offsets=None, only: str = "", **device: int) -> None:
    """Every variant that can run this call computes it, and writes each output once."""
    program = emulator(sanitizer)
    variants = [only] if only else convs.able(program, p, **device)
    assert variants
    for variant in variants:
        try:
            y, answer = convs.run(
                program, p, variant, count=not sanitizer, offsets=offsets, **device
            )
            assert_correct(p, y)
        except (AssertionError, EmulationError) as error:
            raise AssertionError(f"{variant}: {error}") from error
        if not sanitizer:
            assert answer.traffic["y"]["bytes"] == y.nbytes, variant
            assert "outside" not in answer.traffic, f"{variant}: {answer.traffic}"


# Shape, outputs, kernel, constants: pixels at both sides of a tile, images that share one; depth
# and output channels at both sides of a vector, an instruction, a chunk and a tile of channels.
CASES = [
    # Rows: 1x1 with whole vectors.
    ((1, 8, 1, 1), 8, (1, 1), {}),
    ((2, 16, 9, 11), 24, (1, 1), {"activation": "relu6"}),
    ((3, 72, 7, 7), 40, (1, 1), {}),
    ((1, 136, 5, 5), 136, (1, 1), {"activation": "identity"}),
    ((1, 264, 4, 4), 17, (1, 1), {"affine": False}),
    # Vectors: any kernel, each vector in one tap.
    ((1, 16, 9, 9), 24, (1, 1), {"stride": 2}),
    ((1, 8, 7, 7), 8, (1, 1), {"padding": (1, 0, 0, 2)}),
    ((2, 24, 8, 7), 40, (3, 3), {"stride": 2, "padding": (0, 0, 1, 1)}),
    ((1, 8, 9, 8), 16, (5, 5), {"padding": 4, "dilation": 2}),
    ((1, 16, 6, 9), 8, (2, 3), {"padding": (1, 2), "stride": (2, 1), "dilation": (1, 3)}),
    # Elements: few or odd channels, the stem's among them.
    ((2, 3, 17, 15), 32, (3, 3), {"stride": 2, "padding": (0, 0, 1, 1)}),
    ((1, 3, 8, 8), 13, (3, 3), {"padding": 1, "activation": "hardswish"}),
    ((1, 7, 9, 10), 9, (5, 5), {"padding": 4, "dilation": (1, 2)}),
    ((1, 1, 5, 4), 1, (1, 1), {}),
    ((1, 20, 6, 6), 72, (1, 1), {"stride": 2}),
    ((2, 75, 3, 5), 8, (1, 1), {}),
]  # fmt: skip


@every_product
@pytest.mark.parametrize("shape,outputs,kernel,constants", CASES, ids=str)
def test_edges(dtype, tf32, shape, outputs, kernel, constants):
    p = conv(shape, outputs, kernel, dtype=dtype, tf32=tf32, **constants)
    assert convs.able(emulator(), p) == convs.names(emulator())
    check(p)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    p = conv((1, 16, 6, 7), 16, dtype=torch.bfloat16, activation=activation, slope=0.2)
    p.shift *= 4  # reach all branches
    check(p)


@both_sizes
@pytest.mark.parametrize("name", ["x", "weight", "scale", "y"])
def test_misaligned_tensors(dtype, name):
    """Wide accesses step aside for one tensor that starts anywhere."""
    check(conv((1, 16, 6, 6), 24, (3, 3), dtype=dtype, padding=1), offsets={name: 4})


@both_sizes
def test_blocks_with_many_tiles(dtype):
    """Few multiprocessors: each block goes over tiles of pixels, with weights that stay (one chunk,
    several) or, where shared memory is small, pass by again for each of them."""
    for channels, kernel, limit, multiprocessors in [
        (16, (1, 1), 227, 2), (40, (3, 3), 227, 1), (40, (3, 3), 100, 1)
    ]:  # fmt: skip
        p = conv((2, channels, 9, 9), 70, kernel, dtype=dtype, stride=(1, 2))
        check(p, multiprocessors=multiprocessors, shared_limit=limit << 10)


def test_one_hot_inputs_find_every_index_error():
    """One pixel of one channel is 1 and weights are whole numbers: every output is exact."""
    for channels in (20, 3):
        for c, h, w in [(0, 0, 0), (channels - 1, 6, 8), (1, 3, 8), (channels - 1, 0, 4)]:
            p = conv((1, channels, 7, 9), 40, (3, 3), padding=1, stride=2, affine=False)
            p.weight.copy_((torch.arange(40 * channels * 9) % 251 + 1.0).view(p.weight.shape))
            p.x.zero_()
            p.x[0, c, h, w] = 1
            exact = Conv(*p.tensors, p.constants).run("native")
            for variant in convs.names(emulator()):
                assert torch.equal(convs.run(emulator(), p, variant)[0], exact), variant


@pytest.mark.parametrize("channels", [8, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "tf32"])
def test_nan_and_inf_stay_where_they_are(channels, dtype):
    """Not a number at one pixel reaches that window's outputs and no other."""
    p = conv((1, channels, 9, 9), 16, (3, 3), dtype=dtype, affine=False, padding=1)
    p.tf32 = dtype == torch.float32
    p.x[0, 1, 4, 4] = float("nan")
    p.x[0, :, 0, 0] = torch.finfo(dtype).max
    p.weight.fill_(2)
    expected = p.run("native")
    for variant in convs.names(emulator()):
        y, _ = convs.run(emulator(), p, variant)
        assert torch.equal(y.isnan(), expected.isnan()), variant
        assert torch.equal(y.isinf(), expected.isinf()), variant


@pytest.mark.parametrize(
    "shape,outputs,kernel,chosen",
    [
        ((256, 3, 224, 224), 32, 3, "tile_64"),
        ((1, 3, 224, 224), 32, 3, "tile_64"),
        ((256, 16, 112, 112), 96, 1, "tile_64"),
        ((1, 24, 56, 56), 144, 1, "tile_64"),
        ((1, 64, 14, 14), 384, 1, "tile_16"),
        ((1, 320, 7, 7), 1280, 1, "tile_16"),
        ((256, 160, 7, 7), 960, 1, "tile_128"),
        ((256, 320, 7, 7), 1280, 1, "tile_128"),
        ((256, 1024, 1, 1), 1000, 1, "tile_16"),
        ((32, 512, 14, 14), 512, 1, "tile_128"),
    ],
    ids=str,
)
def test_the_choice(shape, outputs, kernel, chosen):
    """A heuristic by shape; nothing of the tensors is needed."""
    p = on_paper(shape, outputs, kernel)
    assert emulator().run("conv_choose", numbers=convs.numbers(p)).text == chosen


def on_paper(shape, outputs, kernel=1) -> Conv:
    meta = {"dtype": torch.bfloat16, "device": "meta"}
    x = torch.empty(shape, **meta).to(memory_format=torch.channels_last)
    weight = torch.empty(outputs, shape[1], kernel, kernel, **meta)
    stride = 2 if shape[1] == 3 else 1
    return Conv(x, weight, None, None, {"padding": kernel // 2, "stride": stride})


@pytest.mark.parametrize("kernel,channels", [(1, 1024), (3, 128)])
def test_more_than_2_to_31_elements(kernel, channels):
    """Some blocks from all over tensors of 2.25e9 elements: no address lies outside of them."""
    p = on_paper((2800 * 1024 // channels, channels, 28, 28), channels, kernel)
    scratch = {"x": p.x.nbytes, "y": p.x.nbytes, "weight": p.weight.nbytes}
    answer = emulator().run(
        "conv", "tile_64", scratch=scratch, count=True,
        numbers=convs.numbers(p, multiprocessors=10**6) | {"sample": 2, "images": 1},
    )  # fmt: skip
    assert answer.traffic["x"]["bytes"] > 0
    assert "outside" not in answer.traffic


def test_what_does_not_fit_32_bits_is_refused():
    p = conv((1, 8, 4, 5), 8, (3, 3), dilation=(2**30, 1), padding=(2**30, 1))
    with pytest.raises(EmulationError, match="variant tile_64 cannot run this call"):
        convs.run(emulator(), p, "tile_64")


@pytest.mark.parametrize("variant", ["tile_128", "tile_64", "tile_16"])
@pytest.mark.parametrize("shape,outputs", [((1, 16, 16, 16), 96), ((2, 64, 8, 8), 384)], ids=str)
def test_memory_traffic_of_expansions(variant, shape, outputs):
    """Whole sectors, no bank conflict; x once for each tile of output channels, a block's weights
    once however many tiles of pixels it has."""
    p = conv(shape, outputs, dtype=torch.bfloat16)
    _, answer = convs.run(emulator(), p, variant, count=True, multiprocessors=2)
    traffic = answer.traffic
    assert traffic["shared"]["wavefronts"] == traffic["shared"]["least_wavefronts"]
    for name in ("x", "y", "weight"):
        assert traffic[name]["sectors"] == traffic[name]["least_sectors"], name
    tile = int(variant.removeprefix("tile_"))
    channels = {128: 128, 64: 64, 16: 32}[tile]
    tiles = -(-outputs // channels)
    assert traffic["x"]["bytes"] == tiles * p.x.nbytes
    blocks = answer.traffic["weight"]["bytes"] / p.weight.nbytes
    assert blocks <= max(1, 10 // tiles)


@pytest.mark.parametrize("variant", ["tile_128", "tile_64"])
def test_memory_traffic_of_the_stem(variant):
    """The image once, and its halo; whole sectors of y."""
    p = conv((1, 3, 64, 64), 32, (3, 3), dtype=torch.bfloat16, stride=2, padding=(0, 0, 1, 1))
    _, answer = convs.run(emulator(), p, variant, count=True)
    assert answer.traffic["y"]["sectors"] == answer.traffic["y"]["least_sectors"]
    assert 32 * answer.traffic["x"]["block_sectors"] <= 1.6 * p.x.nbytes


# ---- sanitizers ----
SANITIZED = [
    ((2, 16, 5, 6), 24, (1, 1), {}),
    ((1, 72, 3, 7), 9, (1, 1), {}),
    ((1, 8, 6, 5), 8, (3, 3), {"stride": 2, "padding": (0, 0, 1, 1)}),
    ((1, 3, 7, 6), 32, (3, 3), {"stride": 2, "padding": 1}),
]


@both_sizes
@pytest.mark.parametrize("shape,outputs,kernel,constants", SANITIZED, ids=str)
def test_under_address_sanitizer(dtype, shape, outputs, kernel, constants):
    check(conv(shape, outputs, kernel, dtype=dtype, margin=0, **constants), "address")


@pytest.mark.parametrize("variant", ["tile_64", "tile_16", "tile_128"])
@pytest.mark.parametrize("channels,kernel", [(16, (3, 3)), (3, (3, 3)), (520, (1, 1))], ids=str)
def test_under_thread_sanitizer(variant, channels, kernel):
    """One block for several tiles of pixels: every stage and window is used again, and weights that
    stay, or those that pass by."""
    pixels = {"tile_64": 9, "tile_16": 5, "tile_128": 13}[variant]
    p = conv((2, channels, pixels, 10), 8, kernel, dtype=torch.bfloat16, padding=kernel[0] // 2)
    check(p, "thread", only=variant, multiprocessors=1)
