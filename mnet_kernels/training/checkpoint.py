"""Checkpoints of a training run: whole or not at all."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mnet_kernels.inputs import InputError
from mnet_kernels.models import mobilenet_v1

FORMAT = "mnet_kernels training 1"


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file at once: whoever reads it, at any time, finds the old one or the new one.

    Raises:
        OSError: it cannot be written (a full disk, for one); the old file is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the content must be there before the name points to it
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)  # a write alone does not know it
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint atomically; errors as :func:`write_atomically`."""
    content = io.BytesIO()
    torch.save({"format": FORMAT, **checkpoint}, content)
    write_atomically(path, content.getvalue())


def load(path: Path) -> dict[str, Any]:
    """A checkpoint of ``mnet-kernels train``, on the CPU.

    Returns:
        "recipe" (the settings), "classes" (names), "size", "epoch" (how many are done), "model",
        "optimizer", "scaler" (state dicts) and "rows" (the metrics so far).

    Raises:
        InputError: missing, damaged, or something else.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {path}: expected a file, found none")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler fails in as many ways as a file can be broken
        reason = str(error).strip().partition("\n")[0][:120] or type(error).__name__
        raise InputError(
            f"checkpoint {path}: expected one of mnet-kernels train, got a file of "
            f"{path.stat().st_size:,} bytes: {reason}"
        ) from None
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if found != FORMAT:
        raise InputError(
            f"checkpoint {path}: expected the format {FORMAT!r}, "
            f"got {'none' if found is None else repr(found)}"
        )
    return checkpoint


def model_of(checkpoint: dict[str, Any], path: Path) -> nn.Module:
    """The trained model, on the CPU, in eval mode.

    Raises:
        InputError: its weights are not those of the network that it names.
    """
    model = mobilenet_v1(checkpoint["recipe"]["alpha"], len(checkpoint["classes"]))
    load_state(model, checkpoint, path)
    return model.eval()


def load_state(model: nn.Module, checkpoint: dict[str, Any], path: Path) -> None:
    """Load the weights; every name and shape must match.

    Raises:
        InputError: they belong to another network.
    """
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        raise InputError(
            f"checkpoint {path}: its weights are not this network's: {lines[-1].strip()}"
        ) from None
