"""Compiles the Triton kernels for GPUs that need not be there, and reads what came out.

``python tests/triton_machine_code.py`` compiles every configuration that some layer of a MobileNet
may be given, for every target, and renews the committed table (triton_machine_code.csv): of the
kernels whose code has changed, or of all for another Triton (an hour of one core).
``few`` prints the facts of one case a kernel and layout as JSON.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mnet_kernels.triton import (
    conv_bn_act,
    dwconv_bn_act,
    dwconv_bn_act_backward,
    dwconv_bn_act_training,
    dwconv_bn_act_training_backward,
    separable_conv,
    tuning,
)

#: Kernel, configurations to choose from, pointers that are None.
KERNELS = {
    "forward": (dwconv_bn_act._forward, tuning.FORWARD, ["mean_ptr"]),
    "backward_conv": (
        dwconv_bn_act_backward._backward_conv, tuning.CONV,
        ["mean_ptr", "linear_ptr", "constant_ptr"],
    ),
    "backward_data": (dwconv_bn_act_backward._backward_data, tuning.DATA, []),
    "backward_weight": (dwconv_bn_act_backward._backward_weight, tuning.WEIGHT, []),
}  # fmt: skip
TRAINING = {
    "statistics": (dwconv_bn_act_training._statistics, tuning.CONV, []),
    "training_forward": (dwconv_bn_act._forward, tuning.FORWARD, []),
    "training_sums": (
        dwconv_bn_act_backward._backward_conv, tuning.CONV,
        ["linear_ptr", "constant_ptr", "dconv_ptr"],
    ),
    "training_conv": (dwconv_bn_act_backward._backward_conv, tuning.CONV, ["partial_ptr"]),
}  # fmt: skip
#: Of vectors of one number a channel: nothing to choose.
MERGES = {
    "merge_statistics": (dwconv_bn_act_training._merge_statistics, None, []),
    "merge_gradients": (dwconv_bn_act_training_backward._merge_gradients, None, []),
}
#: As many output channels as input channels.
SEPARABLE = {"separable_conv": (separable_conv._separable, tuning.SEPARABLE, ["residual_ptr"])}
#: As many output channels as input channels; 32 of a picture's three.
DENSE = {"conv_bn_act": (conv_bn_act._conv, tuning.DENSE, [])}
ALL = KERNELS | TRAINING | MERGES | SEPARABLE | DENSE
#: Pointers to x's dtype; the others are to float32.
TENSORS = ("x_ptr", "w_ptr", "pw_ptr", "y_ptr", "dy_ptr", "dx_ptr", "dconv_ptr")
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
TABLE = Path(__file__).with_suffix(".csv")
COLUMNS = (
    "registers", "stack", "shared", "matrix", "loads", "wide_loads", "stores", "wide_stores",
)  # fmt: skip
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Case:
    """One kernel for one layer ("same" padding) and one target."""

    kernel: str
    target: str = "sm_90"
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = True
    channels: int = 64
    size: int = 56
    taps: int = 3
    stride: int = 1
    precision: str = "tf32"  # of float32 products
    choice: int = -1  # among the configurations that fit; the last is the largest
    affine: bool = True  # otherwise neither scale nor shift

    def __str__(self) -> str:
        layout = "nhwc" if self.channels_last else "nchw"
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"{self.channels}x{self.size}-k{self.taps}s{self.stride}"
        if self.kernel in SEPARABLE | DENSE and self.dtype == torch.float32:
            dtype = self.precision
        config = self.configurations()[self.choice]
        blocks = "x".join(map(str, config.kwargs.values()))
        name = f"{self.kernel}-{self.target}-{dtype}-{layout}-{shape}-{blocks}-w{config.num_warps}"
        return name if self.affine else f"{name}-bare"

    def shape(self) -> dict:
        k, s = self.taps, self.stride
        out = -(-self.size // s)
        unrolled = k * k <= 49
        shape = {
            "H": self.size, "W": self.size, "OH": out, "OW": out, "C": self.channels, "M": 1,
            "KH": k, "KW": k, "SH": s, "SW": s, "DH": 1, "DW": 1, "TOP": k // 2, "LEFT": k // 2,
            "CHANNELS_LAST": self.channels_last, "UNROLL": unrolled, "WIDE": False,
            "ACTIVATION": "relu6", "TAP_ROWS": 3 if k == 3 else 1, "TAP_COLS": min(k, 8),
            "K": 32 if self.channels == 3 else self.channels,
            "DW_ACTIVATION": "relu6", "PW_ACTIVATION": "relu6",
            "PRECISION": self.precision, "PADDED": k > 1,
        }  # fmt: skip
        if self.kernel in DENSE:
            return shape | tuning.dense(out if k > 1 else out * out, self.dtype.itemsize, **shape)
        return shape | tuning.block(self.channels, self.dtype.itemsize, self.channels_last)

    def configurations(self) -> list:
        kind = ALL[self.kernel][1]
        if kind is None:
            return [triton.Config({"MERGED": dwconv_bn_act_training.MERGED}, num_warps=4)]
        if kind is tuning.SEPARABLE:
            return tuning.prune_separable(self.dtype.itemsize, self.shape())
        if kind is tuning.DENSE:
            return tuning.prune_dense(self.dtype.itemsize, self.shape())
        return tuning.prune(kind, self.dtype.itemsize, self.shape())

    def patch(self) -> str:
        return str(self.configurations()[self.choice])


def function(kernel: str) -> triton.JITFunction:
    fn = ALL[kernel][0]
    return fn if kernel in MERGES else fn.fn  # without its tuner


def code(kernel: str) -> str:
    """A digest of a kernel and of the functions that it calls, without comments, and of how its
    threads are shared out."""
    parts, seen, waiting = [inspect.getsource(tuning.block)], set(), [function(kernel)]
    while waiting:
        fn = waiting.pop()
        if fn.fn in seen:
            continue
        seen.add(fn.fn)
        tree = ast.parse(fn.src)
        if ast.get_docstring(tree.body[0]) is not None:
            del tree.body[0].body[0]
        parts.append(ast.dump(tree))
        names = sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)})
        used = [fn.fn.__globals__.get(name) for name in names]
        waiting += [value for value in used if isinstance(value, triton.JITFunction)]
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:12]


def facts(case: Case) -> dict:
    """Registers, bytes of stack, and how the kernel reaches memory."""
    fn, missing = function(case.kernel), ALL[case.kernel][2]
    if not case.affine:
        missing = [*missing, "scale_ptr", "shift_ptr"]
    config = case.configurations()[case.choice]
    constants = {
        name: value for name, value in (case.shape() | config.kwargs).items()
        if name in fn.arg_names and name not in ("H", "W", "OH", "OW")
    } | dict.fromkeys(missing)  # fmt: skip
    signature, attributes = {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = TYPES[case.dtype] if name in TENSORS else "*fp32"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in ("slope", "eps") else "i32"
    source = ASTSource(fn, signature, constexprs=constants, attrs=attributes)
    target = TARGETS[case.target]
    warps = config.num_warps * 32 // target.warp_size  # tuning.py counts in the GPU at hand
    stages = 2 if target.backend == "hip" and case.kernel in DENSE else config.num_stages
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=target, options=options)
    found = {"case": str(case), "config": config.kwargs, "shared": compiled.metadata.shared}
    if case.target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        # Scalar registers are spilled to lanes of vector registers, not to memory.
        spilled = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", text)
        return found | {
            "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", text).group(1)),
            "stack": sum(map(int, spilled)),
            "matrix": len(re.findall(r"\bv_mfma", text)),
            "loads": len(re.findall(r"(?:buffer|global)_load_", text)),
            "wide_loads": len(re.findall(r"(?:buffer|global)_load_dwordx4", text)),
            "stores": len(re.findall(r"(?:buffer|global)_store_", text)),
            "wide_stores": len(re.findall(r"(?:buffer|global)_store_dwordx4", text)),
        }
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        report = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    return found | {
        "registers": int(re.search(r"REG:(\d+)", report).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", report).group(1))
        + len(re.findall(r"\b(?:ld|st)\.local", ptx)),
        "matrix": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx)),
        "loads": len(re.findall(r"\b(?:ld\.global|cp\.async\.c[ag]\.)", ptx)),
        "wide_loads": len(re.findall(r"\b(?:ld\.global\.v4\.b32|cp\.async\.cg\.)", ptx)),
        "stores": len(re.findall(r"\bst\.global", ptx)),
        "wide_stores": len(re.findall(r"\bst\.global\.v4\.b32", ptx)),
    }


FEW = [Case(kernel, channels_last=last) for kernel in KERNELS for last in (True, False)]
#: Dense convolutions without scale and shift, whose narrow loads would hide others: pointwise,
#: several taps, several taps in a block of depth.
BARE = [
    Case("conv_bn_act", target, dtype, last, *layer, choice=choice, affine=False)
    for target, dtype, last, *layer, choice in [
        ("sm_90", torch.bfloat16, True, 256, 14, 1, -1),
        ("gfx942", torch.bfloat16, True, 256, 14, 1, -1),
        ("sm_80", torch.bfloat16, True, 128, 28, 3, -1),
        ("sm_90", torch.float32, True, 128, 28, 3, -1),
        ("sm_90", torch.bfloat16, True, 24, 28, 3, 0),
        ("gfx942", torch.float32, True, 24, 28, 3, 0),
        ("sm_100", torch.float32, True, 64, 56, 1, -1),
        # Hopper's matrix units take TF32 with channels side by side: contiguous is turned in 4s.
        ("sm_80", torch.float32, False, 64, 56, 1, -1),
        ("sm_90", torch.bfloat16, False, 64, 56, 1, -1),
    ]
]
#: What no MobileNet has or asks for: kernels that are not unrolled, float16, TensorFloat-32.
OTHERS = [
    *FEW,
    *(Case(case.kernel, target, channels_last=case.channels_last)
      for case in FEW for target in ("sm_80", "sm_100")),
    *(Case("forward", choice=choice) for choice in (0, 1)),
    *(Case(k, channels_last=False, stride=2) for k in KERNELS),
    *(Case(k, channels_last=last, taps=9, size=14) for k in KERNELS for last in (True, False)),
    *(Case(k, dtype=torch.float16, channels=24, size=28) for k in KERNELS),
    *(Case(k, target, torch.float32, True, 512, 14) for k in SEPARABLE for target in TARGETS),
]  # fmt: skip

#: (channels, size): what MobileNets have, and sizes of few divisors.
SHAPES = [
    (32, 112), (64, 112), (128, 56), (256, 28), (512, 14), (1024, 7), (24, 28), (16, 6), (8, 33),
]  # fmt: skip
#: (channels, size, taps, stride) of dense convolutions: the stem, a block of depth of several taps
#: and of one, pointwise ones for every number of output channels that makes a difference.
DENSE_SHAPES = [
    (3, 224, 3, 2), (24, 28, 3, 1), (128, 28, 3, 1),
    *((channels, 14, 1, 1) for channels in (256, 128, 64, 32, 16)),
]  # fmt: skip
KERNEL_SIZES = [(taps, stride) for taps in (7, 5, 3) for stride in (1, 2)]


def every_configuration() -> list[Case]:
    """What autotuning may choose on the SHAPES: each patch for every target. In channels_last,
    where patches are paid for in registers, with the largest kernel that may have it, and for sm_90
    with every size and stride of kernel; in contiguous with the smallest. And some others."""
    found = {}
    for last, kernel, dtype in product(
        (True, False), KERNELS | TRAINING, (torch.bfloat16, torch.float32)
    ):
        cases = [
            replace(case, choice=choice)
            for (taps, stride), (channels, size) in product(KERNEL_SIZES, SHAPES)
            for case in [Case(kernel, "sm_90", dtype, last, channels, size, taps, stride)]
            for choice in range(len(case.configurations()))
        ]
        for case, target in product(cases if last else cases[::-1], TARGETS):
            sizes = (case.taps, case.stride) if last and target == "sm_90" else ()
            key = (kernel, last, dtype, case.patch(), target, *sizes)
            found.setdefault(key, replace(case, target=target))
    for kernel, last, dtype, channels in product(
        SEPARABLE, (True, False), (torch.bfloat16, torch.float32), (32, 64, 128, 256)
    ):
        case = Case(kernel, "sm_90", dtype, last, channels, 14, precision="ieee")
        for choice in range(len(case.configurations())):
            for target in TARGETS:
                chosen = replace(case, choice=choice, target=target)
                found.setdefault((kernel, last, dtype, chosen.patch(), target), chosen)
    for kernel, last, dtype, layer in product(
        DENSE, (True, False), (torch.bfloat16, torch.float32), DENSE_SHAPES
    ):
        case = Case(kernel, "sm_90", dtype, last, *layer, precision="ieee")
        for choice, target in product(range(len(case.configurations())), TARGETS):
            chosen = replace(case, choice=choice, target=target)
            key = (kernel, last, dtype, chosen.patch(), target, case.taps, case.stride)
            found.setdefault(key, chosen)
    found |= {key: Case(*key) for key in product(MERGES, TARGETS)}
    return list(dict.fromkeys([*found.values(), *OTHERS, *BARE]))


# ---- the committed table ----
@dataclass(frozen=True)
class Table:
    triton: str  # the version that compiled
    codes: dict[str, str]  # of each kernel: code()
    rows: dict[str, dict[str, int]]  # of each case, by str(): its numbers by COLUMNS


def committed() -> Table:
    with open(TABLE, newline="") as lines:
        version = lines.readline().split()[-1]
        codes = dict(pair.split("=") for pair in lines.readline().split()[1:])
        rows = {row.pop("case"): row for row in csv.DictReader(lines)}
    return Table(version, codes, {c: {k: int(row[k]) for k in COLUMNS} for c, row in rows.items()})


def write(table: Table) -> None:
    with open(TABLE, "w", newline="") as lines:
        lines.write(f"# Triton {table.triton}\n")
        lines.write(" ".join(["#", *(f"{k}={v}" for k, v in sorted(table.codes.items()))]) + "\n")
        rows = csv.writer(lines, lineterminator="\n")
        rows.writerow(["case", *COLUMNS])
        for case, numbers in sorted(table.rows.items()):
            rows.writerow([case, *(numbers[k] for k in COLUMNS)])


def renew() -> Table:
    """The table of here, of which rows that are still true are kept."""
    codes, kept = {kernel: code(kernel) for kernel in ALL}, {}
    if TABLE.exists() and (old := committed()).triton == triton.__version__:
        fresh = {kernel for kernel in ALL if old.codes.get(kernel) == codes[kernel]}
        kept = {case: row for case, row in old.rows.items() if case.partition("-")[0] in fresh}
    cases = {str(case): case for case in every_configuration()}
    rows = {case: row for case, row in kept.items() if case in cases}
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        waiting = {pool.submit(facts, cases[c]): c for c in cases if c not in rows}
        for done in as_completed(waiting):
            rows[waiting[done]] = done.result()
            print(f"{len(rows)} of {len(cases)}: {waiting[done]}", flush=True)
    return Table(triton.__version__, codes, rows)


if __name__ == "__main__":
    if sys.argv[1:] == ["few"]:
        print(json.dumps({"triton": triton.__version__, "facts": [facts(case) for case in FEW]}))
    else:
        table = renew()
        write(table)
        print(*(f"{c} spills" for c, row in table.rows.items() if row["stack"]), sep="\n")
