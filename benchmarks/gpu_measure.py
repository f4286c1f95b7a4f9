"""What `make gpu` measures on a device, stage by stage: rows as JSON lines, each written when it is
done. How they are timed: gpu_timing.py."""

from __future__ import annotations

import json
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from gpu_timing import smi


class Clock:
    """Stops long work that has many parts: asked between them."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.monotonic(), seconds

    def spent(self) -> float:
        """The fraction of the time that is gone."""
        return (time.monotonic() - self.start) / self.seconds


def work(stage: str, seconds: float, output: Path) -> bool:
    """The rows of a stage, the most important first, as far as the time goes; what `output` has
    already is not measured again.

    gpu_STAGE.plan() gives for each a function and its arguments, the last of which are the ways of
    torch.compile to be measured.

    Returns:
        Whether the device still answers.
    """
    clock, plan = Clock(seconds), import_module(f"gpu_{stage}").plan()
    done: list[list[Any]] = []
    before = len(output.read_text().splitlines()) if output.exists() else 0
    with open(output, "a") as lines, torch.no_grad():
        for number, (make, *arguments) in enumerate(plan):
            if clock.spent() > 0.95:
                print(f"{stage}: out of time, {len(plan) - number} of {len(plan)} rows left out")
                break
            if clock.spent() > 0.6:
                arguments[-1] = ()  # compiling costs most
                if arguments[:-1] in done:  # it was to come again with more peers
                    continue
            done.append(arguments[:-1])
            if len(done) <= before:
                continue
            row: dict[str, Any]
            lost = False
            try:
                torch.cuda.empty_cache()
                row = make(*arguments)
                row["clocks_mhz"] = smi("clocks.sm,clocks.mem")  # still as they were under load
            except Exception as error:  # the other rows still count
                lost = isinstance(error, torch.AcceleratorError)
                row = {"left_out": f"{arguments[:-1]}: {type(error).__name__}: {error}"}
                row |= {"device_lost": True} if lost else {}
                print(f"{stage}: left out: {row['left_out']}")
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            if lost:
                return False
    return True
