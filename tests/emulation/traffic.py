"""Counted memory traffic of every forward variant on MobileNet V1's layers, batch 256, and of the
passes over x of backward and training, batch 64, one_pass's 256.

``python tests/emulation/traffic.py`` (with tests/ on PYTHONPATH) renews the committed table,
traffic.csv. Its columns, each a ratio of which 1 is the least:

    requested  bytes of x that threads ask for, against x's size: what the L1 cache serves
    past_l1    32-byte sectors of x, each counted once a block, against x's size: what reaches the
               L2 cache. Neighbouring blocks run together, so the memory itself sees about 1.
    x_sectors, y_sectors   sectors that warps' requests touch, against those that would hold their
               bytes: 1 where whole sectors are used; y's with dy's and dconv's (0: none of them)
    tensors    32-byte sectors past L1 of x, y, dy, dconv and dx, in tensors of y's size
    others     sectors of weight, per-channel values and partial sums past L1, against x's size
               (least: near 0)
    conflicts  wavefronts of shared memory against those without bank conflicts (0: none used)
    ways       the worst bank conflict of one request (0: no shared memory used)
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from emulation import dwconv
from emulation.emulator import Emulator, emulator
from rulers import Problem

TABLE = Path(__file__).with_suffix(".csv")
SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes" / "mobilenet_v1.csv"
KEYS = ("layout", "dtype", "c", "h", "w", "kernel", "stride", "variant", "chosen")
RATIOS = (
    "requested", "past_l1", "x_sectors", "y_sectors", "tensors", "others", "conflicts", "ways",
)  # fmt: skip
BATCH = 256
PASSES = ("frozen", "statistics", "reduction", "through")
PASSES_BATCH = 64
ONE_PASSES = ("frozen", "through")  # of channels_last 3x3 kernels
BLOCKS = 48  # counted of those that fill one image
DTYPES = (torch.float32, torch.bfloat16)  # float16 moves as bfloat16 does

Row = dict[str, str | float]


def layers() -> list[tuple[int, ...]]:
    """(channels, height, width, kernel, stride) of each layer."""
    with open(SHAPES) as lines:
        return [tuple(map(int, line.split(",")))[:5] for line in lines if line[0] != "#"]


def count(
    program: Emulator, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> list[Row]:
    """A row for every variant that can run this layer."""
    c, h, w, kernel, stride = shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(BATCH, c, h, w, dtype=dtype, device="meta").to(memory_format=layout)
    weight = torch.empty(c, 1, kernel, kernel, dtype=dtype, device="meta")
    affine = torch.empty(c, device="meta")
    constants = {"stride": stride, "padding": "same", "activation": "relu6"}
    numbers = dwconv.sizes(Problem(x, weight, affine, affine, constants))
    outputs = c * int(numbers["OH"] * numbers["OW"])
    scratch = {
        "x": x.nbytes, "weight": weight.nbytes, "scale": affine.nbytes, "shift": affine.nbytes,
        "y": BATCH * outputs * dtype.itemsize,
    }  # fmt: skip
    able = program.run("dwconv_able", numbers=numbers, scratch=scratch).text.split()
    chosen = program.run("dwconv_choose", numbers=numbers, scratch=scratch).text
    rows = []
    for variant in able:
        counted = program.run(
            "dwconv", variant, numbers=numbers | {"sample": BLOCKS, "images": BATCH},
            scratch=scratch, count=True,
        ).traffic  # fmt: skip
        x_, y, shared = counted["x"], counted["y"], counted["shared"]
        # x's bytes that belong to the outputs that the counted blocks wrote.
        least = c * h * w * dtype.itemsize * y["bytes"] / (outputs * dtype.itemsize)
        others = sum(counted[name]["block_sectors"] for name in ("weight", "scale", "shift"))
        rows.append({
            "layout": "nhwc" if channels_last else "nchw",
            "dtype": str(dtype).removeprefix("torch."),
            **dict(zip(KEYS[2:7], map(str, shape), strict=True)),
            "variant": variant, "chosen": "yes" if variant == chosen else "",
            "requested": x_["bytes"] / least,
            "past_l1": 32 * x_["block_sectors"] / least,
            "x_sectors": x_["sectors"] / x_["least_sectors"],
            "y_sectors": y["sectors"] / y["least_sectors"],
            "tensors": 32 * (x_["block_sectors"] + y["block_sectors"]) / y["bytes"],
            "others": 32 * others / least,
            "conflicts": shared["wavefronts"] / max(1, shared["least_wavefronts"]),
            "ways": shared["worst_conflict"],
        })  # fmt: skip
    return rows


def count_pass(
    program: Emulator, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, name: str,
    one_pass: bool = False,
) -> Row:  # fmt: skip
    """A row for one pass over x: of the stream, or of one_pass, whose row blocks are those of a
    large batch."""
    c, h, w, kernel, stride = shape
    batch = BATCH if one_pass else PASSES_BATCH
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(batch, c, h, w, dtype=dtype, device="meta").to(memory_format=layout)
    weight = torch.empty(c, 1, kernel, kernel, dtype=dtype, device="meta")
    constants = {"stride": stride, "padding": "same", "activation": "relu6"}
    numbers = dwconv.sizes(Problem(x, weight, None, None, constants)) | {"eps": 1e-5}
    outputs = int(numbers["OH"] * numbers["OW"])
    chunks = 2048  # at least as many as there are
    channel = ("gamma", "beta", "mean", "var", "scale", "by_conv", "constant")
    scratch = {
        "x": x.nbytes, "weight": weight.nbytes, **dict.fromkeys(channel, 4 * c),
        "dconv": batch * c * outputs * dtype.itemsize,
        "partials": 4 * chunks * (kernel**2 + 2) * c,
    }  # fmt: skip
    if name != "statistics":
        scratch["dy"] = scratch["dconv"]
    if one_pass:
        scratch["dx"] = scratch["x"]
        del scratch["dconv"]
    moments = torch.empty(chunks, 4, c)
    counted = program.run(
        "dwconv_training_pass", f"{name},{'one_pass' if one_pass else 'stream'}", scratch=scratch,
        outputs={"moments": moments}, count=True, numbers=numbers | {"sample": 1, "images": batch},
    ).traffic  # fmt: skip
    shared, nothing = counted.pop("shared"), {"sectors": 0, "least_sectors": 0, "block_sectors": 0}
    assert "outside" not in counted
    x_, ys = counted.pop("x"), [counted.pop(y, nothing) for y in ("dy", "dconv", "dx")]
    if name == "statistics":
        values = moments[:, 0].nansum().item()
    else:
        # Of dy, some rows or columns of which two blocks of one_pass ask for.
        values = ys[0]["bytes"] / dtype.itemsize
        if one_pass:
            values = ys[2]["bytes"] / dtype.itemsize * outputs / (h * w)
    least = h * w * dtype.itemsize * values / outputs
    return {
        "layout": "nhwc" if channels_last else "nchw",
        "dtype": str(dtype).removeprefix("torch."),
        **dict(zip(KEYS[2:7], map(str, shape), strict=True)),
        "variant": f"{'one_pass' if one_pass else 'backward'}_{name}",
        "chosen": "" if channels_last and name in ONE_PASSES and not one_pass else "yes",
        "requested": x_["bytes"] / least,
        "past_l1": 32 * x_["block_sectors"] / least,
        "x_sectors": x_["sectors"] / x_["least_sectors"],
        "y_sectors": sum(y["sectors"] for y in ys) / max(1, sum(y["least_sectors"] for y in ys)),
        "tensors": 32 * sum(t["block_sectors"] for t in (x_, *ys)) / (values * dtype.itemsize),
        "others": 32 * sum(other["block_sectors"] for other in counted.values()) / least,
        "conflicts": shared["wavefronts"] / max(1, shared["least_wavefronts"]),
        "ways": shared["worst_conflict"],
    }  # fmt: skip


def table() -> list[Row]:
    program, rows = emulator(), []
    for channels_last in (True, False):
        for dtype in DTYPES:
            for shape in layers():
                rows += count(program, shape, dtype, channels_last)
                rows += [count_pass(program, shape, dtype, channels_last, p) for p in PASSES]
                if channels_last:
                    rows += [count_pass(program, shape, dtype, True, p, True) for p in ONE_PASSES]
    return rows


def committed() -> list[Row]:
    with open(TABLE, newline="") as lines:
        return [row | {k: float(row[k]) for k in RATIOS} for row in csv.DictReader(lines)]


if __name__ == "__main__":
    with open(TABLE, "w", newline="") as lines:
        writer = csv.DictWriter(lines, KEYS + RATIOS, lineterminator="\n")
        writer.writeheader()
        for row in table():
            writer.writerow(row | {k: f"{row[k]:.3f}" for k in RATIOS})
