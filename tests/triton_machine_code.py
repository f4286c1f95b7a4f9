"""Compiles the Triton kernels for GPUs that need not be there, and reads what came out.

``python triton_machine_code.py few`` prints the facts of one case a kernel and layout as JSON;
``all`` compiles every configuration that some layer of a MobileNet may be given, for every target
(minutes), and fails if one spills.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mnet_kernels.triton import (
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
_ALL = KERNELS | TRAINING | MERGES | SEPARABLE
#: Pointers to x's dtype; the others are to float32.
TENSORS = ("x_ptr", "w_ptr", "pw_ptr", "y_ptr", "dy_ptr", "dx_ptr", "dconv_ptr")
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
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

    def __str__(self) -> str:
        layout = "nhwc" if self.channels_last else "nchw"
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"{self.channels}x{self.size}-k{self.taps}s{self.stride}"
        if self.kernel in SEPARABLE and self.dtype == torch.float32:
            dtype = self.precision
        return f"{self.kernel}-{self.target}-{dtype}-{layout}-{shape}-{self.choice}"

    def shape(self) -> dict:
        k, s = self.taps, self.stride
        out = -(-self.size // s)
        unrolled = k * k <= 49
        return {
            "H": self.size, "W": self.size, "OH": out, "OW": out, "C": self.channels, "M": 1,
            "KH": k, "KW": k, "SH": s, "SW": s, "DH": 1, "DW": 1, "TOP": k // 2, "LEFT": k // 2,
            "CHANNELS_LAST": self.channels_last, "UNROLL": unrolled, "WIDE": False,
            "ACTIVATION": "relu6", "TAP_ROWS": 3 if k == 3 else 1, "TAP_COLS": min(k, 8),
            "K": self.channels, "DW_ACTIVATION": "relu6", "PW_ACTIVATION": "relu6",
            "PRECISION": self.precision,
        }  # fmt: skip

    def configurations(self) -> list:
        kind = _ALL[self.kernel][1]
        if kind is None:
            return [triton.Config({"MERGED": dwconv_bn_act_training.MERGED}, num_warps=4)]
        if kind is tuning.SEPARABLE:
            return tuning.prune_separable(self.dtype.itemsize, self.shape())
        return tuning.prune(kind, self.dtype.itemsize, self.shape())


def facts(case: Case) -> dict:
    """Registers, bytes of stack, and how the kernel reaches memory."""
    kernel, _, missing = _ALL[case.kernel]
    fn = kernel if case.kernel in MERGES else kernel.fn  # without its tuner
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
    options = {"num_warps": warps, "num_stages": config.num_stages}
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
        "loads": len(re.findall(r"\bld\.global", ptx)),
        "wide_loads": len(re.findall(r"\bld\.global\.v4\.b32", ptx)),
        "stores": len(re.findall(r"\bst\.global", ptx)),
        "wide_stores": len(re.findall(r"\bst\.global\.v4\.b32", ptx)),
    }


FEW = [Case(kernel, channels_last=last) for kernel in KERNELS for last in (True, False)]

#: (channels, size, taps, stride): what MobileNets have, and sizes of few divisors.
SHAPES = [
    (c, size, taps, stride)
    for taps in (3, 5, 7) for stride in (1, 2)
    for c, size in [(32, 112), (64, 112), (128, 56), (256, 28), (512, 14), (1024, 7), (24, 28),
                    (16, 6), (8, 33)]
]  # fmt: skip


def every_configuration() -> list[Case]:
    """Each once for each target, on the first of the SHAPES that may be given it; for sm_90 once
    for each kind of kernel and stride."""
    found = {}
    for kernel, last, dtype in product(
        KERNELS | TRAINING, (True, False), (torch.bfloat16, torch.float32)
    ):
        for channels, size, taps, stride in SHAPES:
            case = Case(kernel, "sm_90", dtype, last, channels, size, taps, stride)
            for choice, config in enumerate(case.configurations()):
                chosen = replace(case, choice=choice)
                key = (kernel, last, dtype, str(config))
                found.setdefault((*key, taps, stride), chosen)
                for target in TARGETS:
                    found.setdefault((*key, target), replace(chosen, target=target))
    return list(dict.fromkeys(found.values()))


def spills(case: Case) -> tuple[str, int, int]:
    told = facts(case)
    return str(case), told["registers"], told["stack"]


if __name__ == "__main__":
    if sys.argv[1:] == ["few"]:
        print(json.dumps({"triton": triton.__version__, "facts": [facts(case) for case in FEW]}))
    else:
        assert sys.argv[1:] == ["all"]
        cases = every_configuration()
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            told = list(pool.map(spills, cases, chunksize=8))
        bad = [t for t in told if t[2]]
        print(f"Triton {triton.__version__}: {len(told)} compiled, {len(bad)} spill")
        print("at most", max(told, key=lambda t: t[1]))
        print(*bad, sep="\n")
        sys.exit(bool(bad))
