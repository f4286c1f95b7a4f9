"""Device code of csrc/cuda, compiled by the host compiler and run: see emulation.h.

``emulator("")``, ``emulator("address")`` and ``emulator("thread")`` are programs built once
(cached by their sources' content) that serve requests through a pipe.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILDS = ROOT / "build" / "emulation"

FLAGS = ["-std=c++17", "-g1", "-Wall", "-Wno-unknown-pragmas", "-pthread", f"-I{HERE}"]
SANITIZED = "-DEMULATION_SANITIZED"  # see elements.h
# Optimised as far as compiling and running take least together.
SANITIZERS = {
    "": ["-O1"],
    "address": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", SANITIZED],
    "thread": ["-O1", "-fsanitize=thread", SANITIZED],
}
#: Of an H100: multiprocessors, and bytes of shared memory that a block may have.
MULTIPROCESSORS, SHARED_LIMIT = 132, 227 << 10
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}


class EmulationError(RuntimeError):
    """A kernel failed: the emulation's own sentence, or the sanitizer's report."""


def build(sanitizer: str) -> Path:
    """The program, compiled with one object file a .cpp; minutes the first time at most."""
    compiler = os.environ.get("CXX", "g++")
    flags = [compiler, *FLAGS, *SANITIZERS[sanitizer]]
    sources = sorted(HERE.glob("*.cpp"))
    read = sorted([*HERE.glob("*.h"), *(ROOT / "csrc").glob("*.h"), *ROOT.glob("csrc/cuda/*.cuh")])

    def objects(source: Path) -> Path:
        content = "\0".join([*flags, *(path.read_text() for path in (source, *read))])
        name = f"{source.stem}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.o"
        target = BUILDS / name
        if not target.exists():
            _compile([*flags, "-c", str(source)], target)
        return target

    BUILDS.mkdir(parents=True, exist_ok=True)
    with open(BUILDS / f"lock-{sanitizer}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run side by side: one process builds
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = list(pool.map(objects, sources))
        together = hashlib.sha256(" ".join(part.name for part in parts).encode()).hexdigest()[:16]
        program = BUILDS / f"emulation-{together}"
        if not program.exists():
            _compile([*flags, *map(str, parts)], program)
    return program


def _compile(command: list[str], target: Path) -> None:
    """Into a temporary name first: a build that was cut short leaves nothing behind."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    partial.rename(target)


@dataclass
class Answer:
    text: str
    #: Counts by buffer name (see traffic.h), where they were asked for.
    traffic: dict[str, dict[str, int]]


class Emulator:
    def __init__(self, sanitizer: str):
        self.sanitizer = sanitizer
        self.program = build(sanitizer)
        self.process: subprocess.Popen | None = None

    def run(
        self,
        operation: str,
        variant: str = "-",
        *,
        numbers: dict[str, float] | None = None,
        inputs: dict[str, Tensor | None] | None = None,
        outputs: dict[str, Tensor] | None = None,
        scratch: dict[str, int] | None = None,
        offsets: dict[str, int] | None = None,
        count: bool = False,
    ) -> Answer:
        """Runs one operation; the outputs' memory (dense, any strides) is overwritten.

        Args:
            inputs: copied as they lie in memory; None is a null pointer.
            scratch: bytes of memory whose content does not matter, by name.
            offsets: bytes past a 256-byte boundary at which a buffer starts; 0 by default.
            count: also count the memory traffic.
        """
        given = {name: _bytes(t) for name, t in (inputs or {}).items() if t is not None}
        words = [operation, variant, *(f"{k}={v}" for k, v in (numbers or {}).items())]
        words += ["count=1"] if count else []
        at = offsets or {}
        words += [f"in:{k}={len(v)}+{at.get(k, 0)}" for k, v in given.items()]
        wanted = outputs or {}
        words += [f"out:{k}={v.nbytes}+{at.get(k, 0)}" for k, v in wanted.items()]
        words += [f"scratch:{k}={v}+0" for k, v in (scratch or {}).items()]
        process = self._started()
        assert process.stdin and process.stdout
        try:
            process.stdin.write(" ".join(words).encode() + b"\n" + b"".join(given.values()))
            process.stdin.flush()
        except BrokenPipeError:
            self._died()
        answer = process.stdout.readline().decode()
        if not answer.endswith("\n"):
            self._died()
        status, _, rest = answer.rstrip("\n").partition(" ")
        if status != "ok":
            raise EmulationError(rest)
        text, _, traffic = rest.partition("\t")
        for tensor in wanted.values():
            content = process.stdout.read(tensor.nbytes)
            if len(content) != tensor.nbytes:
                self._died()
            if content:
                _flat(tensor).copy_(torch.frombuffer(bytearray(content), dtype=tensor.dtype))
        return Answer(text, json.loads(traffic))

    def convolve(
        self, operation: str, variant: str, numbers: dict[str, float],
        inputs: dict[str, Tensor | None], count: bool, offsets: dict[str, int] | None,
    ) -> tuple[Tensor, Answer]:  # fmt: skip
        """The output y (N, K, OH, OW) of x's dtype, channels_last, and what the program said: the
        variant's name and, with ``count``, the traffic.

        Args:
            offsets: bytes that a tensor lies past a 256-byte boundary.
        """
        shape = [int(numbers[name]) for name in ("N", "K", "OH", "OW")]
        x = cast(Tensor, inputs["x"])
        y = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        answer = self.run(
            operation, variant, numbers=numbers, inputs=inputs, outputs={"y": y}, count=count,
            offsets=offsets,
        )  # fmt: skip
        return y, answer

    def _started(self) -> subprocess.Popen:
        if self.process is None:
            # ThreadSanitizer wants the fixed addresses that address randomisation takes.
            prefix = ["setarch", "-R"] if self.sanitizer == "thread" else []
            self.report = tempfile.TemporaryFile()  # noqa: SIM115
            self.process = subprocess.Popen(
                [*prefix, str(self.program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self.report, env=os.environ | ENVIRONMENT,
            )  # fmt: skip
        return self.process

    def _died(self) -> None:
        assert self.process
        self.process.communicate()
        self.process = None
        self.report.seek(0)
        raise EmulationError(self.report.read().decode(errors="replace"))


def _flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements as they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _bytes(tensor: Tensor) -> bytes:
    return _flat(tensor).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@functools.cache
def emulator(sanitizer: str = "") -> Emulator:
    return Emulator(sanitizer)
