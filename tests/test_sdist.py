"""The source distribution holds all that a build reads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc", "mnet_kernels")
BUILD = "from setuptools import build_meta; build_meta.build_sdist('.')"


def test_every_source_is_in_the_sdist(tmp_path):
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SOURCES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy2(file, tmp_path / file.name)
    done = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=tmp_path, env=os.environ | {"FORCE_CUDA": "0"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {Path(*Path(name).parts[1:]) for name in tar.getnames()}
    there = {p.relative_to(tmp_path) for n in SOURCES for p in (tmp_path / n).rglob("*.*")}
    assert sorted(map(str, there - packed)) == []
