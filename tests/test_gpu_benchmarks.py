"""`make gpu`'s benchmarks as far as they go without a GPU: every row's code on the CPU, with small
shapes, plain calls in place of graphs, and the reference in place of the kernels of training."""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mnet_kernels
from mnet_kernels import backends, ops, reference
from mnet_kernels.registration import explicit_padding, pair
from mnet_kernels.timing import Spread

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHAPE = (8, 12, 12, 3, 2, 1)


@pytest.fixture
def gpu(monkeypatch):
    """The module gpu; it and all that it runs, on the CPU."""
    pytest.importorskip("mnet_kernels._cuda", exc_type=ImportError)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu
    import gpu_networks
    import gpu_timing
    import gpu_training

    def graph_of(call, inputs):
        return (lambda: [call(x) for x in inputs]), call(inputs[0])

    def device_times(calls, parts, rounds=3, lead=True):
        samples = {name: [] for name in calls}
        for _ in range(3):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                samples[name].append((time.perf_counter() - start) / parts)
        return {name: Spread(tuple(values)) for name, values in samples.items()}

    def training(x, weight, gamma, beta, *running, stride, padding, backend, **constants):
        padding = explicit_padding(x, weight, pair(stride), padding, (1, 1))
        conv = reference.conv_bn_act(
            x, weight, stride=pair(stride), padding=padding, groups=x.shape[1],
            activation="identity",
        )  # fmt: skip
        z = torch.nn.functional.batch_norm(conv, *running, gamma, beta, training=True)
        return reference.ACTIVATIONS[constants["activation"]](z, 0.0)

    of_operator = ops.dwconv_bn_act
    monkeypatch.setattr(gpu_timing, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_timing, "ROTATED_BYTES", 1)
    monkeypatch.setattr(gpu_timing, "graph_of", graph_of)
    monkeypatch.setattr(gpu_timing, "device_times", device_times)
    monkeypatch.setattr(gpu_networks, "SIZE", 32)
    monkeypatch.setattr(gpu_training, "backends_of_ours", lambda: ["cuda", "triton"])
    monkeypatch.setattr(mnet_kernels, "dwconv_bn_act_training", training, raising=False)
    monkeypatch.setattr(
        ops, "dwconv_bn_act", lambda *a, **k: of_operator(*a, **k | {"backend": "cpu"})
    )
    monkeypatch.setattr(backends, "why_not", lambda *a, **k: None)
    properties = SimpleNamespace(L2_cache_size=1 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    yield gpu
    for module in [name for name in sys.modules if name.split("_")[0] == "gpu"]:
        sys.modules.pop(module, None)


FACTS = {"gpu": "none", "torch": "2", "commit": "c", "date": "d", "copy_gb_per_s": 1.0}


def test_layers(gpu):
    import gpu_layers

    with torch.no_grad():
        row = gpu_layers.layer_row("mobilenet_v1", SHAPE, 2, "float32", ())
        again = gpu_layers.layer_row("mobilenet_v1", SHAPE, 2, "float32", ())
    assert set(row["triton_first_call_s"]) == {"channels_last", "contiguous"}
    assert again["triton_first_call_s"] == {}  # it would throw away what is compiled
    assert row["ours_correct"], row["error"]
    for way in ("channels_last", "contiguous", *sys.modules["gpu_table"].TRITON):
        assert row[way]["fraction_of_copy"] > 0 and row[way]["against_best_peer"]["rounds"] == 3
    peers = {name.rsplit(" ", 1)[0] for name in row["us"] if not name.startswith(("ours", "copy"))}
    assert peers == {"eager cudnn", "eager native", "folded cudnn", "folded native"}
    table = gpu.table({"environment": FACTS, "stages": {"layers": {"passed": True, "rows": [row]}}})
    (line,) = [line for line in table.splitlines() if line.startswith("| 8, 12, 3, 2")]
    assert line.count("%") == 4 and "WRONG" not in line


def test_goals_are_told(gpu):
    rows = [
        {"model": "mobilenet_v1", "shape": list(SHAPE[:5]), "batch": batch, "dtype": "bfloat16",
         "cold": True, "best_peer": "p", "us": {"p": {"median": 1.0}}, "error": {},
         "triton_first_call_s": {},
         "channels_last, triton": {"fraction_of_copy": part, "against_compile": {"median": by},
                                   "against_best_peer": {"median": by}}}
        for batch, part, by in ((256, 0.9, 1.5), (256, 0.8, 1.1), (1, 0.1, 0.97))
    ]  # fmt: skip
    table = gpu.table({"environment": FACTS, "stages": {"layers": {"passed": True, "rows": rows}}})
    assert "triton: 1 of 2 V1 layers at batch 256 in bfloat16 reach 85 % of copy" in table
    assert "triton: slower than torch.compile in 1 of 3 rows, the slowest 0.97x" in table


NCU = """==PROF== Profiling "dwconv_channels_last_stream"
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","dwconv_channels_last_stream","Speed Of Light","DRAM Throughput","%","81.2"
"0","dwconv_channels_last_stream","Occupancy","Achieved Occupancy","%","23.9"
"""


def test_the_profiler_is_asked_about_what_lags(gpu, monkeypatch):
    import gpu_layers
    import gpu_stages

    rows = [
        {"shape": list(SHAPE[:5]), "batch": batch, "dtype": "float32",
         "contiguous": {"against_best_peer": {"median": speedup}, "fraction_of_copy": part}}
        for batch, speedup, part in ((1, 1.2, 0.1), (1, 0.9, 0.1), (256, 1.5, 0.95), (256, 0.8, 1))
    ]  # fmt: skip
    calls = gpu_stages.lagging(rows)
    assert [(call["batch"], call["layout"]) for call in calls] == [
        (256, "contiguous"), (1, "contiguous")
    ]  # fmt: skip
    gpu_layers.call_once(**calls[0] | {"batch": 1})
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: "ncu")
    monkeypatch.setattr(gpu_stages, "run", lambda command, seconds: (0, NCU))
    stage = gpu_stages.profile(100, rows)
    assert stage["rows"][0]["figures"]["DRAM Throughput"] == "81.2 %"
    assert "DRAM Throughput 81.2 %; Achieved Occupancy 23.9 %" in gpu.table(
        {"environment": FACTS, "stages": {"profile": stage}}
    )
    monkeypatch.setattr(gpu_stages, "run", lambda command, seconds: (1, "ERR_NVGPUCTRPERM"))
    assert "ERR_NVGPUCTRPERM" in gpu_stages.profile(100, rows)["left_out"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training(gpu, dtype):
    import gpu_training as training

    with torch.no_grad():
        row = training.layer_row("mobilenet_v1", SHAPE, 4, dtype, ())
        assert row["ours_correct"], row["error"]
        assert set(row["ours"]) == {
            f"ours {layout}{name}" for name in ("", ", triton") for layout in training.LAYOUTS
        } | {f"ours channels_last, {variant}" for variant in training.BACKWARDS}
        size = 4 * 8 * (12 * 12 * 5 + 6 * 6 * 3)
        assert row["bytes"] == size * (4 if dtype == "float32" else 2)
        stage = {"passed": True, "rows": [row]}
    table = gpu.table({"environment": FACTS, "stages": {"training": stage}})
    assert sum(line.startswith("| 8, 12, 3, 2") for line in table.splitlines()) == 6


def test_training_steps(gpu):
    import gpu_training as training

    with torch.no_grad():
        row = training.step_row("mobilenet_v1 alpha 0.5", 32, 2, "float32", ())
    assert row["ours_correct"], row["loss"]
    assert set(row["peak_bytes"]) == set(row["images_per_s"]) and len(row["peak_bytes"]) == 4
    table = gpu.table({"environment": FACTS, "stages": {"training": {"passed": 1, "rows": [row]}}})
    assert "| mobilenet_v1 alpha 0.5, 32 | 2 | float32 | ours channels_last |" in table


def test_a_wrong_gradient_is_no_result(gpu, monkeypatch):
    import gpu_training as training

    right = mnet_kernels.dwconv_bn_act_training
    monkeypatch.setattr(
        mnet_kernels, "dwconv_bn_act_training", lambda *a, **k: right(*a, **k) * 1.001
    )
    with torch.no_grad():
        row = training.layer_row("mobilenet_v1", SHAPE, 4, "float32", ())
    assert not row["ours_correct"] and row["ours"] == {}


def test_every_row_of_the_plans_is_a_call(gpu):
    import gpu_layers
    import gpu_networks
    import gpu_training

    assert abs(sum(gpu.SHARES.values()) - 1) < 1e-9
    rows = gpu_training.plan()
    layers = [arguments for make, *arguments in rows if make is gpu_training.layer_row]
    assert {(a[1][:5], a[3]) for a in layers} >= {
        (shape[:5], dtype)
        for shape in gpu_training.shapes("mobilenet_v1") for dtype in ("bfloat16", "float32")
    }  # fmt: skip
    assert all(len(arguments) == 5 for _, *arguments in rows)
    batches = {(a[0], a[2], a[3]) for _, *a in gpu_layers.plan()}
    assert batches == {
        (model, batch, dtype)
        for model in ("mobilenet_v1", "mobilenet_v3_large") for batch in (1, 32, 256)
        for dtype in ("float32", "bfloat16", "float16")
    }  # fmt: skip
    # What the goals speak of comes first.
    assert [row[1:4] for row in gpu_networks.plan()[:2]] == [
        ("mobilenet_v1", 256, "bfloat16"), ("mobilenet_v1", 1, "bfloat16"),
    ]  # fmt: skip


@pytest.mark.parametrize("which", ["separable", "conv"])
def test_fused_operators(gpu, monkeypatch, which):
    """The rows of gpu_separable and gpu_conv; conv_bn_act is native's here."""
    import gpu_conv
    import gpu_separable

    from mnet_kernels.triton import operators

    def conv_bn_act(x, weight, scale, shift, stride, padding, dilation, activation, slope, tf32):
        return ops.conv_bn_act(
            x, weight, scale, shift, stride=stride[0], padding=padding[0], activation=activation,
            backend="native",
        )  # fmt: skip

    def triton_conv(x, weight, scale, shift, stride, padding, dilation, activation, slope):
        assert (len(stride), len(padding), len(dilation)) == (2, 4, 2)
        return ops.conv_bn_act(
            x, weight, scale, shift, stride=stride, padding=padding, activation=activation,
            backend="native",
        )  # fmt: skip

    def triton_separable(x, *args):
        assert tuple(map(len, args[7:10])) == (1, 4, 1)  # as schemas take them
        return torch.ops.mnet_kernels.separable_conv.default(x, *args)

    monkeypatch.setattr(operators, "conv_bn_act", triton_conv)
    monkeypatch.setattr(operators, "separable_conv", triton_separable)
    monkeypatch.setattr(gpu_conv, "_conv_bn_act", conv_bn_act)
    module = {"separable": gpu_separable, "conv": gpu_conv}[which]
    assert all(len(arguments) == 4 for _, *arguments in module.plan())
    with torch.no_grad():
        row = module.row((8, 12, 12, 3, 2, 16, 1), 2, "float32", ())
    ours = {name for name in row["error"] if name.startswith("ours")}
    assert row["ours_correct"], row["error"]
    assert {
        "ours",
        "ours, without TF32",
        "ours, triton",
        *(f"ours, {v}" for v in row["kernel"]["able"]),
    } <= ours
    assert row["multiply_adds"] == 2 * 16 * 36 * (8 if which == "separable" else 72)
    stage = {which: {"passed": True, "rows": [row]}}
    table = gpu.table({"environment": FACTS, "stages": stage})
    (line,) = [line for line in table.splitlines() if line.startswith("| 8, 12, 3, 2, 16")]
    assert "WRONG" not in line
    assert line.count("| - ") == (2 if which == "conv" else 0)  # ours in two passes


def test_networks(gpu, monkeypatch):
    import gpu_networks

    monkeypatch.setattr(gpu_networks, "swap", lambda model, backend=None: mnet_kernels.swap(model))
    with torch.no_grad():
        row = gpu_networks.network_row("mobilenet_v1", 2, "float32", ())
    assert row["ours_correct"], row["error"]
    assert set(row["images_per_s"]) == set(row["images_per_s_graph"]) == {
        "ours channels_last", "ours contiguous", "ours channels_last, triton",
        "eager channels_last", "eager contiguous",
    }  # fmt: skip
    stage = {"networks": {"passed": True, "rows": [row]}}
    table = gpu.table({"environment": FACTS, "stages": stage})
    assert "| mobilenet_v1, 2, float32 | ours channels_last, triton |" in table


def test_a_way_that_fails_costs_itself_alone(gpu, monkeypatch):
    """A wrong one of ours is told; a peer that cannot is left out; a lost device is the row's."""
    import gpu_networks
    import gpu_timing

    def swap(model, backend=None):
        def fails(x):
            raise RuntimeError("no kernel")

        return fails if backend == "triton" else mnet_kernels.swap(model)

    monkeypatch.setattr(gpu_networks, "swap", swap)
    with torch.no_grad():
        row = gpu_networks.network_row("mobilenet_v1", 2, "float32", ())
    assert row["error"]["ours channels_last, triton"] is None and not row["ours_correct"]
    assert "ours channels_last, triton" not in row["images_per_s"] and len(row["ms"]) == 4

    def lost(x):
        raise torch.AcceleratorError("illegal memory access")

    race = gpu_timing.Race(lambda name, y: (0.0 if name != "ours nan" else float("nan"), True))
    x = torch.randn(2, 3)
    race.add("ours", torch.clone, [x])
    race.add("ours nan", torch.clone, [x])
    race.add("ours broken", lambda x: x @ x, [x])
    race.add("peer", torch.clone, [x])
    race.add("broken peer", lambda x: x @ x, [x])
    with pytest.raises(torch.AcceleratorError):
        race.add("another", lost, [x])
    _, told = race.run(24, 1, called=True)
    assert told["error"] == {"ours": 0.0, "ours nan": None, "ours broken": None, "peer": 0.0}
    assert not told["ours_correct"] and told["best_peer"] == "peer"
    json.dumps(told, allow_nan=False)


# ---- what is wrong and what is only rounded ----
def block_of(kind: str, channels: int):
    import gpu_conv
    import gpu_separable

    from mnet_kernels.subjects import randomise_batchnorm

    shape = {
        "block": (channels, 12, 12, 3, 1, 24, 1), "conv": (channels, 12, 12, 1, 1, 24, 1),
        "stem": (3, 24, 24, 3, 2, 32, 1),
    }[kind]  # fmt: skip
    module = (gpu_separable.block if kind == "block" else gpu_conv.layer)(shape).eval()
    x = torch.randn(4, *shape[:3])
    randomise_batchnorm(module, x[:2], 0)
    return module, x


def to_tf32(t, nearest: bool):
    """10 bits of mantissa: to the nearest, or the rest cut off."""
    bits = t.float().contiguous().view(torch.int32)
    return ((bits + 0x1000 if nearest else bits) & ~0x1FFF).view(torch.float32)


def run_as(module, x, factor, fault=lambda index, x, weight: (x, weight)):
    """In float32, with factor() of both factors of dense convolutions."""
    parts = iter(module)
    for index, (conv, bn, act) in enumerate(zip(parts, parts, parts, strict=True)):
        weight = conv.weight
        if conv.groups == 1:
            x, weight = factor(x), factor(weight)
        x, weight = fault(index, x, weight)
        z = torch.nn.functional.conv2d(x, weight, None, conv.stride, conv.padding, 1, conv.groups)
        x = act(bn(z))
    return x


def last_of(module) -> int:
    return len(module) // 3 - 1


CASES = [("stem", 3), ("conv", 960), ("block", 32), ("block", 1024)]


@pytest.mark.parametrize("nearest", [True, False], ids=["nearest", "cut off"])
@pytest.mark.parametrize("kind,channels", CASES)
@torch.no_grad()
def test_rounding_to_tf32_is_no_error(gpu, kind, channels, nearest):
    from gpu_errors import allowed

    module, x = block_of(kind, channels)
    y = run_as(module, x, lambda t: to_tf32(t, nearest))
    wide = copy.deepcopy(module).double()
    off = (y.double() - wide(x.double())).abs()
    assert (off <= allowed(wide, x.double(), torch.float32, tf32=True)).all()
    # Which rounding it is shows: it is more than float32 may have.
    assert not (off <= allowed(wide, x.double(), torch.float32)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind,channels", CASES)
@torch.no_grad()
def test_rounding_to_the_dtype_is_no_error(gpu, kind, channels, dtype):
    from gpu_errors import allowed

    module, x = block_of(kind, channels)
    module, x = module.to(dtype), x.to(dtype)
    exact = copy.deepcopy(module).double()

    def stored(index, x, weight):
        return x.to(dtype).float(), weight

    y = run_as(copy.deepcopy(module).float(), x.float(), lambda t: t, stored).to(dtype)
    off = (y.double() - exact(x.double())).abs()
    assert (off <= allowed(exact, x.double(), dtype)).all()


def a_channel_of_the_depth(index, x, weight):
    weight = weight.clone()
    weight[:, weight.shape[1] // 2] = 0
    return x, weight


def a_pixel(index, x, weight):
    return x.roll(1, 3), weight


def a_neighbours_weights(index, x, weight):
    return x, weight.roll(1, 0)


def bfloat16(index, x, weight):
    return x.bfloat16().float(), weight.bfloat16().float()


@pytest.mark.parametrize("fault", [a_channel_of_the_depth, a_pixel, a_neighbours_weights, bfloat16])
@pytest.mark.parametrize("kind,channels", CASES)
@torch.no_grad()
def test_what_is_wrong_is_found_in_spite_of_tf32(gpu, kind, channels, fault):
    from gpu_errors import allowed

    module, x = block_of(kind, channels)
    at = last_of(module)
    y = run_as(
        module, x, lambda t: to_tf32(t, True),
        lambda index, *factors: fault(index, *factors) if index == at else factors,
    )  # fmt: skip
    wide = copy.deepcopy(module).double()
    off = (y.double() - wide(x.double())).abs()
    wrong = off > allowed(wide, x.double(), torch.float32, tf32=True)
    assert wrong.float().mean() > (1e-4 if fault is bfloat16 else 0.05)
