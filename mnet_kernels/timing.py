"""Fair timing: candidates take turns, medians with their spread, ratios pair by pair.

A machine's speed drifts by the minute, so timing one candidate after the other compares two
machines. Here every round runs every candidate once, and a ratio is taken within a round.

A claim ("faster", "slower") is one only if four fifths of the rounds agree, see :func:`verdict`.
"""

from __future__ import annotations

import datetime
import gc
import importlib
import importlib.metadata
import math
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Call = Callable[[], object]

#: Without a fixed number of rounds: as many as fit the time budget, within these bounds.
MIN_ROUNDS, MAX_ROUNDS = 7, 51
#: A call that takes longer (seconds) does not notice how its turn begins.
LONG_CALL_S = 0.05


@dataclass(frozen=True)
class Spread:
    """Samples of one quantity, one a round: seconds a call, or a ratio of two of those."""

    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("Spread: samples: expected at least one, got none")

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        """The 20th percentile, interpolated."""
        return self._percentile(20)

    @property
    def high(self) -> float:
        """The 80th percentile, interpolated."""
        return self._percentile(80)

    def _percentile(self, percent: int) -> float:
        if len(self.samples) == 1:
            return self.samples[0]
        return statistics.quantiles(self.samples, n=100, method="inclusive")[percent - 1]

    def summary(self, unit: float = 1.0) -> dict[str, float]:
        """Median, 20th and 80th percentile in units of ``unit`` (1e-3: milliseconds)."""
        return {
            "median": self.median / unit,
            "p20": self.low / unit,
            "p80": self.high / unit,
            "rounds": len(self.samples),
        }


def ratio(slow: Spread, fast: Spread) -> Spread:
    """How many times faster ``fast`` is than ``slow``, round by round.

    Raises:
        ValueError: the two were not measured in the same rounds.
    """
    if len(slow.samples) != len(fast.samples):
        raise ValueError(
            "ratio: expected two measurements of the same rounds, "
            f"got {len(slow.samples)} and {len(fast.samples)}"
        )
    return Spread(tuple(s / f for s, f in zip(slow.samples, fast.samples, strict=True)))


def verdict(speedup: Spread) -> str:
    """What a ratio says: "faster" or "slower" if four fifths of its rounds do, else "noise"."""
    return "faster" if speedup.low > 1 else "slower" if speedup.high < 1 else "noise"


def interleave(
    calls: Mapping[str, Call],
    *,
    rounds: int | None = None,
    budget_s: float = 5.0,
    min_sample_s: float = 1e-3,
    settle_s: float = 0.0,
    synchronize: Call | None = None,
    on_round: Callable[[float], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> dict[str, Spread]:
    """Time candidates in turns.

    Args:
        calls: name and call of each candidate.
        rounds: how many samples of each; None: as many as fit ``budget_s``, within
            ``MIN_ROUNDS`` and ``MAX_ROUNDS``.
        min_sample_s: a sample repeats its call until it lasts about this long, so that the
            clock's own cost and grain do not show.
        settle_s: a turn begins with a pause of this length, in which the thread pool of the
            candidate before stops spinning, and with as many calls as are then timed, which do not
            count: the caches of the candidate before turn into its own only over several calls;
            not before calls longer than ``LONG_CALL_S``. 0: neither.
        synchronize: waits for the device before the clock is read; None on the CPU.
        on_round: told the fraction done, 0 to 1, after each round.
        clock: seconds, monotonic.
        sleep: waits so many seconds.

    Returns:
        Seconds a call for each name, one sample a round, in round order.
    """

    def sample(call: Call, repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            call()
        if synchronize is not None:
            synchronize()
        return (clock() - start) / repeats

    # Two calls to warm up: the first may compile or pack weights, the second fills the caches
    # that it left behind. The third tells how often a sample repeats, or, since it may still meet
    # the threads of the candidate before, a sample by its measure does.
    once, repeats = {}, {}
    for name, call in calls.items():
        sample(call, 2)
        once[name] = sample(call, 1)
        if once[name] < min_sample_s:
            once[name] = sample(call, math.ceil(min_sample_s / max(once[name], 1e-9)))
        repeats[name] = max(1, math.ceil(min_sample_s / max(once[name], 1e-9)))
    settled = {name for name in calls if settle_s > 0 and once[name] <= LONG_CALL_S}
    if rounds is None:
        round_s = sum(
            once[name] * repeats[name] * (2 if name in settled else 1)
            + (settle_s if name in settled else 0.0)
            for name in calls
        )
        rounds = min(max(int(budget_s / round_s), MIN_ROUNDS), MAX_ROUNDS)

    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()  # a collection would land on one candidate at random
    try:
        for number in range(rounds):
            # The same for everybody who measures, but nobody always runs after the same neighbour.
            random.Random(number).shuffle(names)
            for name in names:
                if name in settled:
                    sleep(settle_s)
                    sample(calls[name], repeats[name])
                samples[name].append(sample(calls[name], repeats[name]))
            if on_round is not None:
                on_round((number + 1) / rounds)
    finally:
        if collecting:
            gc.enable()
    return {name: Spread(tuple(values)) for name, values in samples.items()}


def environment() -> dict[str, Any]:
    """What a measurement must state about where it was taken."""
    import torch

    from mnet_kernels._version import __version__

    build = build_info() or {}
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "mnet_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "timm": version("timm"),
        "platform": platform.platform(terse=True),
        "cpu": _cpu_model(),
        "instruction_set": build.get("instruction_set"),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def build_info() -> dict[str, Any] | None:
    """Facts about the compiled extension, or None where it was not built."""
    importlib.import_module("torch")  # the extension is linked with torch's libraries
    try:
        extension = importlib.import_module("mnet_kernels._C")
    except ImportError:
        return None
    return extension.build_info()


def version(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit this package runs from, "+" if the tree differs from it; None outside git."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
