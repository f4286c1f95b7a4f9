"""Small datasets in the official formats, made up: pictures whose class can be learned."""

import gzip
import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def pictures(count: int, size: int, channels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (count, channels, size, size), and labels 0 to 9 in turns: a stripe lies where the
    label says, in noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    images = rng.integers(0, 60, (count, channels, size, size))
    for image, label in zip(images, labels, strict=True):
        at = 2 + label * (size - 4) // 10
        image[:, at : at + 2] += 180
    order = rng.permutation(count)
    return images[order].astype(np.uint8), labels[order]


# ---- IDX ----


def idx(values: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    return header + values.astype(np.uint8).tobytes()


def fashion_mnist(folder: Path, train=96, test=32, compress=True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for half, count in (("train", train), ("t10k", test)):
        images, labels = pictures(count, 28, 1, seed=count)
        for kind, values in (("images-idx3", images[:, 0]), ("labels-idx1", labels)):
            content = idx(values)
            name = f"{half}-{kind}-ubyte"
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return folder


# ---- CIFAR-10 ----

CIFAR10_NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def cifar10_files(version: str, rows=20) -> dict[str, bytes]:
    """Name and content of the six files, ``rows`` pictures each, in version "py" or "bin"."""
    files = {}
    for seed, name in enumerate(CIFAR10_NAMES):
        images, labels = pictures(rows, 32, 3, seed)
        pixels = images.reshape(rows, -1)
        if version == "bin":
            content = np.column_stack([labels.astype(np.uint8), pixels]).tobytes()
            files[f"{name}.bin"] = content
        else:
            batch = {b"batch_label": name.encode(), b"labels": labels.tolist(), b"data": pixels}
            files[name] = pickle.dumps(batch, protocol=2)
    return files


def cifar10_archive(path: Path, version: str, rows=20) -> str:
    """Write the archive; returns its md5."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in cifar10_files(version, rows).items():
            member = tarfile.TarInfo(f"cifar-10-batches-{version}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def cifar10_folder(path: Path, version: str, rows=20) -> dict[str, str]:
    """Write the extracted folder below ``path``; returns the files' md5."""
    folder = path / f"cifar-10-batches-{version}"
    folder.mkdir(parents=True)
    sums = {}
    for name, content in cifar10_files(version, rows).items():
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    return sums


# ---- folders of pictures ----


def image_folder(path: Path, classes=("a", "b", "c"), count=6, size=(40, 48), seed=0) -> Path:
    """``path/CLASS/0.png`` and so on: every class its own colour, in noise."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        colour = np.random.default_rng(number).integers(40, 215, 3)
        for i in range(count):
            pixels = colour + rng.integers(-40, 40, (*size, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(path / name / f"{i}.png")
    return path
