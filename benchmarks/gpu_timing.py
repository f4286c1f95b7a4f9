"""How `make gpu` times: every call is captured in a CUDA graph that runs it on several inputs in
turn, each result in memory of its own: enough of them that a large batch comes from memory, not
from L2 (a row says "cold" if so; batch 1 stays in L2, as inside a network). All graphs of a row
take turns, timed by device events. "call" times are of plain calls, the launch overhead in them.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from gpu_errors import PEERS
from peers import LAST
from torch import Tensor

from mnet_kernels.timing import Spread, ratio

Layer = Callable[[Tensor], Tensor]
Call = Callable[[], object]
Row = dict[str, Any]
DEVICE = "cuda"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": LAST}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
ROTATED_BYTES, MOST_INPUTS = 256 << 20, 32
ROUNDS = 11


def inputs_for(nbytes: int) -> int:
    """How many inputs a graph takes of calls that move so many bytes."""
    return min(MOST_INPUTS, max(2, -(-ROTATED_BYTES // nbytes)))


def is_cold(nbytes: int) -> bool:
    l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
    return inputs_for(nbytes) * nbytes > 3 * l2


def graph_of(call: Callable, inputs: list[Tensor]) -> tuple[Call, Any]:
    """(replay, first result) of a CUDA graph that runs `call` on each input."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(inputs[0]), call(inputs[-1])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call(x) for x in inputs]
    return graph.replay, results[0]


def device_times(
    calls: dict[str, Call], parts: int, rounds: int = ROUNDS, lead: bool = True
) -> dict[str, Spread]:
    """Seconds of one of each call's `parts`, taking turns.

    Args:
        lead: give the device something to do first, so that the host is ahead of it and no launch
            is waited for; False to count the waiting.
    """

    def sample(call: Call, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if lead:
            torch.cuda._sleep(200_000)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats / parts

    repeats = {}
    for name, call in calls.items():
        sample(call, 1)
        repeats[name] = max(1, min(100, int(1e-3 / (sample(call, 1) * parts + 1e-9))))
    names, samples = list(calls), {name: [] for name in calls}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].append(sample(calls[name], repeats[name]))
    return {name: Spread(tuple(values)) for name, values in samples.items()}


def smi(fields: str) -> list[str] | None:
    """What nvidia-smi says of the GPU, e.g. of "clocks.sm,clocks.mem"; None where it is missing."""
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
        return [value.strip() for value in told.splitlines()[0].split(",")]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return None


def copy_bandwidth() -> float:
    """GB/s of a large device copy, read and written bytes counted."""
    source = torch.randn(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    seconds = device_times({"copy": lambda: target.copy_(source)}, 1)["copy"].median
    return 2 * source.nbytes / seconds / 1e9


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Which kernel plain PyTorch convolves with: "cudnn" (or what it prefers), or "native"."""
    cudnn = torch.backends.cudnn
    flags = {"benchmark": True, "allow_tf32": cudnn.allow_tf32}
    if hasattr(cudnn, "depthwise_kernel"):
        flags |= {"enabled": True, "depthwise_kernel": name}
    else:
        flags |= {"enabled": name == "cudnn"}
    with cudnn.flags(**flags):
        yield


#: (a way's name, its first result) -> (error as it is told, whether it is right).
Judge = Callable[[str, Any], tuple[float, bool]]


def judge(exact: Tensor, allowed: Callable[[str], Tensor], some: slice) -> Judge:
    """By what :mod:`gpu_errors` allows.

    Args:
        exact: in float64, of the images `some`.
        allowed: of a way of ours, an element.
    """
    largest = exact.abs().max()

    def verdict(name: str, y: Tensor) -> tuple[float, bool]:
        off = (y[some].double() - exact).abs()  # NaN is neither right nor a number that is told
        error = (off.max() / largest).item()
        ours = name.startswith("ours")
        return error, bool((off <= allowed(name)).all()) if ours else error <= PEERS

    return verdict


class Race:
    """Ways to compute one thing: each is captured and judged, and those that are right are timed
    in turns. Names of ours begin with "ours"; all others are peers."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.graphs: dict[str, Call] = {}
        self.calls: dict[str, Call] = {}
        self.errors: dict[str, float] = {}

    def add(self, name: str, way: Callable, inputs: list[Tensor], called: bool = True) -> None:
        """A failure is told, and the others still count.

        Args:
            called: plain calls are timed too.

        Raises:
            torch.AcceleratorError: the device's, after which nothing runs in this process.
        """
        try:
            replay, result = graph_of(way, inputs)
            replay()
            self.errors[name], right = self.judge(name, result)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # whatever a compiler or library throws
            print(f"{name}: {type(error).__name__}: {error}")
            if name.startswith("ours"):
                self.errors[name] = math.inf
            return
        if right:
            self.graphs[name] = replay
            if called:
                self.calls[name] = partial(way, inputs[0])

    def run(self, nbytes: int, number: int, called: bool) -> tuple[dict[str, Spread], Row]:
        """(times, what a row says of them), beside a copy of as many bytes through so many buffers.

        Args:
            number: of the inputs that each way was added with.
            called: plain calls too.
        """
        half = [torch.empty(nbytes // 2, dtype=torch.uint8, device=DEVICE) for _ in range(number)]
        copied, _ = graph_of(torch.clone, half)
        with engine("cudnn"):
            times = device_times(self.graphs | {"copy": copied}, number)
            plain = device_times(self.calls, 1, lead=False) if called and self.calls else {}
        peers = [n for n in times if not n.startswith("ours") and n != "copy"]
        return times, {
            "bytes": nbytes,
            "best_peer": min(peers, key=lambda name: times[name].median),
            "us": {n: spread.summary(1e-6) for n, spread in times.items()},
            "call_us": {n: spread.summary(1e-6) for n, spread in plain.items()},
            # JSON has neither infinity nor NaN.
            "error": {n: e if math.isfinite(e) else None for n, e in self.errors.items()},
            "ours_correct": all(n in times for n in self.errors if n.startswith("ours")),
        }


def beside(times: dict[str, Spread], name: str, best: str) -> Row:
    """What a row says of a way of ours."""
    return {
        "fraction_of_copy": times["copy"].median / times[name].median,
        "against_best_peer": ratio(times[best], times[name]).summary(),
    }
