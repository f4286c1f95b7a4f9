"""What `make gpu` times on a device: layers and whole networks, ours beside plain PyTorch.

Every call is captured in a CUDA graph that runs it on several inputs in turn, each result in memory
of its own: enough of them that a large batch comes from memory, not from L2 (a row says "cold" if
so; batch 1 stays in L2, as inside a network). All graphs of a row take turns, timed by device
events. "call" times are of plain calls, the launch overhead in them.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peers import LAST, compiled
from shapes import shapes
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mnet_kernels import _cuda, backends, models, ops, swap
from mnet_kernels.data import randomise_batchnorm
from mnet_kernels.fold import fold
from mnet_kernels.timing import Spread, ratio

Layer = Callable[[Tensor], Tensor]
DEVICE = "cuda"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": LAST}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
TOLERANCE = {"bfloat16": 5e-2, "float32": 1e-5, "float16": 1e-2}
ROTATED_BYTES, MOST_INPUTS = 256 << 20, 32
ROUNDS = 11
_Row = dict[str, Any]


class Clock:
    """Stops long work that has many parts: asked between them."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.monotonic(), seconds

    def spent(self) -> float:
        """The fraction of the time that is gone."""
        return (time.monotonic() - self.start) / self.seconds


# ---- timing ----
def graph_of(call: Layer, inputs: list[Tensor]) -> tuple[Callable[[], object], Tensor]:
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
    calls: dict[str, Callable[[], object]], parts: int, rounds: int = ROUNDS, lead: bool = True
) -> dict[str, Spread]:
    """Seconds of one of each call's `parts`, taking turns.

    Args:
        lead: give the device something to do first, so that the host is ahead of it and no launch
            is waited for; False to count the waiting.
    """

    def sample(call: Callable[[], object], repeats: int) -> float:
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
        told = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, IndexError):
        return None
    return [value.strip() for value in told.split(",")]


def copy_bandwidth() -> float:
    """GB/s of a large device copy, read and written bytes counted."""
    source = torch.randn(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    seconds = device_times({"copy": lambda: target.copy_(source)}, 1)["copy"].median
    return 2 * source.nbytes / seconds / 1e9


# ---- the peers of a layer ----
@contextmanager
def engine(name: str) -> Iterator[None]:
    """Which kernel plain PyTorch convolves with: "cudnn" (or what it prefers), or "native"."""
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "depthwise_kernel"):
        with cudnn.flags(enabled=True, benchmark=True, depthwise_kernel=name):
            yield
    else:
        with cudnn.flags(enabled=name == "cudnn", benchmark=True):
            yield


def layer_ways(conv: nn.Conv2d, bn: nn.BatchNorm2d, layout: str) -> dict[str, Layer]:
    """conv + bn + ReLU6 in plain PyTorch, without torch.compile."""
    conv = copy.deepcopy(conv).to(memory_format=LAYOUTS[layout])
    folded = fuse_conv_bn_eval(conv, bn).to(memory_format=LAYOUTS[layout])
    return {
        "eager": lambda x: nn.functional.relu6(bn(conv(x))),
        "folded": lambda x: nn.functional.relu6(folded(x), inplace=True),
    }


def compile_ways(
    conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor, layout: str, modes: tuple[str, ...]
) -> dict[str, Layer]:
    module = nn.Sequential(copy.deepcopy(conv), bn, nn.ReLU6()).eval()
    module = module.to(memory_format=LAYOUTS[layout])
    ways = {}
    for mode in modes:
        torch._dynamo.reset()
        run = compiled(module, x, None if mode == "compile" else "max-autotune-no-cudagraphs")
        if run is not None:
            ways[mode] = run
    return ways


def first_call_seconds(call: Layer, x: Tensor) -> float:
    """Of a call that has to compile and tune: Triton's cache on disk starts empty, the one in
    memory keeps what an earlier row of the same layer and layout compiled."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TRITON_CACHE_DIR"] = empty
        try:
            torch.cuda.synchronize()
            start = time.perf_counter()
            call(x)
            torch.cuda.synchronize()
            return time.perf_counter() - start
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


def layer_row(
    model: str, shape: tuple[int, ...], batch: int, dtype: str, modes: tuple[str, ...]
) -> _Row:
    """Ours (every kernel, both layouts) and every peer, on one layer."""
    channels, height, width, kernel, stride, count = shape
    torch.manual_seed(1)
    conv = nn.Conv2d(
        channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False
    )  # fmt: skip
    bn = nn.BatchNorm2d(channels).eval()
    with torch.no_grad():
        bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2)
        bn.weight.uniform_(0.5, 2), bn.bias.normal_()
    conv, bn = conv.eval().to(DEVICE, DTYPES[dtype]), bn.to(DEVICE, DTYPES[dtype])
    scale, shift = fold(DTYPES[dtype], None, bn)
    first = torch.randn(batch, channels, height, width, device=DEVICE).to(DTYPES[dtype])
    some = slice(None, None, max(1, batch - 1))  # the first image and the last
    exact = nn.functional.relu6(
        copy.deepcopy(bn).double()(copy.deepcopy(conv).double()(first[some].double()))
    )
    nbytes = first.nbytes + batch * exact[0].numel() * first.element_size()
    number = min(MOST_INPUTS, max(2, -(-ROTATED_BYTES // nbytes)))
    l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)

    graphs: dict[str, Callable[[], object]] = {}
    calls: dict[str, Callable[[], object]] = {}
    errors, facts, first_call = {}, {}, {}

    def add(name: str, way: Layer, inputs: list[Tensor], kept: bool = True) -> None:
        replay, y = graph_of(way, inputs)
        replay()
        error = (y[some].double() - exact).abs().max().item() / exact.abs().max().item()
        errors[name] = error
        if error <= (TOLERANCE[dtype] if name.startswith("ours") else 5e-2):
            graphs[name] = replay
            if kept:
                calls[name] = partial(way, inputs[0])

    for layout, memory_format in LAYOUTS.items():
        inputs = [first.to(memory_format=memory_format)]
        inputs += [inputs[0].clone() for _ in range(number - 1)]

        def ours(x: Tensor, backend: str = "cuda") -> Tensor:
            return ops.dwconv_bn_act(
                x, conv.weight, scale, shift, stride=stride, padding=kernel // 2,
                activation="relu6", backend=backend,
            )  # fmt: skip

        chosen = _cuda.facts_of_call(
            list(first.shape), dtype, layout == "channels_last", list(conv.weight.shape), [stride],
            [kernel // 2],
        )  # fmt: skip
        told = ("variant", "blocks", "threads", "shared_bytes", "registers", "blocks_per_sm")
        facts[layout] = {name: getattr(chosen, name) for name in told}
        add(f"ours {layout}", ours, inputs)
        for variant in chosen.able:
            _cuda.force_variant(variant)
            try:
                add(f"ours {layout}, {variant}", ours, inputs, kept=False)
            finally:
                _cuda.force_variant("")
        if backends.why_not("triton", device=DEVICE) is None:
            way, call = f"ours {layout}, triton", partial(ours, backend="triton")
            errors[way] = float("inf")  # where it cannot even be called
            try:
                first_call[layout] = first_call_seconds(call, inputs[0])
                add(way, call, inputs)
            except Exception as error:  # CUDA's rows still count
                print(f"{way}: {type(error).__name__}: {error}")
        for name in ("cudnn", "native"):
            with engine(name):
                for way, call in layer_ways(conv, bn, layout).items():
                    add(f"{way} {name} {layout}", call, inputs, kept=name == "cudnn")
        with engine("cudnn"):
            for way, call in compile_ways(conv, bn, inputs[0], layout, modes).items():
                add(f"{way} {layout}", call, inputs)
        del inputs

    half = [torch.empty(nbytes // 2, dtype=torch.uint8, device=DEVICE) for _ in range(number)]
    graphs["copy"], _ = graph_of(torch.clone, half)
    with engine("cudnn"):
        times = device_times(graphs, number)
        plain = device_times(calls, 1, lead=False) if batch <= 32 else {}
    peers = [n for n in times if not n.startswith("ours") and n != "copy"]
    best = min(peers, key=lambda name: times[name].median)
    row: _Row = {
        "model": model, "shape": list(shape[:5]), "count": count, "batch": batch, "dtype": dtype,
        "bytes": nbytes, "cold": number * nbytes > 3 * l2, "best_peer": best, "kernel": facts,
        "us": {n: s.summary(1e-6) for n, s in times.items()},
        "call_us": {n: s.summary(1e-6) for n, s in plain.items()}, "error": errors,
        "triton_first_call_s": first_call,
        "ours_correct": all(n in graphs for n in errors if n.startswith("ours")),
    }  # fmt: skip
    eager = min((n for n in peers if "eager" in n), key=lambda n: times[n].median)
    compiled_ways = [n for n in peers if n.startswith(("compile", "max-autotune"))]
    for layout in LAYOUTS:
        for key in (layout, f"{layout}, triton"):
            spread = times.get(f"ours {key}")
            if spread is None:
                continue
            row[key] = {
                "gb_per_s": nbytes / spread.median / 1e9,
                "fraction_of_copy": times["copy"].median / spread.median,
                "against_best_peer": ratio(times[best], spread).summary(),
                "against_eager": ratio(times[eager], spread).summary(),
            }
            if compiled_ways:
                fastest = min(compiled_ways, key=lambda n: times[n].median)
                row[key]["against_compile"] = ratio(times[fastest], spread).summary()
    return row


def call_once(shape: list[int], batch: int, dtype: str, layout: str) -> None:
    """One call of ours, for a profiler to look at."""
    channels, height, width, kernel, stride = shape
    x = torch.randn(batch, channels, height, width, device=DEVICE).to(DTYPES[dtype])
    weight = torch.randn(channels, 1, kernel, kernel, device=DEVICE).to(DTYPES[dtype])
    scale = torch.rand(channels, device=DEVICE)
    ops.dwconv_bn_act(
        x.to(memory_format=LAYOUTS[layout]), weight, scale, scale, stride=stride,
        padding=kernel // 2, activation="relu6", backend="cuda",
    )  # fmt: skip
    if x.is_cuda:
        torch.cuda.synchronize()


def layer_plan() -> list[tuple[Any, ...]]:
    """Arguments of layer_row, the rows that matter most first."""
    v1 = [("mobilenet_v1", s) for s in shapes("mobilenet_v1")]
    v3 = [("mobilenet_v3_large", s) for s in shapes("mobilenet_v3_large")]
    both = ("compile", "max-autotune")
    plan = [(*s, 256, dtype, both) for dtype in ("bfloat16", "float32") for s in v1]
    plan += [(*s, batch, "bfloat16", ("compile",)) for batch in (1, 32) for s in v1]
    plan += [(*s, 256, "bfloat16", ("compile",)) for s in v3]
    one = ("compile",)
    plan += [(*s, batch, "float32", one) for batch in (1, 32) for s in v1]
    plan += [(*s, batch, "bfloat16", one) for batch in (1, 32) for s in v3]
    plan += [(*s, batch, "float32", one) for batch in (256, 32, 1) for s in v3]
    plan += [(*s, batch, "float16", one) for batch in (256, 32, 1) for s in v1 + v3]
    return plan


# ---- whole networks ----
def networks() -> dict[str, Callable[[], nn.Module]]:
    found: dict[str, Callable[[], nn.Module]] = {"mobilenet_v1": models.mobilenet_v1}
    try:
        import torchvision

        found["mobilenet_v2"] = torchvision.models.mobilenet_v2
    except (ImportError, RuntimeError) as error:
        print(f"mobilenet_v2 is left out: {error}")
    return found


def network_row(name: str, batch: int, dtype: str, compile_too: bool) -> _Row:
    """Images per second and peak memory of swap, eager and torch.compile, as calls and graphs."""
    torch.manual_seed(1)
    model = networks()[name]().eval()
    randomise_batchnorm(model, torch.randn(4, 3, 224, 224), 0)
    model = model.to(DEVICE, DTYPES[dtype])
    x = torch.randn(batch, 3, 224, 224, device=DEVICE).to(DTYPES[dtype])
    last, model_last = x.to(memory_format=LAST), copy.deepcopy(model).to(memory_format=LAST)
    exact = copy.deepcopy(model).double()(x[:2].double())
    ways: dict[str, tuple[nn.Module | Layer, Tensor]] = {
        "ours channels_last": (swap(model_last), last),
        "ours contiguous": (swap(model), x),
        "eager channels_last": (model_last, last),
        "eager contiguous": (model, x),
    }
    if backends.why_not("triton", device=DEVICE) is None:
        second = swap(model_last, backend="triton")
        try:
            second(last)  # compiles and tunes
            ways["ours channels_last, triton"] = second, last
        except Exception as error:  # the other ways still count
            print(f"{name}, triton: {type(error).__name__}: {error}")
    if compile_too:
        torch._dynamo.reset()
        run = compiled(model_last, last)
        if run is not None:
            ways["compile channels_last"] = run, last
        if find_spec("torch_tensorrt") is not None:  # imports itself as a backend of torch.compile
            run = compiled(model_last, last, backend="tensorrt")
            if run is not None:
                ways["TensorRT channels_last"] = run, last

    graphs, calls, memory, errors = {}, {}, {}, {}
    for way, (call, given) in ways.items():
        call(given), call(given)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = call(given)
        memory[way] = torch.cuda.max_memory_allocated() - before
        errors[way] = (y[:2].double() - exact).abs().max().item() / exact.abs().max().item()
        calls[way] = partial(call, given)
        graphs[way], _ = graph_of(call, [given])
    plain = device_times(calls, 1, rounds=7, lead=False)
    replayed = device_times(graphs, 1, rounds=7)
    native = max(error for way, error in errors.items() if way.startswith("eager"))
    allowed = max(2 * native, TOLERANCE[dtype])
    return {
        "model": name, "batch": batch, "dtype": dtype, "error": errors, "peak_bytes": memory,
        "ours_correct": all(e <= allowed for n, e in errors.items() if n.startswith("ours")),
        "images_per_s": {n: batch / s.median for n, s in plain.items()},
        "images_per_s_graph": {n: batch / s.median for n, s in replayed.items()},
        "ms": {n: s.summary(1e-3) for n, s in plain.items()},
        "ms_graph": {n: s.summary(1e-3) for n, s in replayed.items()},
    }  # fmt: skip


def network_plan() -> list[tuple[Any, ...]]:
    names = list(networks())
    both = ("bfloat16", "float32")
    return [(n, batch, dtype, True) for dtype in both for batch in (256, 1, 32) for n in names]


def work(stage: str, seconds: float, output: Path) -> None:
    """Rows of a stage as JSON lines, each written when it is done."""
    clock = Clock(seconds)
    if stage == "training":
        import gpu_training  # it measures as this file does

        plan = gpu_training.plan()
    elif stage == "separable":
        import gpu_separable  # likewise

        plan = [(gpu_separable.row, *arguments) for arguments in gpu_separable.plan()]
    elif stage == "conv":
        import gpu_conv  # likewise

        plan = [(gpu_conv.row, *arguments) for arguments in gpu_conv.plan()]
    elif stage == "layers":
        plan = [(layer_row, *arguments) for arguments in layer_plan()]
    else:
        plan = [(network_row, *arguments) for arguments in network_plan()]
    with open(output, "w") as lines, torch.no_grad():
        for number, (make, *arguments) in enumerate(plan):
            if clock.spent() > 0.95:
                print(f"{stage}: out of time, {len(plan) - number} of {len(plan)} rows left out")
                break
            if clock.spent() > 0.6 and stage != "networks":
                arguments[-1] = ()  # compiling costs most
            torch.cuda.empty_cache()
            try:
                row = make(*arguments)
                row["clocks_mhz"] = smi("clocks.sm,clocks.mem")  # still as they were under load
            except Exception as error:  # the other rows still count
                row = {"left_out": f"{arguments[:-1]}: {type(error).__name__}: {error}"}
                print(f"{stage}: left out: {row['left_out']}")
            lines.write(json.dumps(row) + "\n")
            lines.flush()
