"""What nvcc made of a kernel, read without a GPU: registers, local memory, the width of its global
accesses, how many blocks a multiprocessor holds, and how many bytes it then has in flight.

python tests/machine_code.py renews the committed table (tests/machine_code.csv): of the sources
that have changed, or of all for another nvcc.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import sass

ROOT = Path(__file__).parents[1]
# Those with kernels; the operators' own files hold none and take longest to compile.
SOURCES = [
    path
    for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))
    if '.cuh"' in path.read_text()
    and not any(word in path.read_text() for word in ("STABLE_TORCH", "operators.h"))
]
TABLE = Path(__file__).with_suffix(".csv")
CACHE = ROOT / "build" / "machine_code"
ARCHITECTURES = (80, 90, 100)
#: What nvcc made of a kernel, and what follows from it.
FACTS = (
    "threads", "registers", "static_shared", "local", "local_accesses", "load_bytes",
    "store_bytes", "loads_in_flight", "products", "product_loads", "copies",
)  # fmt: skip
COLUMNS = (*FACTS, "shared", "blocks_per_sm", "bytes_in_flight")
ELEMENTS = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16"}
PRODUCTS = ELEMENTS | {"tf32": "tf32"}


class Unavailable(RuntimeError):
    """There is no nvcc or no cuobjdump; the message says which and where it was looked for."""


# ---- what a multiprocessor holds (CUDA C++ Programming Guide, "Technical Specifications") ----
WARPS, BLOCKS, REGISTERS = 64, 32, 65536
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
LEAST_GRANTED = 163 << 10  # that a block may have on each of these
SHARED_OF_THE_SYSTEM = 1024  # beside each block's own; cuobjdump counts it in from sm_90 on


def blocks_per_sm(architecture: int, threads: int, registers: int, shared: int) -> int:
    """How many blocks of so many threads run at once; registers a thread, shared bytes a block
    (its own)."""
    warps = -(-threads // 32)
    registers_of_a_warp = -(-registers * 32 // 256) * 256
    # A warp's registers come from one of four partitions.
    by_registers = REGISTERS // 4 // registers_of_a_warp * 4 // warps
    by_shared = SHARED[architecture] // (-(-shared // 128) * 128 + SHARED_OF_THE_SYSTEM)
    return min(BLOCKS, WARPS // warps, by_registers, by_shared)


# ---- tools ----
@cache
def nvcc() -> str:
    for candidate in ("nvcc", "/usr/local/cuda/bin/nvcc"):
        if found := shutil.which(candidate):
            return found
    raise Unavailable("there is no nvcc (on PATH, in /usr/local/cuda)")


@cache
def nvcc_version() -> str:
    return re.search(r"release ([\d.]+)", _output(nvcc(), "--version"))[1]


@cache
def cuobjdump() -> str:
    """From PATH, from nvcc's toolkit, or from Triton's package."""
    candidates = ["cuobjdump", "/usr/local/cuda/bin/cuobjdump"]
    try:
        import triton.backends.nvidia

        candidates.append(str(Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"))
    except ImportError:
        pass
    for candidate in candidates:
        if found := shutil.which(candidate):
            return found
    raise Unavailable(f"there is no cuobjdump (looked for {', '.join(candidates)})")


def _output(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def cubin(source: Path, architecture: int) -> Path:
    """`source` compiled with the product's flags; kept for as long as nothing it reads changes."""
    flags = ROOT / "csrc/cuda/nvcc.flags"
    read = [source, flags, *(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cuda").glob("*.cuh")]
    read += (ROOT / "csrc/cuda").glob("*.h")
    digest = hashlib.sha256(f"{nvcc_version()} {architecture}".encode())
    for path in sorted(read):
        digest.update(path.read_bytes())
    target = CACHE / f"{source.stem}-sm_{architecture}-{digest.hexdigest()[:16]}.cubin"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".unfinished")
        _output(
            nvcc(), "-cubin", f"-arch=sm_{architecture}", "--options-file", flags,
            source, "-o", unfinished,
        )  # fmt: skip
        unfinished.rename(target)
    return target


# ---- reading ----
@dataclass(frozen=True)
class Kernel:
    """One instantiation of a kernel on one architecture."""

    source: str  # the .cu file, without the ending
    name: str
    architecture: int
    threads: int  # a block, by its __launch_bounds__
    registers: int  # a thread
    static_shared: int  # bytes a block, without what the launcher asks for
    local: int  # bytes of local memory a thread: spills, arrays with a computed index
    local_accesses: int  # LDL and STL instructions
    load_bytes: int  # the widest global load
    store_bytes: int  # the widest global store
    loads_in_flight: int  # bytes a thread has asked for before it must wait
    products: int  # matrix instructions
    product_loads: int  # matrix loads
    copies: int  # asynchronous copies to shared memory

    @property
    def shared(self) -> int:
        """Bytes a block, with what the launcher asks for."""
        return self.static_shared + dynamic_shared().get(_variant(self.name), 0)

    @property
    def blocks_per_sm(self) -> int:
        return blocks_per_sm(self.architecture, self.threads, self.registers, self.shared)

    @property
    def bytes_in_flight(self) -> int:
        """A multiprocessor full of these blocks waits for so many bytes."""
        return self.blocks_per_sm * self.threads * self.loads_in_flight


def kernels(source: Path, architecture: int) -> list[Kernel]:
    """Every kernel that `source` instantiates."""
    file = cubin(source, architecture)
    usage = dict(sass.usage(_output(cuobjdump(), "-res-usage", file)))
    threads = dict(sass.threads(_output(cuobjdump(), "-elf", file)))
    functions = list(sass.functions(_output(cuobjdump(), "-sass", file)))
    names = sass.demangled([mangled for mangled, _ in functions])
    found = []
    for (mangled, code), name in zip(functions, names, strict=True):
        registers, stack, shared, local = usage[mangled]
        if architecture >= 90 and shared:
            shared -= SHARED_OF_THE_SYSTEM
        loads = [sass.width(op) for _, op, _ in code if op.startswith("LDG")]
        stores = [sass.width(op) for _, op, _ in code if op.startswith("STG")]
        matrix = (
            sum(op.split(".")[0] == which for _, op, _ in code)
            for which in ("HMMA", "LDSM", "LDGSTS")
        )
        found.append(Kernel(
            source.stem, name, architecture, threads[mangled], registers, shared, stack + local,
            sum(op.startswith(("LDL", "STL")) for _, op, _ in code),
            max(loads, default=0), max(stores, default=0), sass.loads_in_flight(code), *matrix,
        ))  # fmt: skip
    return found


@cache
def dynamic_shared() -> dict[tuple[str, str], int]:
    """The most shared memory that a block is given at run time on MobileNet V1's layers, by variant
    and element; empty where the CUDA extension cannot be loaded to tell."""
    try:
        from mnet_kernels import _cuda
    except ImportError:
        return {}
    plan = (ROOT / "csrc/cuda/dwconv_backward_one_pass_plan.cuh").read_text()
    kilobytes = int(re.search(r"kOnePassShared = (\d+) << 10;", plan)[1])  # at most
    most = {("backward_one_pass", element): kilobytes << 10 for element in ELEMENTS.values()}
    layers = (ROOT / "benchmarks/shapes/mobilenet_v1.csv").read_text().splitlines()[1:]
    for line, dtype, last in itertools.product(layers, ELEMENTS, (False, True)):
        c, h, w, kernel, stride, _ = map(int, line.split(","))
        call = [32, c, h, w], dtype, last, [c, 1, kernel, kernel], [stride], [kernel // 2]
        for variant in _cuda.facts_of_call(*call).able:
            _cuda.force_variant(variant)
            key = variant, ELEMENTS[dtype]
            most[key] = max(most.get(key, 0), _cuda.facts_of_call(*call).shared_bytes)
            _cuda.force_variant("")
    layers = (ROOT / "benchmarks/shapes/mobilenet_v1_blocks.csv").read_text().splitlines()[1:]
    for line, element, batch in itertools.product(layers, PRODUCTS, (1, 256)):
        c, h, w, kernel, stride, outputs, _ = map(int, line.split(","))
        dtype, tf32 = ("float32", True) if element == "tf32" else (element, False)
        block = [batch, c, h, w], dtype, [c, 1, kernel, kernel], outputs, [stride], [kernel // 2]
        block += ([1], tf32)
        for variant in _cuda.facts_of_separable_call(*block).able:
            _cuda.force_separable_variant(variant)
            nbytes = _cuda.facts_of_separable_call(*block).shared_bytes
            if nbytes <= LEAST_GRANTED:  # else sm_80 takes another variant
                key = variant, PRODUCTS[element]
                most[key] = max(most.get(key, 0), nbytes)
            _cuda.force_separable_variant("")
    layers = (ROOT / "benchmarks/shapes/mobilenet_v2_dense.csv").read_text().splitlines()[1:]
    for line, element, batch in itertools.product(layers, PRODUCTS, (1, 256)):
        c, h, w, kernel, stride, outputs, _ = map(int, line.split(","))
        dtype, tf32 = ("float32", True) if element == "tf32" else (element, False)
        conv = [batch, c, h, w], dtype, [outputs, c, kernel, kernel], [stride], [kernel // 2]
        conv += ([1], tf32)
        for variant in _cuda.facts_of_conv_call(*conv).able:
            _cuda.force_conv_variant(variant)
            nbytes = _cuda.facts_of_conv_call(*conv).shared_bytes
            if nbytes <= LEAST_GRANTED:  # else sm_80 lets weights pass by
                key = variant, PRODUCTS[element]
                most[key] = max(most.get(key, 0), nbytes)
            _cuda.force_conv_variant("")
    return most


def _variant(kernel: str) -> tuple[str, str]:
    """(variant, element) of dwconv_VARIANT<ELEMENT, ...>, separable_conv_kernel<ELEMENT, ...> or
    conv_bn_act_kernel<ELEMENT, ...>."""
    if match := re.match(r"separable_conv_kernel<(\w+), Separable(\w+?)(\d+)>", kernel):
        return f"{match[2].lower()}_{match[3]}", match[1]
    if match := re.match(r"conv_bn_act_kernel<(\w+), Conv(\w+?)(\d+)>", kernel):
        return f"{match[2].lower()}_{match[3]}", match[1]
    match = re.match(r"dwconv_(\w+)<(\w+)", kernel)
    return match.groups() if match else (kernel, "")


# ---- the committed table ----
@cache
def code(source: Path) -> str:
    """A digest of all that nvcc reads of this tree for `source`, without comments and space."""
    parts, seen, waiting = [(ROOT / "csrc/cuda/nvcc.flags").read_text()], set(), [source]
    while waiting:
        path = waiting.pop().resolve()
        if path in seen or not path.exists():  # the emulation's own
            continue
        seen.add(path)
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.S)
        parts.append(" ".join(text.split()))
        waiting += [path.parent / name for name in re.findall(r'^#include "(.*)"', text, re.M)]
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Table:
    nvcc: str  # the release that compiled
    codes: dict[str, str]  # of each source: code()
    rows: list[dict[str, str]]

    def of(self, architecture: int) -> dict[str, dict[str, int]]:
        """kernel -> its numbers by COLUMNS"""
        return {
            row["kernel"]: {name: int(row[name]) for name in COLUMNS}
            for row in self.rows if row["sm"] == str(architecture)
        }  # fmt: skip

    def says(self, source: Path) -> bool:
        """Whether its rows are of this code and this nvcc: they are what a compilation would
        find."""
        return self.nvcc == nvcc_version() and self.codes.get(source.stem) == code(source)

    def kernels(self, source: Path) -> list[Kernel]:
        return [
            Kernel(source.stem, row["kernel"], int(row["sm"]), *(int(row[name]) for name in FACTS))
            for row in self.rows if row["source"] == source.stem
        ]  # fmt: skip


@cache
def committed() -> Table:
    with open(TABLE, newline="") as lines:
        release = lines.readline().split()[-1]
        codes = dict(pair.split("=") for pair in lines.readline().split()[1:])
        return Table(release, codes, list(csv.DictReader(lines)))


def measured() -> list[Kernel]:
    """All kernels of all architectures: as committed where the table says, else compiled."""
    table = committed()
    known = {source: table.says(source) for source in SOURCES}
    jobs = [(s, a) for a in ARCHITECTURES for s in SOURCES if not known[s]]
    with ThreadPoolExecutor(2) as pool:
        compiled = [k for found in pool.map(lambda job: kernels(*job), jobs) for k in found]
    return compiled + [k for s in SOURCES if known[s] for k in table.kernels(s)]


def write(found: list[Kernel]) -> None:
    with open(TABLE, "w", newline="") as lines:
        lines.write(f"# nvcc {nvcc_version()}\n")
        lines.write(" ".join(["#", *(f"{s.stem}={code(s)}" for s in SOURCES)]) + "\n")
        rows = csv.writer(lines, lineterminator="\n")
        rows.writerow(["sm", "kernel", "source", *COLUMNS])
        for kernel in sorted(found, key=lambda k: (k.architecture, k.name)):
            numbers = [getattr(kernel, name) for name in COLUMNS]
            rows.writerow([kernel.architecture, kernel.name, kernel.source, *numbers])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if not dynamic_shared():
        sys.exit("machine_code.py: shared memory is not known: build mnet_kernels._cuda first")
    found = measured()
    write(found)
    print(f"{TABLE}: {len(found)} kernels")
