"""What users give, and whether it can be used: the error that says so, optional packages, files."""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path
from types import ModuleType


class InputError(ValueError):
    """Something the user gave cannot be used; one line: argument, expected, actual."""


def require(module: str, install: str = "'mnet_kernels[demo]'") -> ModuleType:
    """Import an optional package, or say in one line what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name not in (package, module):
            raise
        raise InputError(
            f"{package} is needed here and not installed: pip install {install}"
        ) from None


def packaged_file(distribution: str, name: str) -> Path | None:
    """The file of an installed package whose path ends in ``name``; the package is not imported."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        path = Path(str(file.locate()))
        if file.as_posix().endswith(name) and path.is_file():
            return path
    return None


def kind_of(path: Path) -> str:
    """What is at a path, in words."""
    if path.is_dir():
        return "a directory"
    return f"a file of {path.stat().st_size:,} bytes" if path.exists() else "nothing"
