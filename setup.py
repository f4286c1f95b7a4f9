"""Builds mnet_kernels._C: the bindings and the CPU kernels. Everything else: pyproject.toml."""

import os
import platform
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

VERSION = Path("mnet_kernels/_version.py").read_text().split('"')[1]

# The oldest torch whose stable ABI the binary asks for: one build serves it and all later ones.
TORCH_TARGET_VERSION = "0x020a000000000000"

if platform.system() == "Windows":
    raise SystemExit("mnet_kernels: the kernels need gcc or clang (vector extensions), not MSVC")

os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))

setup(
    ext_modules=[
        CppExtension(
            "mnet_kernels._C",
            # Slowest to compile first.
            sources=[
                "csrc/cpu/instruction_set_avx512_bf16.cpp",
                "csrc/cpu/instruction_set_avx512.cpp",
                "csrc/cpu/instruction_set_baseline.cpp",
                "csrc/cpu/instruction_set_avx2.cpp",
                "csrc/cpu/dwconv_bn_act.cpp",
                "csrc/cpu/conv_bn_act.cpp",
                "csrc/cpu/conv_sequence.cpp",
                "csrc/cpu/launch.cpp",
                "csrc/cpu/instruction_sets.cpp",
                "csrc/cpu/active.cpp",
                "csrc/ops.cpp",
                "csrc/bindings.cpp",
            ],
            define_macros=[
                ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
                ("MNET_VERSION", f'"{VERSION}"'),
                ("MNET_TORCH_VERSION", f'"{torch.__version__}"'),
            ],
            extra_compile_args=["-O2", "-g0", "-Wno-psabi"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
