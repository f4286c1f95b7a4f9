"""Pictures: photographs that packages carry, synthetic ones, and what ImageNet calls them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mnet_kernels.inputs import InputError, kind_of, packaged_file, require

if TYPE_CHECKING:
    from PIL.Image import Image

#: ImageNet's mean and deviation a channel, for pixels in [0, 1].
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Torchvision resizes the shorter side to 256 and cuts out the middle 224.
RESIZE = 256 / 224

#: Photographs that two packages carry: name, distribution, file, and what ImageNet calls it.
PHOTOGRAPHS = (
    ("china", "scikit-learn", "sklearn/datasets/images/china.jpg"),
    ("flower", "scikit-learn", "sklearn/datasets/images/flower.jpg"),
    ("chelsea", "scikit-image", "skimage/data/chelsea.png"),
    ("coffee", "scikit-image", "skimage/data/coffee.png"),
    ("astronaut", "scikit-image", "skimage/data/astronaut.png"),
)


@dataclass(frozen=True)
class Photograph:
    """A picture and what it is called."""

    name: str
    image: Image


def demo_photographs() -> list[Photograph]:
    """The photographs that scikit-learn and scikit-image carry.

    Raises:
        InputError: a package, or its photograph, is not there.
    """
    found = []
    for name, distribution, file in PHOTOGRAPHS:
        path = packaged_file(distribution, file)
        if path is None:
            raise InputError(
                f"photograph {name}: expected {file} of the package {distribution}, "
                "found none: pip install 'mnet_kernels[demo]'"
            )
        found.append(Photograph(name, read_image(path)))
    return found


def read_image(path: Path) -> Image:
    """An image file as RGB.

    Raises:
        InputError: the file is missing, or no image.
    """
    pil = require("PIL.Image")
    try:
        with pil.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"image {path}: expected a file, found none") from None
    except pil.UnidentifiedImageError:
        raise InputError(
            f"image {path}: expected an image (JPEG, PNG, ...), got {kind_of(path)}"
        ) from None
    except (OSError, SyntaxError, ValueError, pil.DecompressionBombError) as error:
        # Pillow raises SyntaxError and ValueError for some broken files.
        raise InputError(f"image {path}: expected a readable image, got: {error}") from None


def preprocess(images: Sequence[Image], size: int) -> Tensor:
    """What torchvision's ImageNet transforms do, at any size.

    Returns:
        ``(len(images), 3, size, size)`` float32, normalised.
    """
    return torch.stack([_preprocess_one(image, size) for image in images])


def _preprocess_one(image: Image, size: int) -> Tensor:
    bilinear = require("PIL.Image").Resampling.BILINEAR
    shorter = round(size * RESIZE)
    width, height = image.size
    # Multiply before dividing: the longer side must round as it does in torchvision.
    if width <= height:
        width, height = shorter, int(shorter * height / width)
    else:
        width, height = int(shorter * width / height), shorter
    image = image.resize((width, height), bilinear)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    planes = pixels.view(size, size, 3).permute(2, 0, 1).float() / 255
    return (planes - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def synthetic_images(count: int, size: int, seed: int = 0) -> Tensor:
    """Images that vary as photographs do: each has its own colours, contrast, and coarse shapes.

    White noise would not do: after pooling, all noise images look the same, and a BatchNorm
    that has only seen those divides by almost nothing.

    Returns:
        ``(count, 3, size, size)`` float32, mean about 0, deviation about 1.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(count, 3, size, size)
    for cells in (3, 8, 24, size):
        noise = torch.randn(count, 3, cells, cells, generator=generator)
        images += nn.functional.interpolate(noise, (size, size), mode="bilinear")
    contrast = 0.7 + 0.6 * torch.rand(count, 1, 1, 1, generator=generator)
    return images * contrast / images.std()


def imagenet_labels() -> list[str]:
    """ImageNet's 1000 class names, in order."""
    models = require("torchvision.models")
    return list(models.MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"])
