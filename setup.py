"""Builds mnet_kernels._C (bindings and CPU kernels) and, where there is nvcc, mnet_kernels._cuda.

FORCE_CUDA=1 makes a missing nvcc an error, FORCE_CUDA=0 leaves CUDA out; TORCH_CUDA_ARCH_LIST
chooses the architectures ("8.0 9.0+PTX"). Everything else: pyproject.toml.
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

VERSION = Path("mnet_kernels/_version.py").read_text().split('"')[1]

# The oldest torch whose stable ABI the binary asks for: one build serves it and all later ones.
TORCH_TARGET_VERSION = "0x020a000000000000"

# What a wheel is compiled for; nvcc leaves out what it does not know. PTX serves what comes later.
WHEEL_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
CUDA_SOURCES = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))

if platform.system() == "Windows":
    raise SystemExit("mnet_kernels: the kernels need gcc or clang (vector extensions), not MSVC")

os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
JOBS = int(os.environ["MAX_JOBS"])


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True)


class Nvcc:
    """A working nvcc. It may be a script outside its toolkit, so it is asked for everything."""

    def __init__(self, path):
        self.path = path
        self.version = re.search(r"release ([\d.]+)", run(path, "--version").stdout)[1]
        self.known = set(re.findall(r"sm_(\w+)", run(path, "--list-gpu-code").stdout))
        plan = run(path, "--dryrun", "-x", "cu", os.devnull, "-o", "unused").stderr
        libraries = re.search(r"^#\$ LIBRARIES=(.*)$", plan, re.M)[1]
        self.library_dirs = [os.path.normpath(word[2:]) for word in shlex.split(libraries)]

    @classmethod
    def find(cls):
        """(nvcc, None), or (None, the sentence why CUDA is left out)."""
        if os.environ.get("FORCE_CUDA") == "0":
            return None, "they were left out of this build (FORCE_CUDA=0)"
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
        candidates = [f"{home}/bin/nvcc" for home in homes if home]
        candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
        reason = f"nvcc was not found when this was built (looked for {', '.join(candidates)})"
        for path in filter(None, map(shutil.which, candidates)):
            try:
                return cls(path), None
            except (OSError, subprocess.CalledProcessError, TypeError) as error:
                reason = f"nvcc did not work when this was built ({path}: {error})"
        if os.environ.get("FORCE_CUDA") == "1":
            raise SystemExit(f"mnet_kernels: FORCE_CUDA=1, but {reason}")
        return None, reason

    def architectures(self, in_place):
        """As in TORCH_CUDA_ARCH_LIST. Built in place, the kernels are for this machine: for its
        GPUs, or where it has none for any GPU from 8.0 on, by PTX, which compiles fastest."""
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
        if asked:
            return asked
        known = [a for a in WHEEL_ARCHITECTURES if a.replace(".", "") in self.known]
        if not in_place:
            return [*known[:-1], known[-1] + "+PTX"]
        here = range(torch.cuda.device_count())
        capabilities = {"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in here}
        return sorted(c for c in capabilities if c.replace(".", "") in self.known) or ["8.0+PTX"]

    def architecture_flags(self, architectures):
        flags = []
        for name in architectures:
            match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
            if match is None or match[1] + match[2] not in self.known:
                known = " ".join(sorted(self.known, key=lambda a: (len(a), a)))
                raise SystemExit(
                    'mnet_kernels: TORCH_CUDA_ARCH_LIST: expected numbers as in "8.0 9.0+PTX", '
                    f"of what nvcc {self.version} knows (sm_{known}), got {name!r}"
                )
            number = match[1] + match[2]
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if match[3]:
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags

    def compile(self, sources, directory, architectures):
        """Object files of `sources`, compiled again only where something that they read changed."""
        flags = [
            "-c", "--options-file", "csrc/cuda/nvcc.flags", "-DUSE_CUDA", "-Xcompiler=-fPIC",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
            *self.architecture_flags(architectures),
        ]  # fmt: skip
        headers = [f"-isystem={path}" for path in include_paths()]  # of torch.__version__
        command = [self.path, *flags, *headers, f"--threads={max(1, JOBS // len(sources))}"]
        read = [*Path("csrc").glob("*.h")]
        read += (path for path in Path("csrc/cuda").iterdir() if path.suffix != ".cpp")
        digest = hashlib.sha256(repr((flags, self.version, torch.__version__)).encode())
        for path in sorted(read):
            digest.update(path.read_bytes())
        directory.mkdir(parents=True, exist_ok=True)

        def one(source):
            target = directory / (Path(source).stem + ".o")
            stamp = target.with_suffix(".stamp")
            if not (target.exists() and stamp.exists() and stamp.read_text() == digest.hexdigest()):
                print(f"nvcc {source} ({' '.join(architectures)})", flush=True)
                if subprocess.run([*command, source, "-o", target]).returncode != 0:
                    raise SystemExit(f"mnet_kernels: nvcc failed on {source}")
                stamp.write_text(digest.hexdigest())
            return str(target)

        with ThreadPoolExecutor(JOBS) as pool:
            return list(pool.map(one, sources))


class Build(BuildExtension):
    """Compiles _cuda's .cu files itself: torch's rules ask for a CUDA torch of nvcc's version,
    and the stable ABI needs neither."""

    def run(self):
        self.in_place = bool(self.inplace or self.editable_mode)  # setuptools' run clears inplace
        super().run()

    def build_extensions(self):
        """nvcc works beside the C++ compiler: with many cores both wait for their longest file."""
        with ThreadPoolExecutor(1) as beside:
            for extension in self.extensions:
                if extension.name == "mnet_kernels._cuda":
                    architectures = nvcc.architectures(self.in_place)
                    extension.define_macros.append(
                        ("MNET_CUDA_ARCHITECTURES", f'"{" ".join(architectures)}"')
                    )
                    # Kept: pip throws build_temp away after an editable install.
                    directory = Path("build/cuda", "_".join(architectures)).resolve()
                    self.objects = beside.submit(
                        nvcc.compile, CUDA_SOURCES, directory, architectures
                    )
            super().build_extensions()

    def build_extension(self, extension):
        if extension.name == "mnet_kernels._cuda":
            objects = self.objects.result()
            extension.extra_objects += objects
            extension.depends += objects
        super().build_extension(extension)


nvcc, why_no_cuda = Nvcc.find()

define_macros = [
    ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
    ("MNET_VERSION", f'"{VERSION}"'),
    ("MNET_TORCH_VERSION", f'"{torch.__version__}"'),
]
compile_args = ["-O2", "-g0", "-Wno-psabi"]

extensions = [
    CppExtension(
        "mnet_kernels._C",
        # Slowest to compile first.
        sources=[
            "csrc/cpu/instruction_set_avx512.cpp",
            "csrc/cpu/instruction_set_baseline.cpp",
            "csrc/cpu/instruction_set_avx2.cpp",
            "csrc/cpu/instruction_set_avx512_bf16.cpp",
            "csrc/bindings.cpp",
            "csrc/cpu/dwconv_bn_act.cpp",
            "csrc/cpu/dwconv_training.cpp",
            "csrc/cpu/conv_training.cpp",
            "csrc/cpu/conv_patches.cpp",
            "csrc/cpu/running_statistics.cpp",
            "csrc/cpu/conv_bn_act.cpp",
            "csrc/cpu/conv_sequence.cpp",
            "csrc/cpu/sequence.cpp",
            "csrc/cpu/separable_conv.cpp",
            "csrc/cpu/pair.cpp",
            "csrc/cpu/schedule.cpp",
            "csrc/cpu/strip.cpp",
            "csrc/cpu/launch.cpp",
            "csrc/cpu/result_memory.cpp",
            "csrc/cpu/instruction_sets.cpp",
            "csrc/cpu/active.cpp",
            "csrc/ops.cpp",
            "csrc/watched_tensors.cpp",
            "csrc/direct_call.cpp",
        ],
        define_macros=[*define_macros, ("MNET_WHY_NO_CUDA", f'"{why_no_cuda or ""}"')],
        extra_compile_args=compile_args,
    )
]
if nvcc is not None:
    extensions.append(
        CppExtension(
            "mnet_kernels._cuda",
            sources=["csrc/cuda/bindings.cpp"],
            define_macros=[*define_macros, ("MNET_NVCC_VERSION", f'"{nvcc.version}"')],
            extra_compile_args=compile_args,
            # The runtime is linked in, and torch's CUDA functions are found through libtorch when
            # the extension is loaded: it builds where they are not, and runs with any CUDA torch.
            library_dirs=nvcc.library_dirs,
            libraries=["cudart_static", "rt", "pthread", "dl"],
            extra_link_args=["-Wl,--no-as-needed", "-ltorch"],
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": Build})
