"""One kind of row for every result: of `make bench`, `make gpu` and `mnet-kernels compare`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: The name that rows give to this package's own time; the other layout's has it before its name.
OURS = "ours"
COPY = "copy"
#: Facets that tell groups of rows apart, in the order in which a title names them.
FACETS = ("model", "dtype", "batch", "direction", "layout", "threads", "cache", "malloc", "gpu")


@dataclass(frozen=True)
class Spread:
    """A median and its 20th and 80th percentile."""

    median: float
    low: float
    high: float

    @staticmethod
    def read(told: Mapping[str, Any]) -> Spread:
        """From a result file's {median, p20, p80}.

        Raises:
            ValueError: these are no positive numbers in their order.
        """
        median = float(told["median"])
        spread = Spread(median, float(told.get("p20", median)), float(told.get("p80", median)))
        if not 0 < spread.low <= median <= spread.high < float("inf"):
            raise ValueError(f"expected positive numbers, got {dict(told)}")
        return spread


@dataclass(frozen=True)
class Row:
    """What one row of a result says. ``us``: microseconds a call of every way to run it."""

    kind: str  #: layer, pair, network, training, overhead
    name: str
    facets: Mapping[str, str]
    us: Mapping[str, Spread]
    best: str  #: the fastest of the others
    speedup: Spread  #: against it, round by round
    verdict: str  #: faster, slower, noise
    error: Mapping[str, float | None]  #: to float64, relative to the largest output
    flops: float | None = None
    bytes: float | None = None
    of_copy: float | None = None
    of_matrix: float | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    #: Against the fastest that plain PyTorch has, and the fastest engine; the latter's name.
    torch: Spread | None = None
    engine: Spread | None = None
    best_engine: str = ""
    #: Only of a comparison: what error is allowed, equal top-5, where the weights are from, ...
    allowed: float | None = None
    ok: bool = True
    top5: str = ""
    weights: str = ""
    fused: int | None = None
    pattern: str = ""

    @property
    def peers(self) -> list[str]:
        """The ways that are not ours."""
        return [way for way in self.us if way != COPY and not way.startswith(OURS)]

    @property
    def torch_alone(self) -> float | None:
        """The speed-up against PyTorch, where an engine is faster than that."""
        engine_won = self.torch is not None and self.best == self.best_engine
        return self.torch.median if self.torch is not None and engine_won else None

    @property
    def others(self) -> dict[str, float]:
        """Our other layouts' speed-ups, medians over medians."""
        best = self.us[self.best].median
        return {
            way.removeprefix(OURS).strip(): best / spread.median
            for way, spread in self.us.items()
            if way.startswith(f"{OURS} ")
        }


@dataclass(frozen=True)
class Run:
    """The course of a training run: rows of metrics.csv."""

    name: str
    rows: list[dict[str, float]]


def verdict_of(speedup: Spread) -> str:
    """A win or a loss only where four fifths of the rounds say so."""
    if speedup.low > 1:
        return "faster"
    return "slower" if speedup.high < 1 else "noise"


def of_benchmarks(result: Mapping[str, Any], malloc: bool) -> list[Row]:
    """Rows of pytest-benchmark's JSON, see benchmarks/README.md; older ones lack some keys."""
    found = []
    for number, benchmark in enumerate(result["benchmarks"]):
        told = benchmark["extra_info"]
        if "us" not in told:
            continue  # a benchmark of another kind
        try:
            found.append(_benchmark(told, malloc))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            name = benchmark.get("name", number)
            raise ValueError(f"row {name} cannot be read: {_said(error)}") from None
    return found


def _benchmark(told: Mapping[str, Any], malloc: bool) -> Row:
    us = {way: Spread.read(spread) for way, spread in told["us"].items()}
    speedup = Spread.read(told["speedup"])
    network = told["kind"] in ("network", "training")
    facets = {
        "model": "" if network else str(told.get("model", "")),
        "dtype": str(told["dtype"]),
        "batch": "" if network else f"batch {told['batch']}",
        "direction": str(told.get("direction", "forward")).replace("+", " + "),
        "layout": str(told.get("layout", "" if network else "channels_last")),
        "threads": _counted(told.get("threads"), "thread"),
        "cache": str(told.get("cache", "")),
        "malloc": "tuned malloc" if malloc else "default malloc" if network else "",
    }
    size = f", {told['size']} px" if told.get("size") else ""
    name = f"{told.get('model')}{size}, batch {told['batch']}"
    return Row(
        kind=str(told["kind"]),
        name=name if network else _shape(told["shape"], told.get("out_channels")),
        facets=facets,
        us=us,
        best=_known(told["best_peer"], us),
        speedup=speedup,
        verdict=verdict_of(speedup),  # which is what the row's own says, where it has one
        error=_errors(told.get("error", {})),
        flops=_number(told.get("flops")),
        bytes=_number(told.get("bytes")),
        of_copy=_number(told.get("fraction_of_copy")),
        of_matrix=_number(told.get("fraction_of_matrix")),
        missing={str(k): str(v) for k, v in (told.get("missing_peers") or {}).items()},
        torch=Spread.read(told["speedup_torch"]) if told.get("speedup_torch") else None,
        engine=Spread.read(told["speedup_engine"]) if told.get("speedup_engine") else None,
        best_engine=str(told.get("best_engine") or ""),
    )


def of_gpu(result: Mapping[str, Any]) -> list[Row]:
    """`make gpu`'s result: a row a layer and layout; of networks one for calls, one for graphs."""
    found = []
    for told in result["stages"].get("layers", {}).get("rows", []):
        us = {way: Spread.read(spread) for way, spread in told["us"].items()}
        for layout in ("channels_last", "contiguous"):
            if layout not in told:
                continue  # it was wrong, and not timed
            speedup = Spread.read(told[layout]["against_best_peer"])
            peers = {way: spread for way, spread in us.items() if not way.startswith(OURS)}
            error = {w: e for w, e in told["error"].items() if not w.startswith(OURS)}
            found.append(
                Row(
                    kind="layer",
                    name=_shape(told["shape"]),
                    facets={
                        "model": str(told["model"]),
                        "dtype": str(told["dtype"]),
                        "batch": f"batch {told['batch']}",
                        "layout": layout,
                        "cache": "cold" if told.get("cold") else "in L2",
                        "gpu": "GPU",
                    },
                    us={OURS: us[f"{OURS} {layout}"], **peers},
                    best=_known(told["best_peer"], us),
                    speedup=speedup,
                    verdict=verdict_of(speedup),
                    error=_errors(error | {OURS: told["error"].get(f"{OURS} {layout}")}),
                    bytes=_number(told.get("bytes")),
                    of_copy=_number(told[layout].get("fraction_of_copy")),
                )
            )
    for told in result["stages"].get("networks", {}).get("rows", []):
        for key, words in (("ms", ""), ("ms_graph", ", CUDA graph")):
            found += _gpu_network(told, key, words)
    return found


def _gpu_network(told: Mapping[str, Any], key: str, words: str) -> list[Row]:
    us = {way: Spread.read(_scaled(ms, 1000)) for way, ms in told[key].items()}
    layout = "channels_last"
    if f"{OURS} {layout}" not in us:
        return []
    us[OURS] = us.pop(f"{OURS} {layout}")
    peers = [way for way in us if not way.startswith(OURS)]
    best = min(peers, key=lambda way: us[way].median)
    slow, fast = us[best], us[OURS]
    # There are no ratios by round: the widest that the two spreads allow.
    speedup = Spread(slow.median / fast.median, slow.low / fast.high, slow.high / fast.low)
    error = {w.replace(f"{OURS} {layout}", OURS): e for w, e in told["error"].items()}
    return [
        Row(
            kind="network",
            name=f"{told['model']}, batch {told['batch']}{words}",
            facets={"dtype": str(told["dtype"]), "layout": layout, "gpu": "GPU"},
            us=us,
            best=best,
            speedup=speedup,
            verdict=verdict_of(speedup),
            error=_errors(error),
            ok=bool(told["ours_correct"]),
        )
    ]


def of_comparison(result: Mapping[str, Any]) -> list[Row]:
    """Networks and layers of :func:`mnet_kernels.compare.compare`'s result."""
    ways = {"swapped": OURS}
    found = []
    for told in [*result["rows"], *result["layers"]]:
        layer = "layer" in told
        us = {
            ways.get(way, way).replace("_", " ", 1): Spread.read(_scaled(time, 1000))
            for way, time in told["time_ms"].items()
        }
        speedup = Spread.read(told["speedup"])
        error = {ways.get(k, k).replace("_", " ", 1): v for k, v in told["error"].items()}
        answers = told.get("answers")
        found.append(
            Row(
                kind="layer" if layer else "network",
                name=str(told["layer"]) if layer else f"{told['model']}, batch {told['batch']}",
                facets={
                    "model": str(told["model"]) if layer else "",
                    "dtype": str(told.get("dtype", "")),
                    "batch": f"batch {told['batch']}" if layer else "",
                },
                us=us,
                best=_known(told["best_native"].replace("_", " ", 1), us),
                speedup=speedup,
                verdict=verdict_of(speedup),
                error=_errors({k: v for k, v in error.items() if k != "tolerance"}),
                allowed=_number(error.get("tolerance")),
                ok=bool(told["ok"]),
                top5=f"{answers['top5_same']}/{answers['images']}" if answers else "",
                weights=str(told.get("weights", "")),
                fused=None if told.get("fused") is None else int(told["fused"]),
                pattern=str(told.get("pattern", "")),
            )
        )
    return found


def _scaled(spread: Mapping[str, Any], by: float) -> dict[str, float]:
    return {key: by * float(spread[key]) for key in ("median", "p20", "p80") if key in spread}


def _shape(shape: list[int], out_channels: int | None = None) -> str:
    """``512 · 14² · s1``; the kernel too where it is not 3x3."""
    channels, height, width, kernel, stride = shape[:5]
    grid = f"{height}²" if height == width else f"{height}x{width}"
    taps = "" if kernel == 3 else f"{kernel}x{kernel} "
    wide = f"{channels}→{out_channels}" if out_channels else f"{channels}"
    return f"{wide} · {grid} · {taps}s{stride}"


def _errors(told: Mapping[str, Any]) -> dict[str, float | None]:
    return {way: _number(error, least=0) for way, error in told.items()}


def _number(value: Any, least: float = 1e-300) -> float | None:
    """A finite number from ``least``, or None."""
    if value is None:
        return None
    if not least <= float(value) < float("inf"):
        raise ValueError(f"expected a number from {least:g}, got {value}")
    return float(value)


def _known(way: str, us: Mapping[str, Spread]) -> str:
    if way not in us:
        raise ValueError(f"its best peer {way!r} was not timed")
    return way


def _counted(number: int | None, what: str) -> str:
    return "" if number is None else f"{number} {what}{'s' if number != 1 else ''}"


def _said(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)
