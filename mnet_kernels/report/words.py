"""How a comparison is put in words: one place, for the terminal and the page."""

from __future__ import annotations

from typing import Any

#: The ways to run, and what readers call them.
WAYS = {
    "native": "native",
    "native_channels_last": "native channels_last",
    "swapped": "swapped",
}


def opening(result: dict[str, Any]) -> str:
    """What was compared, in a sentence or two."""
    row = result["rows"][0]
    models = ", ".join(dict.fromkeys(row["model"] for row in result["rows"]))
    return (
        f"{models} in {row['dtype']}: PyTorch's own layers against the same networks with "
        "mnet_kernels swapped in, on the same weights and images."
    )


def verdict(result: dict[str, Any]) -> str:
    """Same answers? How much faster? In one sentence each."""
    checks = result["rows"] + result["layers"]
    wrong = sum(not row["ok"] for row in checks)
    moved = sum(row["answers"]["images"] - row["answers"]["top5_same"] for row in result["rows"])
    if wrong:
        answers = f"The answers differ: {wrong} of {len(checks)} checks exceed the tolerance."
    elif moved:
        answers = (
            f"All {len(checks)} checks are within the tolerance; {moved} times that was enough "
            "to change the order of the five best classes."
        )
    else:
        answers = f"The answers are the same: all {len(checks)} checks are within the tolerance."
    speeds = [row["speedup"]["median"] for row in result["rows"]]
    low, high = f"{min(speeds):.2f}", f"{max(speeds):.2f}"
    span = low if low == high else f"{low} to {high}"
    return f"{answers} Speed: {span} times the faster of the two natives."


def error_text(error: float | None) -> str:
    """An error relative to the output's scale; None is one that is not finite."""
    return "not finite" if error is None else f"{error:.1e}"


def ms_text(ms: float) -> str:
    """Milliseconds, with about three digits."""
    return f"{ms:.{_digits(ms)}f}"


def time_text(time: dict[str, float]) -> str:
    """Milliseconds with their spread: the median, and the 20th to 80th percentile."""
    digits = _digits(time["median"])
    return f"{time['median']:.{digits}f} ({time['p20']:.{digits}f}-{time['p80']:.{digits}f})"


def _digits(ms: float) -> int:
    return next((digits for digits, top in ((3, 1), (2, 10), (1, 100)) if ms < top), 0)


def speed_text(ratio: dict[str, float]) -> str:
    """A speed-up with its spread."""
    return f"{ratio['median']:.2f}x ({ratio['p20']:.2f}-{ratio['p80']:.2f})"


def top5_text(answers: dict[str, int]) -> str:
    """How many images got the same five best classes in the same order."""
    return f"{answers['top5_same']}/{answers['images']}"


def environment_text(environment: dict[str, Any]) -> dict[str, str]:
    """Facts that are known, with their labels."""
    return {key.replace("_", " "): str(value) for key, value in environment.items() if value}
