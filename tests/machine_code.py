"""What nvcc made of a kernel, read without a GPU: registers, local memory, the width of its global
accesses, how many blocks a multiprocessor holds, and how many bytes it then has in flight.

python tests/machine_code.py renews the committed table (tests/machine_code.csv).
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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
COLUMNS = (
    "threads", "registers", "shared", "load_bytes", "store_bytes", "blocks_per_sm",
    "bytes_in_flight",
)  # fmt: skip
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

    name: str
    architecture: int
    threads: int  # a block, by its __launch_bounds__
    registers: int  # a thread
    shared: int  # bytes a block, with what the launcher asks for
    local: int  # bytes of local memory a thread: spills, arrays with a computed index
    local_accesses: int  # LDL and STL instructions
    load_bytes: int  # the widest global load
    store_bytes: int  # the widest global store
    blocks_per_sm: int
    loads_in_flight: int  # bytes a thread has asked for before it must wait
    # How many there are of: matrix instructions, their loads, asynchronous copies.
    matrix: tuple[int, int, int] = (0, 0, 0)

    @property
    def bytes_in_flight(self) -> int:
        """A multiprocessor full of these blocks waits for so many bytes."""
        return self.blocks_per_sm * self.threads * self.loads_in_flight


def kernels(source: Path, architecture: int) -> list[Kernel]:
    """Every kernel that `source` instantiates."""
    file = cubin(source, architecture)
    usage = dict(_usage(_output(cuobjdump(), "-res-usage", file)))
    threads = dict(_threads(_output(cuobjdump(), "-elf", file)))
    functions = list(_functions(_output(cuobjdump(), "-sass", file)))
    found = []
    for (mangled, code), name in zip(functions, _demangled([f[0] for f in functions]), strict=True):
        registers, stack, shared, local = usage[mangled]
        if architecture >= 90 and shared:
            shared -= SHARED_OF_THE_SYSTEM
        shared += dynamic_shared().get(_variant(name), 0)
        loads = [_width(op) for _, op, _ in code if op.startswith("LDG")]
        stores = [_width(op) for _, op, _ in code if op.startswith("STG")]
        found.append(Kernel(
            name, architecture, threads[mangled], registers, shared, stack + local,
            sum(op.startswith(("LDL", "STL")) for _, op, _ in code),
            max(loads, default=0), max(stores, default=0),
            blocks_per_sm(architecture, threads[mangled], registers, shared), loads_in_flight(code),
            tuple(
                sum(op.split(".")[0] == which for _, op, _ in code)
                for which in ("HMMA", "LDSM", "LDGSTS")
            ),
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


Code = list[tuple[int, str, str]]  # (address, operation, operands)


def loads_in_flight(code: Code) -> int:
    """The most bytes of global loads that are under way when an instruction first needs one: in
    the loops that load, where there are some (what comes before them are weights), else anywhere.
    """
    bodies = [body for body in _loops(code) if any(op.startswith("LDG") for _, op, _ in body)]
    # Twice, for what one turn of a loop loads for the next.
    return max((_waiting(body + body) for body in bodies), default=0) or _waiting(code)


def _loops(code: Code) -> Iterator[Code]:
    """Of every branch back that closes one, all that it leads through, wherever ptxas put that."""
    at = {address: i for i, (address, _, _) in enumerate(code)}
    after: list[list[int]] = [[] for _ in code]
    before: list[list[int]] = [[] for _ in code]
    for i, (_, operation, operands) in enumerate(code):
        # "BRA 0x10" always goes there; "@P0 BRA 0x10" and "BRA.U UP0, 0x10" may; a call returns.
        jumps = operation.startswith(("BRA", "CALL"))
        target = re.search(r"0x(\w+)$", operands) if jumps else None
        to = at.get(int(target[1], 16)) if target is not None else None
        following = [] if to is None else [to]
        leaves = operation.startswith(("BRA", "BRX", "EXIT", "RET"))
        always = operation == "BRX" or re.fullmatch(r"(0x\w+)?", operands) is not None
        if i + 1 < len(code) and not (leaves and always):
            following.append(i + 1)
        after[i] += following
        for to in following:
            before[to].append(i)
    switches = [i for i, (_, operation, _) in enumerate(code) if operation == "BRX"]
    for i in range(1, len(code)):
        if switches and not before[i]:  # a case of the switch above, or else of the first
            switch = max((s for s in switches if s < i), default=switches[0])
            after[switch].append(i)
            before[i].append(switch)

    def reached(start: int, steps: list[list[int]], stop: int | None = None) -> set[int]:
        found, left = {start}, [start]
        while left:
            i = left.pop()
            if i == stop:
                continue
            left += (new := set(steps[i]) - found)
            found |= new
        return found

    for last, following in enumerate(after):
        for first in following:
            if first < last and last in (inside := reached(first, after)):
                yield [code[i] for i in sorted(inside & reached(last, before, stop=first))]


def _waiting(code: Code) -> int:
    """From top to bottom, as if no branch were taken. Loads return in order, so whoever waits for
    one has waited for those before it."""
    most, waiting = 0, []  # (registers, bytes), oldest first
    for _, operation, operands in code:
        named = _registers(operands)
        for i in reversed(range(len(waiting))):
            if waiting[i][0] & named:
                most = max(most, sum(size for _, size in waiting))
                del waiting[: i + 1]
                break
        if operation.startswith("LDG."):
            first, size = re.match(r"(?:P\d+, )?R(\d+)", operands), _width(operation)
            if first is not None:
                begin = int(first[1])
                waiting.append((set(range(begin, begin + -(-size // 4))), size))
    return max(most, sum(size for _, size in waiting))


def _registers(operands: str) -> set[int]:
    named = set()
    for number, width in re.findall(r"\bR(\d+)(?:\.(64|128))?", operands):
        count = {"": 1, "64": 2, "128": 4}[width]
        named |= set(range(int(number), int(number) + count))
    return named


def _width(operation: str) -> int:
    """Bytes that a load or store moves a thread."""
    for part in operation.split(".")[1:]:
        if part in ("64", "128", "256"):
            return int(part) // 8
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:]) // 8
    return 4


def _functions(sass: str) -> Iterator[tuple[str, Code]]:
    for part in sass.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        line = r"^\s+/\*(\w{4,})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);"
        code = [
            # Of what leaves the line it matters whether it always does.
            (
                int(at, 16),
                op,
                (guard if op.startswith(("BRA", "EXIT", "RET")) else "") + operands.strip(),
            )
            for at, guard, op, operands in re.findall(line, body, re.M)
        ]
        yield name.strip(), code


def _usage(report: str) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """(registers, stack, shared, local) of each function."""
    pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for name, *numbers in re.findall(pattern, report):
        yield name, tuple(map(int, numbers))


def _threads(elf: str) -> Iterator[tuple[str, int]]:
    """The block size that each function is compiled for."""
    for part in elf.split("\n.nv.info.")[1:]:
        bounds = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:.*\s+Value:\s*(.*)", part)
        assert bounds, f"{part.partition(chr(10))[0]} has no __launch_bounds__"
        x, y, z = (int(n, 16) for n in bounds[1].split()[:3])
        yield part.partition("\n")[0].strip(), x * y * z


def _demangled(names: list[str]) -> list[str]:
    """Short enough to read: without namespaces, return type and parameters."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    short = [line.removeprefix("void ").rpartition("(")[0] or line for line in text.splitlines()]
    return [re.sub(r"\b(?:mnet|cuda|detail)::", "", line) for line in short]


# ---- the committed table ----
def measured() -> list[Kernel]:
    """All kernels of all architectures."""
    jobs = [(source, architecture) for architecture in ARCHITECTURES for source in SOURCES]
    with ThreadPoolExecutor(2) as pool:
        return [k for found in pool.map(lambda job: kernels(*job), jobs) for k in found]


def committed() -> tuple[str, dict[int, dict[str, dict[str, int]]]]:
    """(the nvcc release that made them, architecture -> kernel -> its numbers by COLUMNS)."""
    with open(TABLE, newline="") as lines:
        release = lines.readline().split()[-1]
        table: dict[int, dict[str, dict[str, int]]] = {a: {} for a in ARCHITECTURES}
        for row in csv.DictReader(lines):
            numbers = {name: int(row[name]) for name in COLUMNS}
            table[int(row["sm"])][row["kernel"]] = numbers
    return release, table


def write(found: list[Kernel]) -> None:
    with open(TABLE, "w", newline="") as lines:
        lines.write(f"# nvcc {nvcc_version()}\n")
        rows = csv.writer(lines, lineterminator="\n")
        rows.writerow(["sm", "kernel", *COLUMNS])
        for kernel in sorted(found, key=lambda k: (k.architecture, k.name)):
            numbers = [getattr(kernel, name) for name in COLUMNS]
            rows.writerow([kernel.architecture, kernel.name, *numbers])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if not dynamic_shared():
        sys.exit("machine_code.py: shared memory is not known: build mnet_kernels._cuda first")
    found = measured()
    write(found)
    print(f"{TABLE}: {len(found)} kernels")
