"""separable_conv's CUDA kernels, in emulation: every variant against float64 at the edges of its
tiles, chunks and vectors; under the sanitizers; and matrix instructions and asynchronous copies by
themselves, with the faults that must be found."""

from __future__ import annotations

import pytest
import torch
from emulation import separable as blocks
from emulation.emulator import EmulationError, emulator
from emulation.separable import Separable, separable

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


def check(s: Separable, sanitizer: str = "", offsets=None, only: str = "") -> list[str]:
    """Every variant that can run this call computes it, and writes each output once."""
    program = emulator(sanitizer)
    variants = [only] if only else blocks.able(program, s)
    for variant in variants:
        try:
            y, answer = blocks.run(program, s, variant, count=not sanitizer, offsets=offsets)
            s.assert_correct(y)
        except (AssertionError, EmulationError) as error:
            raise AssertionError(f"{variant}: {error}") from error
        if not sanitizer:
            assert answer.traffic["y"]["bytes"] == y.nbytes, variant
            assert "outside" not in answer.traffic, f"{variant}: {answer.traffic}"
    return variants


# Shape, outputs, kernel, constants: pixels at both sides of a tile, images that share one; middle
# and output channels at both sides of a vector, an instruction, a chunk and a tile of channels.
CASES = [
    ((1, 8, 1, 1), 8, (3, 3), {"padding": 1}),
    ((2, 16, 9, 11), 24, (3, 3), {"padding": 1, "residual": True}),
    ((3, 72, 7, 7), 40, (3, 3), {"padding": 1, "dw_activation": "relu6"}),
    ((1, 64, 8, 17), 136, (3, 3), {"padding": 1, "pw_activation": "identity"}),
    ((1, 24, 16, 16), 64, (3, 3), {"padding": "same", "stride": 2, "residual": True}),
    ((2, 136, 5, 5), 32, (3, 3), {"padding": 1, "affine": False}),
    ((1, 264, 6, 4), 8, (3, 3), {"padding": (0, 1, 2, 0)}),
    ((1, 16, 9, 7), 17, (3, 3), {"padding": 2, "dilation": 2, "residual": True}),
    ((1, 32, 10, 11), 16, (5, 5), {"padding": 2}),
    ((2, 8, 11, 12), 24, (5, 5), {"padding": "same", "stride": 2}),
    ((1, 16, 5, 6), 8, (1, 1), {}),
    ((1, 7, 9, 10), 13, (3, 3), {"padding": 1, "residual": True}),
    ((1, 5, 6, 7), 9, (2, 3), {"padding": (1, 2), "multiplier": 3, "stride": (2, 1)}),
]


@every_product
@pytest.mark.parametrize("shape,outputs,kernel,constants", CASES, ids=str)
def test_edges(dtype, tf32, shape, outputs, kernel, constants):
    variants = check(separable(shape, outputs, kernel, dtype=dtype, tf32=tf32, **constants))
    assert variants == blocks.names(emulator())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    s = separable(
        (1, 16, 6, 7), 16, padding=1, dtype=torch.bfloat16, dw_activation=activation,
        pw_activation=activation, slope=0.2,
    )  # fmt: skip
    s.depthwise.shift *= 4  # reach all branches
    s.pw_shift *= 4
    check(s)


@both_sizes
@pytest.mark.parametrize("name", ["x", "dw_weight", "dw_scale", "pw_weight", "residual", "y"])
def test_misaligned_tensors(dtype, name):
    """Wide accesses step aside for one tensor that starts anywhere."""
    s = separable((1, 16, 6, 6), 24, padding=1, dtype=dtype, residual=True)
    for variant in ("resident_64", "resident_16"):
        check(s, offsets={name: 4}, only=variant)


def test_one_hot_inputs_find_every_index_error():
    """One pixel of one channel is 1 and weights are whole numbers: every output is exact."""
    for c, h, w in [(0, 0, 0), (16, 6, 8), (5, 3, 8), (19, 0, 4)]:
        s = separable((1, 20, 7, 9), 40, padding=1, stride=2, affine=False)
        p = s.depthwise
        p.weight.copy_((torch.arange(20 * 9) + 1.0).view(20, 1, 3, 3))
        s.pw_weight.copy_((torch.arange(40 * 20) % 64 + 1.0).view(40, 20, 1, 1))
        p.x.zero_()
        p.x[0, c, h, w] = 1
        exact, _ = s.reference()
        for variant in blocks.names(emulator()):
            assert torch.equal(blocks.run(emulator(), s, variant)[0].double(), exact), variant


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_nan_and_inf_stay_where_they_are(dtype):
    """Not a number at one pixel reaches that window's outputs and no other; a middle beyond
    float16's range is infinite, as native's is."""
    s = separable((1, 8, 9, 9), 16, dtype=dtype, affine=False, pw_activation="identity")
    s.depthwise.x[0, 3, 4, 4] = float("nan")
    s.depthwise.x[0, :, 0, 0] = 60000
    s.depthwise.weight.copy_(torch.full((8, 1, 3, 3), 2.0))
    s.pw_weight.fill_(1)
    middle = s.depthwise.run("native")
    expected = torch.nn.functional.conv2d(middle.double(), s.pw_weight.double())
    for variant in blocks.names(emulator()):
        y, _ = blocks.run(emulator(), s, variant)
        assert torch.equal(y.isnan(), expected.isnan()), variant
        assert torch.equal(y.isinf(), expected.to(dtype).isinf()), variant


@both_sizes
def test_splits_between_blocks(dtype):
    """Few pixels: the tiles of output channels are shared out, not always evenly."""
    s = separable((1, 40, 3, 3), 300, padding=1, dtype=dtype, residual=True)
    for multiprocessors in (1, 2, 4, 1000):
        for variant in blocks.names(emulator()):
            y, _ = blocks.run(emulator(), s, variant, multiprocessors=multiprocessors)
            s.assert_correct(y)


def test_shared_memory_decides_what_can_run():
    """The stream takes any number of channels, the others what fits."""
    s = separable((1, 1536, 2, 2), 8, padding=1, dtype=torch.bfloat16)
    assert blocks.able(emulator(), s) == ["resident_16", "stream_64"]
    assert blocks.able(emulator(), s, shared_limit=99 << 10) == ["stream_64"]
    check(s)
    with pytest.raises(EmulationError, match="variant resident_128 cannot run this call"):
        blocks.run(emulator(), s, "resident_128")


@pytest.mark.parametrize(
    "shape,outputs,chosen",
    [
        ((256, 32, 112, 112), 64, "resident_64"),
        ((256, 512, 14, 14), 512, "resident_128"),
        ((256, 1024, 7, 7), 1024, "resident_64"),
        ((32, 512, 14, 14), 512, "resident_64"),
        ((32, 1024, 7, 7), 1024, "resident_64"),
        ((1, 32, 112, 112), 64, "resident_64"),
        ((1, 512, 14, 14), 512, "resident_16"),
        ((1, 1024, 7, 7), 1024, "resident_16"),
        ((256, 2048, 7, 7), 2048, "stream_64"),
    ],
    ids=str,
)
def test_the_choice(shape, outputs, chosen):
    """A heuristic by shape; nothing of the tensors is needed."""
    c = shape[1]
    meta = {"dtype": torch.bfloat16, "device": "meta"}
    x = torch.empty(shape, **meta).to(memory_format=torch.channels_last)
    p = blocks.Problem(x, torch.empty(c, 1, 3, 3, **meta), None, None, {"padding": 1})
    s = Separable(p, torch.empty(outputs, c, 1, 1, **meta), None, None)
    assert emulator().run("separable_choose", numbers=blocks.numbers(s)).text == chosen


def test_more_than_2_to_31_elements():
    """Some blocks from all over tensors of 2.25e9 elements: no address lies outside of them."""
    shape = (2800, 1024, 28, 28)
    meta = {"dtype": torch.bfloat16, "device": "meta"}
    x = torch.empty(shape, **meta).to(memory_format=torch.channels_last)
    p = blocks.Problem(x, torch.empty(1024, 1, 3, 3, **meta), None, None, {"padding": 1})
    s = Separable(p, torch.empty(1024, 1024, 1, 1, **meta), None, None)
    scratch = {
        "x": x.nbytes, "y": x.nbytes, "dw_weight": p.weight.nbytes, "pw_weight": s.pw_weight.nbytes
    }  # fmt: skip
    answer = emulator().run(
        "separable", "resident_64",
        numbers=blocks.numbers(s, multiprocessors=10**6) | {"sample": 3, "images": 1},
        scratch=scratch, count=True,
    )  # fmt: skip
    assert answer.traffic["x"]["bytes"] > 0
    assert "outside" not in answer.traffic


def test_padding_and_dilation_beyond_32_bits():
    """The scalar way with 64-bit indices: of three rows of taps only one meets the input."""
    s = separable((2, 3, 4, 5), 8, dilation=(2**30, 1), padding=(2**30, 1))
    y, _ = blocks.run(emulator(), s, "resident_64")
    p = s.depthwise
    middle = blocks.Problem(p.x, p.weight[:, :, 1:2], p.scale, p.shift, {"padding": (0, 1)})
    Separable(middle, s.pw_weight, s.pw_scale, s.pw_shift).assert_correct(y)


@pytest.mark.parametrize("variant", ["resident_64", "resident_16", "stream_64", "resident_128"])
def test_memory_traffic(variant):
    """Whole sectors of x and y, no bank conflict, weights once a block, a small halo."""
    s = separable((1, 64, 16, 16), 64, padding=1, dtype=torch.bfloat16)
    _, answer = blocks.run(emulator(), s, variant, count=True)
    traffic = answer.traffic
    assert traffic["shared"]["wavefronts"] == traffic["shared"]["least_wavefronts"]
    for name in ("x", "y", "pw_weight"):
        assert traffic[name]["sectors"] == traffic[name]["least_sectors"], name
    tiles = {"resident_128": 2, "resident_16": 16}.get(variant, 4)
    assert traffic["pw_weight"]["bytes"] == tiles * s.pw_weight.nbytes
    # A nearly square tile and its halo; resident_16 also reads x for each of its two splits.
    past_l1 = 32 * traffic["x"]["block_sectors"] / s.depthwise.x.nbytes
    assert past_l1 <= {"resident_128": 1.15, "resident_16": 3.8}.get(variant, 1.3)


# ---- sanitizers ----
SANITIZED = [
    ((2, 16, 5, 6), 24, (3, 3), {"padding": 1, "residual": True}),
    ((1, 72, 7, 7), 8, (3, 3), {"padding": 1, "stride": 2}),
    ((1, 16, 6, 5), 8, (5, 5), {"padding": 2}),
    ((1, 7, 5, 6), 9, (3, 3), {"padding": 1, "multiplier": 2, "residual": True}),
]


@both_sizes
@pytest.mark.parametrize("shape,outputs,kernel,constants", SANITIZED, ids=str)
def test_under_address_sanitizer(dtype, shape, outputs, kernel, constants):
    check(separable(shape, outputs, kernel, dtype=dtype, margin=0, **constants), "address")


@pytest.mark.parametrize("variant", ["resident_64", "resident_16", "stream_64", "resident_128"])
def test_under_thread_sanitizer(variant):
    """Several chunks and, where few multiprocessors are said to be there, several tiles a block:
    every stage of weights and slot of the middle is used again."""
    middle, outputs = (264, 40) if variant == "resident_16" else (136, 136)
    s = separable((1, middle, 2, 4), outputs, padding=1, dtype=torch.bfloat16)
    y, _ = blocks.run(emulator("thread"), s, variant, multiprocessors=1)
    s.assert_correct(y)


# ---- the building blocks alone ----
def product(variant: str, sanitizer: str = "", rows: int = 0) -> None:
    dtype = torch.float16 if variant == "float16" else torch.bfloat16
    a, b = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype)
    y = torch.empty(2, 16, 8)
    emulator(sanitizer).run(
        "product", variant, numbers={"rows": rows}, inputs={"a": a, "b": b}, outputs={"y": y}
    )
    b[8 - rows :] = 0
    expected = (a.double() @ b.double().T).float()
    torch.testing.assert_close(y, expected.expand(2, 16, 8), rtol=0, atol=0)


@pytest.mark.parametrize("sanitizer", ["", "address", "thread"])
@pytest.mark.parametrize("rows", [0, 3])
def test_a_matrix_instruction(sanitizer, rows):
    """By its definition; what is not copied is zeros."""
    product("bfloat16", sanitizer, rows)
    product("float16", sanitizer, rows)


def test_a_matrix_instruction_of_tf32():
    """Exactly the product of factors that were rounded to 10 bits, ties away from zero."""
    a, b = torch.randn(16, 8), torch.randn(8, 8)
    a[0, :4] = torch.tensor([1 + 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-23, 2 - 2**-23])
    b[0, :4] = 1
    y = torch.empty(2, 16, 8)
    emulator().run(
        "product", "tf32", numbers={"rows": 0}, inputs={"a": a, "b": b}, outputs={"y": y}
    )

    def rounded(t):
        return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()

    assert rounded(a)[0, :4].tolist() == [1 + 2**-10, -1 - 2**-10, 1, 2]
    expected = (rounded(a) @ rounded(b).T).float()
    torch.testing.assert_close(y, expected.expand(2, 16, 8), rtol=0, atol=0)
    with pytest.raises(EmulationError, match="not rounded to TF32"):
        emulator().run(
            "product", "not_rounded", numbers={"rows": 0}, inputs={"a": a, "b": b},
            outputs={"y": y},
        )  # fmt: skip


@pytest.mark.parametrize("variant", ["missing_wait", "missing_commit"])
def test_data_that_was_not_waited_for_is_not_there(variant):
    with pytest.raises(AssertionError, match="Mismatched"):
        product(variant)


def test_a_missing_barrier_after_the_wait_is_a_race():
    with pytest.raises(EmulationError, match="data race"):
        product("missing_barrier", "thread")


def test_half_a_warp_is_refused():
    with pytest.raises(EmulationError, match="without all 32 lanes"):
        product("half_warp")
