"""The CUDA kernels' machine code, which needs no GPU: no spills, wide accesses, enough in flight.

The committed table (machine_code.csv) is what nvcc made of the sources that it was renewed with.
What has changed since is compiled, judged by the same rules, and held against it; after a change
that is meant, ``python tests/machine_code.py`` renews it.
"""

from __future__ import annotations

import re
from dataclasses import replace

import machine_code
import pytest
import sass

#: What keeps an H200's memory busy: 4.3 TB/s for 700 ns, over 132 multiprocessors, and some more.
WANTED_IN_FLIGHT = 32 << 10
SIZES = {"float": 4, "float16": 2, "bfloat16": 2}
#: Compiled though the table has them: every operator, element and architecture once.
SAMPLE = [
    ("conv_bfloat16", 100), ("separable_tf32", 80), ("dwconv_float32", 90),
    ("dwconv_backward_float16", 80), ("dwconv_training_bfloat16", 90),
    ("dwconv_training_channels", 100),
]  # fmt: skip


@pytest.fixture(scope="module")
def kernels() -> list[machine_code.Kernel]:
    try:
        machine_code.nvcc(), machine_code.cuobjdump()
    except machine_code.Unavailable as why:
        pytest.skip(str(why))
    return machine_code.measured()


def test_nothing_is_in_local_memory(kernels):
    spilling = [k for k in kernels if k.local or k.local_accesses]
    assert not spilling, spilling


def test_accesses_are_as_wide_as_the_vectors(kernels):
    """channels_last_*<Element, kernel, stride, V, ...> moves V channels at a time."""
    pattern = r"dwconv_channels_last_\w+<(\w+), \d+, \d+, (\d+)"
    vectorised = [(k, m) for k in kernels if (m := re.match(pattern, k.name))]
    assert vectorised
    assert any(k.store_bytes == 16 for k, _ in vectorised)
    for kernel, match in vectorised:
        claimed = SIZES[match[1]] * int(match[2])
        assert kernel.store_bytes == claimed, kernel
        assert kernel.load_bytes >= claimed, kernel


def test_passes_over_x_load_as_wide_as_their_vectors(kernels):
    """dwconv_training_stream<Element, kernel, stride, V, ...>, and the backward's of that form."""
    pattern = r"dwconv_(training|backward)_stream<(\w+), \d+, \d+, (\d+)"
    vectorised = [(k, m) for k in kernels if (m := re.match(pattern, k.name))]
    assert {m[1] for _, m in vectorised} == {"training", "backward"}
    assert any(k.load_bytes == 16 for k, m in vectorised if m[1] == "training")
    for kernel, match in vectorised:
        assert kernel.load_bytes >= SIZES[match[2]] * int(match[3]), kernel


def test_one_pass_copies_beside_its_arithmetic(kernels):
    """dwconv_backward_one_pass<Element, stride, Through, Activations>: x, x past the last strip and
    dy by asynchronous copies; two blocks of 256 threads a multiprocessor where activations are
    clamps, as far as registers go."""
    found = [k for k in kernels if k.name.startswith("dwconv_backward_one_pass<")]
    assert len(found) == 3 * 2 * 2 * 2 * len(machine_code.ARCHITECTURES)
    for kernel in found:
        assert kernel.copies >= 3, kernel
        if "(Activations)0" in kernel.name:
            held = machine_code.blocks_per_sm(kernel.architecture, 256, kernel.registers, 0)
            assert held >= 2, kernel


def test_separable_conv_is_on_the_tensor_cores(kernels):
    """Matrix instructions fed by matrix loads for 16-bit elements and TF32, plain multiply-adds for
    float32; weights by asynchronous copies, x by loads and y by stores of 16 bytes."""
    found = [k for k in kernels if k.name.startswith("separable_conv_kernel<")]
    assert len(found) == 4 * 4 * len(machine_code.ARCHITECTURES)
    for kernel in found:
        tensor_cores = "<float," not in kernel.name
        assert (kernel.products > 0) == (kernel.product_loads > 0) == tensor_cores, kernel
        assert kernel.copies > 0, kernel
        assert kernel.load_bytes == kernel.store_bytes == 16, kernel


def test_conv_bn_act_is_on_the_tensor_cores(kernels):
    """Likewise; x comes by asynchronous copies too, element by element where its channels are few,
    and y goes by stores of 16 bytes."""
    found = [k for k in kernels if k.name.startswith("conv_bn_act_kernel<")]
    assert len(found) == 4 * 3 * len(machine_code.ARCHITECTURES)
    for kernel in found:
        tensor_cores = "<float," not in kernel.name
        assert (kernel.products > 0) == (kernel.product_loads > 0) == tensor_cores, kernel
        # Of x's rows, of its vectors, of weights.
        assert kernel.copies >= 3, kernel
        assert kernel.store_bytes == 16, kernel


def test_small_blocks_of_conv_bn_act_are_many(kernels):
    """tile_64 waits for memory: several blocks a multiprocessor make up for it."""
    found = [k for k in kernels if "ConvTile64" in k.name and k.architecture >= 90]
    assert found and all(k.blocks_per_sm >= 4 for k in found), found


def test_enough_bytes_are_in_flight(kernels):
    """The 3x3 kernels that move 16 bytes at a time, and those of training, on sm_90."""
    fast = [
        k for k in kernels
        if k.architecture == 90
        and ((re.match(r"dwconv_channels_last_\w+<\w+, 3,", k.name) and k.store_bytes == 16)
             or re.match(r"dwconv_contiguous_stream<\w+, 3,", k.name)
             or re.match(r"dwconv_(training|backward)_stream<\w+, 3, \d, [48],", k.name))
    ]  # fmt: skip
    assert fast
    assert not [k for k in fast if k.bytes_in_flight < WANTED_IN_FLIGHT]


@pytest.fixture
def table() -> machine_code.Table:
    table = machine_code.committed()
    if table.nvcc != machine_code.nvcc_version():
        pytest.skip(f"the table is of nvcc {table.nvcc}, here is {machine_code.nvcc_version()}")
    return table


@pytest.mark.parametrize("source,architecture", SAMPLE)
def test_the_table_says_what_nvcc_does(kernels, table, source, architecture):
    path = machine_code.ROOT / f"csrc/cuda/{source}.cu"
    if not table.says(path):
        pytest.skip(f"{source}.cu has changed: all of it is compiled here")
    known = {k for k in table.kernels(path) if k.architecture == architecture}
    assert known and set(machine_code.kernels(path, architecture)) == known


def test_what_has_changed_is_compiled(kernels, table, monkeypatch):
    """And what has not is not."""
    changed, *others = machine_code.SOURCES
    codes = table.codes | {changed.stem: "of an older text"}
    asked = []
    monkeypatch.setattr(machine_code, "committed", lambda: replace(table, codes=codes))
    monkeypatch.setattr(machine_code, "kernels", lambda *job: asked.append(job) or [])
    machine_code.measured()
    assert {(changed, a) for a in machine_code.ARCHITECTURES} <= set(asked)
    assert not {(s, a) for s, a in asked if s in others and table.says(s)}


@pytest.mark.parametrize("architecture", machine_code.ARCHITECTURES)
def test_no_kernel_is_worse_than_committed(kernels, table, architecture):
    committed = table.of(architecture)
    here = {k.name: k for k in kernels if k.architecture == architecture}
    assert here.keys() == committed.keys(), "renew the table: python tests/machine_code.py"
    worse = []
    for name, kernel in here.items():
        for key in ("blocks_per_sm", "load_bytes", "store_bytes", "bytes_in_flight"):
            now, then = getattr(kernel, key), committed[name][key]
            if now < (0.95 * then if key == "bytes_in_flight" else then):
                worse.append(f"{name}: {key} {then} -> {now}")
    assert not worse, "\n".join(worse)


# ---- the ruler itself ----
@pytest.mark.parametrize(
    "architecture,threads,registers,shared,blocks",
    [
        (90, 128, 32, 0, 16), (90, 128, 255, 0, 2), (90, 256, 40, 0, 6), (80, 1024, 64, 0, 1),
        (80, 64, 16, 0, 32), (90, 128, 32, 100 << 10, 2), (80, 128, 32, 100 << 10, 1),
        (90, 32, 32, 0, 32), (90, 96, 128, 0, 5),
    ],
)  # fmt: skip
def test_occupancy(architecture, threads, registers, shared, blocks):
    """Values of NVIDIA's occupancy calculator."""
    assert machine_code.blocks_per_sm(architecture, threads, registers, shared) == blocks


def test_a_loop_is_followed_wherever_its_parts_are():
    """A switch in a loop, a case of which lies in front of it: no branch leads back over it."""
    code = [
        (0x00, "LDG.E.128", "R0, [R20.64]"), (0x10, "BRA", "0x50"),
        (0x20, "LDG.E.128", "R4, [R20.64]"), (0x30, "LDG.E.128", "R8, [R20.64+0x10]"),
        (0x40, "BRA", "0x70"),
        (0x50, "BRX", "R44 -0x60"),
        (0x60, "MOV", "R4, RZ"),
        (0x70, "FADD", "R30, R4, R8"), (0x80, "BRA", "@P0 0x50"), (0x90, "EXIT", ""),
    ]  # fmt: skip
    assert sass.loads_in_flight(code) == 32
    # What lies between the two ends of a branch back without being led to is no part of it.
    code[1:5] = [(0x10, "BRA", "0x50"), (0x20, "NOP", ""), (0x30, "NOP", ""), (0x40, "EXIT", "")]
    code[6] = (0x60, "LDG.E.64", "R4, [R22.64]")
    assert sass.loads_in_flight(code) == 8


def test_planted_faults_are_seen(kernels, tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text("""
        __global__ void __launch_bounds__(64) local(const float* x, float* y, int j) {
          float a[200];
          for (int k = 0; k < 200; ++k) a[k] = x[k];
          y[0] = a[j];
        }
        __global__ void __launch_bounds__(64) one_by_one(const float4* x, float4* y, int n) {
          for (int i = 0; i < n; ++i) y[i * 64 + threadIdx.x] = x[i * 64 + threadIdx.x];
        }
        __global__ void __launch_bounds__(64) four_at_once(const float4* x, float4* y, int n) {
          float4 v[4];
          for (int k = 0; k < 4; ++k) v[k] = x[k * n + threadIdx.x];
          for (int k = 0; k < 4; ++k) y[k * n + threadIdx.x] = v[k];
        }
        __global__ void __launch_bounds__(64) narrow(const float* x, float* y) {
          y[threadIdx.x] = x[threadIdx.x];
        }
    """)
    found = {k.name: k for k in machine_code.kernels(source, 90)}
    assert found["local"].local >= 800 and found["local"].local_accesses > 0
    assert found["four_at_once"].loads_in_flight == 64
    assert found["four_at_once"].load_bytes == found["four_at_once"].store_bytes == 16
    assert found["narrow"].store_bytes == 4
    assert found["narrow"].local == 0
