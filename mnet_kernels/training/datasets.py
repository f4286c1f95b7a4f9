"""What the training runs on: pictures with labels, in two halves. Nothing is downloaded.

Every dataset gives uint8 ``(3, size, size)`` and a class number; grey pictures become colour ones.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset

from mnet_kernels.data import RESIZE, read_image
from mnet_kernels.inputs import InputError, require

INSTALL = "'mnet_kernels[train]'"

#: The official archives (https://www.cs.toronto.edu/~kriz/cifar.html) by md5: name, folder in it.
CIFAR10_ARCHIVES = {
    "c58f30108f718f92721af3b95e74349a": ("cifar-10-python.tar.gz", "cifar-10-batches-py"),
    "c32a1d4ab5d03f1284b67883e8d87530": ("cifar-10-binary.tar.gz", "cifar-10-batches-bin"),
}
#: The files of the Python version, the last one for validation, with md5 as torchvision knows them.
CIFAR10_PYTHON = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
#: Pictures in each of the six files. The binary files have no published md5: their size tells.
CIFAR10_ROWS = 10_000
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

#: Of a dataset that comes in one piece, every fifth picture of a class is for validation.
HELD_OUT = 5

#: A PIL image to uint8 ``(3, size, size)``.
Transform = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Images:
    """A dataset: both halves give (uint8 ``(3, size, size)``, class number)."""

    spec: str
    train: Dataset[tuple[Tensor, int]]
    validation: Dataset[tuple[Tensor, int]]
    classes: tuple[str, ...]
    size: int
    #: Mirrored pictures still show what their label says.
    flips: bool = True
    #: After how many epochs a run with the default recipe has settled.
    epochs: int = 200


class Stored(Dataset[tuple[Tensor, int]]):
    """Pictures in memory: uint8 ``(N, 1 or 3, H, W)``, resized to ``size``; labels ``(N,)``."""

    def __init__(self, images: Tensor, labels: Tensor, size: int) -> None:
        if images.shape[-2:] != (size, size):
            parts = [
                F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
                for part in images.split(1000)
            ]
            images = torch.cat([part.round_().clamp_(0, 255).byte() for part in parts])
        self.images = images.expand(-1, 3, -1, -1)
        self.labels = labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


def open_images(spec: str, size: int | None = None) -> Images:
    """The dataset that ``spec`` names.

    Args:
        spec: ``digits``, ``cifar10:PATH``, ``fashion-mnist:PATH`` or ``imagefolder:PATH``.
        size: of the square pictures; None: 32, for an image folder 224.

    Raises:
        InputError: no such dataset; its files are missing, truncated, or of another format.
    """
    name, _, path = spec.partition(":")
    if name not in _OPENERS or (name == "digits") == bool(path):
        raise InputError(
            "data: expected digits, cifar10:PATH, fashion-mnist:PATH or imagefolder:PATH, "
            f"got {spec!r}"
        )
    if path and not Path(path).exists():
        raise InputError(f"data {spec}: expected a file or folder, {path} does not exist")
    return _OPENERS[name](spec, Path(path), size)


# ---- digits ----


def _digits(spec: str, path: Path, size: int | None) -> Images:
    """scikit-learn's 1,797 handwritten digits (UCI Optical Recognition), 8x8, made larger."""
    digits = require("sklearn.datasets", INSTALL).load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().byte()[:, None]
    labels = torch.from_numpy(digits.target)
    size = size or 32
    train, validation = _split(digits.target.tolist())
    return Images(
        spec,
        Stored(images[train], labels[train], size),
        Stored(images[validation], labels[validation], size),
        tuple(map(str, range(10))),
        size,
        flips=False,
        epochs=60,
    )


def _split(labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """(training, validation): of each class every ``HELD_OUT``-th, in an order fixed for ever."""
    order = np.random.default_rng(0).permutation(len(labels)).tolist()
    halves: tuple[list[int], list[int]] = ([], [])
    seen: dict[int, int] = {}
    for i in order:
        seen[labels[i]] = seen.get(labels[i], 0) + 1
        halves[seen[labels[i]] % HELD_OUT == 0].append(i)
    return sorted(halves[0]), sorted(halves[1])


# ---- CIFAR-10 ----


def _cifar10(spec: str, path: Path, size: int | None) -> Images:
    """The official archive in the Python or the binary version, or the folder extracted from it."""
    files = _cifar10_folder(spec, path) if path.is_dir() else _cifar10_archive(spec, path)
    parts = [_cifar10_batch(spec, name, content) for name, content in files]
    images, labels = (torch.cat(part) for part in zip(*parts[:-1], strict=True))
    size = size or 32
    return Images(
        spec,
        Stored(images, labels, size),
        Stored(*parts[-1], size),
        CIFAR10_CLASSES,
        size,
    )


def _cifar10_names(folder: str) -> list[str]:
    suffix = ".bin" if folder.endswith("bin") else ""
    return [name + suffix for name in CIFAR10_PYTHON]


def _cifar10_archive(spec: str, path: Path) -> Iterator[tuple[str, bytes]]:
    content = path.read_bytes()
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 not in CIFAR10_ARCHIVES:
        known = " or ".join(f"{md5} ({name})" for md5, (name, _) in CIFAR10_ARCHIVES.items())
        raise InputError(
            f"data {spec}: expected an official archive, md5 {known}; "
            f"got md5 {md5}, a file of {len(content):,} bytes"
        )
    folder = CIFAR10_ARCHIVES[md5][1]
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for name in _cifar10_names(folder):
            member = archive.extractfile(f"{folder}/{name}")
            assert member is not None  # the md5 vouches for it
            yield name, member.read()


def _cifar10_folder(spec: str, path: Path) -> Iterator[tuple[str, bytes]]:
    folders = [folder for _, folder in CIFAR10_ARCHIVES.values()]
    for folder in folders:
        place = path if path.name == folder else path / folder
        if place.is_dir():
            break
    else:
        raise InputError(
            f"data {spec}: expected the folder {' or '.join(folders)}, or one that holds it, "
            "found neither"
        )
    for name in _cifar10_names(folder):
        if not (place / name).is_file():
            raise InputError(f"data {spec}: expected a file {name} in {place}, found none")
        content = (place / name).read_bytes()
        expected = CIFAR10_PYTHON.get(name)
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if expected is not None and md5 != expected:  # before anything is unpickled
            raise InputError(f"data {spec}: {name}: expected md5 {expected}, got {md5}")
        yield name, content


def _cifar10_batch(spec: str, name: str, content: bytes) -> tuple[Tensor, Tensor]:
    if not name.endswith(".bin"):
        batch = pickle.loads(content, encoding="bytes")
        pixels, labels = np.asarray(batch[b"data"]), batch[b"labels"]
    else:
        expected = CIFAR10_ROWS * (1 + 3 * 32 * 32)
        if len(content) != expected:
            raise InputError(
                f"data {spec}: {name}: expected {expected:,} bytes, got {len(content):,}"
            )
        rows = np.frombuffer(content, np.uint8).reshape(CIFAR10_ROWS, -1)
        pixels, labels = rows[:, 1:], rows[:, 0]
        if labels.max() >= len(CIFAR10_CLASSES):
            raise InputError(f"data {spec}: {name}: expected labels 0 to 9, got {labels.max()}")
    images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy())
    return images, torch.as_tensor(np.asarray(labels, np.int64))


# ---- Fashion-MNIST ----


def _fashion_mnist(spec: str, path: Path, size: int | None) -> Images:
    """Four IDX files, .gz or not, in ``path`` or where torchvision puts them below it."""
    folders = [path, path / "FashionMNIST" / "raw"]
    size = size or 32
    halves = []
    for half in ("train", "t10k"):
        images = _idx(spec, folders, f"{half}-images-idx3-ubyte", dimensions=3)
        labels = _idx(spec, folders, f"{half}-labels-idx1-ubyte", dimensions=1)
        if len(images) != len(labels) or len(labels) == 0:
            raise InputError(
                f"data {spec}: {half}: expected a label for every picture, "
                f"got {len(images)} pictures and {len(labels)} labels"
            )
        if labels.max() >= len(FASHION_CLASSES):
            raise InputError(f"data {spec}: {half}: expected labels 0 to 9, got {labels.max()}")
        halves.append(Stored(images[:, None], labels.long(), size))
    return Images(spec, halves[0], halves[1], FASHION_CLASSES, size)


def _idx(spec: str, folders: Sequence[Path], name: str, dimensions: int) -> Tensor:
    """An IDX file of bytes: 0, 0, 8, the number of dimensions, their sizes big-endian, the data."""
    candidates = [folder / (name + suffix) for folder in folders for suffix in ("", ".gz")]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise InputError(
            f"data {spec}: expected a file {name} or {name}.gz in {folders[0]}, found neither"
        )
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"data {spec}: {path.name}: not a readable .gz file: {error}") from None
    header = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) < header:
        raise InputError(
            f"data {spec}: {path.name}: expected an IDX file of bytes in {dimensions} dimensions, "
            f"got {content[:4].hex(' ') or 'an empty file'} at its start"
        )
    shape = np.frombuffer(content[4:header], ">u4").astype(np.int64)
    if len(content) - header != shape.prod():
        raise InputError(
            f"data {spec}: {path.name}: expected {' x '.join(map(str, shape))} bytes after the "
            f"header, got {len(content) - header:,}"
        )
    values = np.frombuffer(content, np.uint8, offset=header)
    return torch.from_numpy(values.reshape(shape).copy())


# ---- folders of pictures ----


def fit(size: int) -> Transform:
    """A PIL image to uint8 ``(3, size, size)``: the shorter side to 256/224 of it, the middle."""
    transforms = require("torchvision.transforms.v2", INSTALL)
    return transforms.Compose(
        [
            transforms.Resize(round(size * RESIZE), antialias=True),
            transforms.CenterCrop(size),
            transforms.PILToTensor(),
        ]
    )


def _imagefolder(spec: str, path: Path, size: int | None) -> Images:
    """``PATH/train/CLASS/*`` and ``PATH/val/CLASS/*``, or ``PATH/CLASS/*``, which is then split."""
    size = size or 224
    if not (path / "train").is_dir():
        whole = folder(spec, path, fit(size))
        train, validation = _split(whole.targets)
        if not validation:
            raise InputError(
                f"data {spec}: expected at least {HELD_OUT} pictures of a class to split, or "
                f"folders train and val; got {len(whole)} of {len(whole.classes)} classes"
            )
        return Images(
            spec, Subset(whole, train), Subset(whole, validation), tuple(whole.classes), size
        )
    if not (path / "val").is_dir():
        raise InputError(f"data {spec}: expected a folder val beside train, found none")
    halves = [folder(spec, path / half, fit(size)) for half in ("train", "val")]
    if halves[0].classes != halves[1].classes:
        differ = sorted(set(halves[0].classes) ^ set(halves[1].classes))
        raise InputError(
            f"data {spec}: expected the same classes in train and val, "
            f"only one has {', '.join(differ[:3])}"
        )
    return Images(spec, halves[0], halves[1], tuple(halves[0].classes), size)


def folder(spec: str, path: Path, transform: Transform) -> Any:
    """torchvision's ``ImageFolder``: its targets and classes are the folders' names in order.

    Raises:
        InputError: there are no folders with pictures in ``path``.
    """
    datasets = require("torchvision.datasets", INSTALL)
    try:
        return datasets.ImageFolder(str(path), transform, loader=_read_image)
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"data {spec}: expected a folder a class, with pictures in it: {reason}"
        ) from None


def _read_image(path: str) -> Any:
    return read_image(Path(path))


_OPENERS: dict[str, Callable[[str, Path, int | None], Images]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "fashion-mnist": _fashion_mnist,
    "imagefolder": _imagefolder,
}
