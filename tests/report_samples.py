"""For the tests of the report: small results of every kind, and a reader of pages."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from mnet_kernels._version import __version__

MACHINE = {
    "date": "2026-01-01T00:00:00+00:00", "commit": "abc1234", "mnet_kernels": __version__,
    "cpu": "A processor", "instruction_set": "avx2", "threads": 2, "torch": "2.14.1",
}  # fmt: skip
CEILINGS = {
    "method": "best of ten",
    "threads": {
        "2": {
            "copy_gb_per_s": {"65536": 100.0, "268435456": 20.0},
            "matrix_gflop_per_s": {"float32": 150.0},
        }
    },
}


def spread(median: float, by: float = 0.05) -> dict[str, float]:
    return {"median": median, "p20": median * (1 - by), "p80": median * (1 + by), "rounds": 11}


def benchmark(kind: str, ours: float, peer: float, **more: Any) -> dict[str, Any]:
    """One benchmark; ``ours`` and ``peer`` in microseconds."""
    layer = kind in ("layer", "pair")
    row: dict[str, Any] = {
        "kind": kind, "model": "mobilenet_v1", "batch": 1, "dtype": "float32", "threads": 2,
        "direction": "forward", "cache": "warm", "layout": "channels_last",
        "us": {"ours": spread(ours), "eager": spread(3 * peer), "onnxruntime": spread(peer)},
        "best_peer": "onnxruntime", "speedup": spread(peer / ours),
        "error": {"ours": 1e-7, "eager": 2e-7, "onnxruntime": 1.5e-7},
        "best_torch": "eager", "speedup_torch": spread(3 * peer / ours),
        "best_engine": "onnxruntime", "speedup_engine": spread(peer / ours),
        "missing_peers": {"openvino": "not installed"},
    }  # fmt: skip
    if layer:
        row |= {"shape": [32, 112, 112, 3, 1], "count": 1, "flops": 7.2e6, "bytes": 3.2e6}
        row["us"] |= {"ours contiguous": spread(2 * ours), "copy": spread(ours / 3)}
        row["fraction_of_copy"] = 1 / 3
    else:
        row["size"] = 224
    row |= {"out_channels": 64} if kind == "pair" else {}
    return {"name": f"test[{kind}-{ours}]", "extra_info": row | more}


def bench(*benchmarks: dict[str, Any], **environment: Any) -> dict[str, Any]:
    return {
        "version": "5.3.1",
        "machine_info": {"mnet_kernels": MACHINE | {"malloc": {}} | environment},
        "benchmarks": list(benchmarks),
    }


def full_bench() -> dict[str, Any]:
    """Wins, a loss, noise, every kind of row, in more than one group."""
    shapes = ([64, 112, 112, 3, 2], [72, 56, 56, 5, 2], [1024, 7, 7, 7, 1])
    layers = [
        benchmark("layer", 50.0, 50.0 * gain, dtype=dtype, batch=batch, shape=shape)
        for dtype in ("float32", "bfloat16")
        for batch in (1, 16, 64)
        for shape, gain in zip(shapes, (2.5, 0.7, 1.01), strict=True)
    ]
    return bench(
        *layers,
        benchmark("pair", 80.0, 120.0),
        benchmark("network", 8000.0, 15000.0),
        benchmark("network", 9000.0, 8000.0, model="mobilenet_v3_large", batch=32),
        benchmark("training", 90000.0, 99000.0, direction="forward+backward"),
        benchmark("overhead", 10.0, 100.0, shape=[8, 4, 4, 3, 1]),
        ceilings=CEILINGS,
    )


def gpu() -> dict[str, Any]:
    ways = {"ours channels_last": 5.0, "ours contiguous": 8.0, "eager cudnn contiguous": 20.0}
    row = {
        "model": "mobilenet_v1", "shape": [32, 112, 112, 3, 1], "count": 1, "batch": 256,
        "dtype": "bfloat16", "bytes": 4e8, "cold": True, "best_peer": "eager cudnn contiguous",
        "us": {way: spread(us) for way, us in ways.items()} | {"copy": spread(4.0)},
        "error": dict.fromkeys(ways, 1e-3), "ours_correct": True,
        "channels_last": {"against_best_peer": spread(4.0), "fraction_of_copy": 0.8},
        "contiguous": {"against_best_peer": spread(2.5), "fraction_of_copy": 0.5},
    }  # fmt: skip
    ways = {"ours channels_last": 9.0, "ours contiguous": 12.0, "eager channels_last": 18.0}
    network = {
        "model": "mobilenet_v1", "batch": 256, "dtype": "bfloat16", "ours_correct": True,
        "error": dict.fromkeys(ways, 1e-3), "ms": {w: spread(t) for w, t in ways.items()},
        "ms_graph": {w: spread(t / 2) for w, t in ways.items()},
    }  # fmt: skip
    stages = {"layers": {"rows": [row]}, "networks": {"rows": [network]}}
    return {"environment": MACHINE | {"gpu": "A GPU"}, "stages": stages}


def metrics(epochs: int = 20, start: float = 2.3) -> str:
    """A metrics.csv of a run that learns."""
    lines = [
        "epoch,train_loss,train_accuracy,validation_loss,validation_accuracy,"
        "images_per_second,seconds"
    ]
    for epoch in range(1, epochs + 1):
        loss = start * 0.8**epoch
        lines.append(f"{epoch},{loss},{1 - loss / 3},{loss * 1.1},{1 - loss * 1.1 / 3},1000.0,1.5")
    return "\n".join(lines) + "\n"


def tradeoff() -> dict[str, Any]:
    rows = []
    for i, (label, top1) in enumerate(
        [("1.0-224", 0.709), ("1.0-192", 0.7), ("0.5-224", 0.633), ("VGG16", 0.716)]
    ):
        ms = 200.0 if label == "VGG16" else 15.0 / (1 + i)
        ways = {"native": 1.1 * ms, "native_channels_last": ms, "swapped": ms / 2}
        times = {way: spread(t) for way, t in ways.items()}
        rows.append({
            "label": label, "alpha": 1.0, "size": 224, "params": 4_253_864,
            "multiply_adds": 568_740_352, "model_bytes": 17_000_000,
            "peak_bytes": {"native": 3e7, "swapped": None}, "latency_ms": times,
            "throughput_ms": times, "best_native": "native_channels_last",
            "latency_speedup": spread(2.0), "throughput_speedup": spread(2.0),
            "images_per_second": {"native": 66.0, "swapped": 132.0},
            "error": {"native": 1e-6, "swapped": 1e-6, "tolerance": 1e-5}, "ok": True,
            "accuracy": {"top1": top1, "top5": 0.9, "kind": "published", "source": "A table",
                         "paper_top1": top1 - 0.003, "paper": "A paper"},
        })  # fmt: skip
    return {"schema": 1, "kind": "tradeoff", "environment": MACHINE, "rows": rows,
            "settings": {"batch": 8, "threads": 2}}  # fmt: skip


def comparison() -> dict[str, Any]:
    ways = {"native": 14.0, "native_channels_last": 12.0, "swapped": 6.0}
    common: dict[str, Any] = {
        "model": "mobilenet_v1", "batch": 1, "time_ms": {w: spread(t) for w, t in ways.items()},
        "best_native": "native_channels_last", "speedup": spread(2.0), "ok": True,
        "error": dict.fromkeys(ways, 1e-6) | {"tolerance": 1e-5},
    }  # fmt: skip
    label = {"label": "tabby", "probability": 0.7}
    network = {
        "size": 224, "dtype": "float32", "layout": "contiguous", "weights": "random", "fused": 27,
        "answers": {"images": 1, "top1_same": 1, "top5_same": 1},
        "photographs": [{"photograph": "chelsea", "native": [label], "swapped": [label]}],
    }  # fmt: skip
    layer = {"layer": "conv_dw_1", "pattern": "conv + bn + relu6", "backend": "cpu"}
    rows, layers = [common | network], [common | layer]
    return {"schema": 1, "environment": MACHINE, "rows": rows, "layers": layers}


class Page(HTMLParser):
    """Checks that tags nest, and collects what a browser would fetch or read out."""

    VOID = ("meta", "br", "rect", "line", "path")  # a path with a tip has an end

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.pictures: list[dict] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self.sorts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.fetched += [found[k] for k in ("src", "data", "xlink:href") if k in found]
        self.links += [found["href"]] if "href" in found else []
        self.ids += [found["id"]] if "id" in found else []
        if tag == "svg" and "aria-hidden" not in found:
            self.pictures.append(found | {"children": []})
        if tag == "th" and "aria-sort" in found:
            self.sorts.append(found["aria-sort"])
        if tag in ("title", "desc") and self.open[-1] == "svg":
            self.pictures[-1]["children"].append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in self.VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data)
