"""The one measurement that all rows share: who takes part, who is right, how fast they are.

README.md beside this says what is measured how, and what a row looks like.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from machine import SETTLE_S, bound, last_level_cache, matrix_rate
from peers import TORCH, Case, Missing, Peer, Ready
from peers_engines import ENGINES
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mnet_kernels.compare import tolerance
from mnet_kernels.timing import Spread, interleave, ratio, verdict

#: Rounding a folded weight to bfloat16 costs accuracy, which is no reason to leave a peer out: its
#: error is in the row.
ROOM_FOR_PEERS = 4
Call = Callable[[], Any]
Row = dict[str, Any]

#: In this order they are built: torch.export, which an engine uses, forgets what was compiled.
PEERS = [*ENGINES, *TORCH]
FAMILIES = {peer.name: peer.family for peer in PEERS}


def race(
    case: Case,
    ours: Mapping[str, Ready],
    peers: Sequence[Peer] = PEERS,
    *,
    left_out: Mapping[str, str] | None = None,
    cold: bool = False,
    budget_s: float = 1.5,
    **row: Any,
) -> tuple[Row, Call]:
    """Ours and every peer on one case.

    Args:
        ours: the first is ``ours``, the others are timed beside it.
        left_out: peers not to build, and why.
        cold: rotate through more inputs than the last-level cache holds.
        row: what the row says besides; ``bytes``, ``flops``: see :func:`timed`.

    Returns:
        The row, and the call of ours that was timed.

    Raises:
        AssertionError: ours is wrong.
    """
    dtype = str(case.dtype).removeprefix("torch.")
    rate = matrix_rate(case.threads, case.dtype)
    with bound(case.threads), torch.inference_mode():
        exact = copy.deepcopy(case.model).double()(case.x.double())
        ready, missing = _built(case, peers, left_out or {})
        inputs = [case.x]
        if cold:
            count = max(2, -(-2 * last_level_cache() // case.x.nbytes))
            inputs += [torch.randn_like(case.x) for _ in range(count - 1)]
        depth = sum(isinstance(m, (_ConvNd, nn.Linear)) for m in case.model.modules())
        strict = tolerance(error_of(case.model(case.x), exact), depth, dtype)
        errors: dict[str, float] = {}
        calls: dict[str, Call] = {}
        for name, how in [*ours.items(), *ready.items()]:
            taken = [how.take(x) for x in inputs]
            try:
                error = error_of(how.read(how.run(taken[0])), exact)
            except Exception as failure:  # whatever its library throws
                if name in ours:
                    raise
                missing[name] = _one_line(failure)
                continue
            allowed = strict if name in ours else ROOM_FOR_PEERS * strict
            if error > allowed:
                words = f"wrong: off by {error:.1e}, allowed is {allowed:.1e}"
                assert name not in ours, f"{name} is {words}"
                missing[name] = words
                continue
            errors[name], calls[name] = error, _rotating(how.run, taken)
        large = row.get("bytes", 0) > last_level_cache()
        row |= {
            "batch": len(case.x), "dtype": dtype, "threads": case.threads, "direction": "forward",
            "cache": "cold" if cold or large else "warm", "error": errors, "missing_peers": missing,
        }  # fmt: skip
        families = {peer.name: peer.family for peer in peers if peer.name in calls}
        row = timed(calls, families, row, budget_s, copies=len(inputs), matrix_gflop_per_s=rate)
    return row, calls[next(iter(ours))]


def _built(
    case: Case, peers: Sequence[Peer], left_out: Mapping[str, str]
) -> tuple[dict[str, Ready], dict[str, str]]:
    """The peers that are there, and why the others are not."""
    ready, missing = {}, dict(left_out)
    for peer in peers:
        if peer.name in left_out:
            continue
        try:
            with torch.inference_mode(False), torch.no_grad():
                ready[peer.name] = peer.build(case)
        except Missing as why:
            missing[peer.name] = str(why)
        except Exception as error:  # whatever its library throws
            missing[peer.name] = _one_line(error)
    return ready, missing


def timed(
    calls: dict[str, Call],
    families: Mapping[str, str],
    row: Row,
    budget_s: float,
    *,
    copies: int = 1,
    matrix_gflop_per_s: float | None = None,
    grad: bool = False,
) -> Row:
    """Times calls in turns, ``ours`` among them.

    Args:
        families: which of the calls are peers, and of which family.
        row: may hold ``bytes`` and ``flops`` of a call, which become shares of what the machine
            can do: of copying as many bytes (through ``copies`` buffers in turn), of
            ``matrix_gflop_per_s``.
        grad: as in training, instead of in inference mode.

    Returns:
        The row, with times and speed-ups.
    """
    nbytes, flops = row.get("bytes"), row.get("flops")
    if nbytes:
        sources = [torch.randn(nbytes // 8) for _ in range(copies)]
        calls = {**calls, "copy": _rotating(torch.empty_like(sources[0]).copy_, sources)}
    # What was compiled and does not fit would silently be compiled anew, perhaps not frozen.
    stance = "default" if grad else "fail_on_recompile"
    with torch.inference_mode(not grad), torch.compiler.set_stance(stance):
        times = interleave(calls, budget_s=budget_s, settle_s=SETTLE_S)
    ours = times["ours"].median
    row = {**row, "us": {name: spread.summary(1e-6) for name, spread in times.items()}}
    for family in ("torch", "engine"):
        chosen = [name for name in families if families[name] == family]
        if chosen:
            row[f"best_{family}"], speedup = _best(chosen, times)
            row[f"speedup_{family}"] = speedup.summary()
    row["best_peer"], speedup = _best(families, times)
    row["speedup"], row["verdict"] = speedup.summary(), verdict(speedup)
    if nbytes:
        row["gb_per_s"] = nbytes / ours / 1e9
        row["fraction_of_copy"] = times["copy"].median / ours
    if flops:
        row["gflop_per_s"] = flops / ours / 1e9
        if matrix_gflop_per_s is not None:
            row["fraction_of_matrix"] = row["gflop_per_s"] / matrix_gflop_per_s
    return _rounded(row)


def error_of(y: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to the largest output; NaN is infinitely wrong."""
    if y.shape != exact.shape:
        return float("inf")
    error = ((y.double() - exact).abs().max() / exact.abs().max()).item()
    return error if error >= 0 else float("inf")


def _best(names: Sequence[str] | Mapping[str, str], times: dict[str, Spread]) -> tuple[str, Spread]:
    best = min(names, key=lambda name: times[name].median)
    return best, ratio(times[best], times["ours"])


def _rotating(run: Callable[[Any], Any], taken: list[Any]) -> Call:
    if len(taken) == 1:
        only = taken[0]
        return lambda: run(only)
    turn = itertools.cycle(taken)
    return lambda: run(next(turn))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _rounded(value: Any) -> Any:
    """Four digits are more than a measurement has."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value
