"""Keras checkpoints into :class:`~mnet_kernels.models.MobileNetV1`, read with h5py alone.

Three layouts carry the same weights:

- ``.keras``: a zip of ``config.json`` (the layers' names) and ``model.weights.h5``;
- ``.weights.h5``: ``layers/<automatic name>/vars/<index>``, where the automatic name counts a
  class (``conv2d_3``) and the layer's own name is an attribute of ``vars``, in newer files;
- legacy ``.h5``: ``<layer>/.../<weight>``, under ``model_weights`` where a whole model was saved.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mnet_kernels.models.mobilenet import BLOCKS

if TYPE_CHECKING:
    import h5py

_ZIP_MAGIC = b"PK\x03\x04"
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_MAX_SHOWN = 3  # of a list in an error message

#: Keras' weights of a layer, in its order, and the name of each in the torch module.
_BATCH_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_CONV = {"kernel": "weight", "bias": "bias"}

#: The stem of the automatic name that .weights.h5 gives the layers of a class.
_AUTOMATIC_NAMES = {
    "Conv2D": "conv2d",
    "DepthwiseConv2D": "depthwise_conv2d",
    "BatchNormalization": "batch_normalization",
}

#: (class, name) of Keras' layers with weights, in the order in which MobileNet defines them.
_KERAS_LAYERS = (
    ("Conv2D", "conv1"),
    ("BatchNormalization", "conv1_bn"),
    *(
        layer
        for i in range(1, len(BLOCKS) + 1)
        for layer in (
            ("DepthwiseConv2D", f"conv_dw_{i}"),
            ("BatchNormalization", f"conv_dw_{i}_bn"),
            ("Conv2D", f"conv_pw_{i}"),
            ("BatchNormalization", f"conv_pw_{i}_bn"),
        )
    ),
    ("Conv2D", "conv_preds"),
)


class LoadResult(NamedTuple):
    """The layers that were not loaded; both are empty unless ``strict=False`` was given."""

    missing: tuple[str, ...]  #: in the model, not in the file: left as they were
    unexpected: tuple[str, ...]  #: in the file, not in the model: ignored


class _Target(NamedTuple):
    """Where a Keras weight goes: the key in the state dict, and the shape the file must have."""

    key: str
    keras_shape: tuple[int, ...]


def load_keras_weights(
    model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True
) -> LoadResult:
    """Copy the weights of a ``keras.applications.MobileNet`` checkpoint into ``model``.

    Reads ``.keras``, ``.weights.h5`` and legacy ``.h5`` files of float16, bfloat16, float32 or
    float64 weights; the content decides, not the file's name. Kernels ``(H, W, C_in, C_out)``
    become ``(C_out, C_in, H, W)``, depthwise kernels ``(H, W, C, M)`` become ``(C * M, 1, H, W)``.
    All is read and checked first: after an error the model is as it was.

    Damage is found where zip and HDF5 find it. HDF5 keeps no checksum of a weight, so that a bit
    flipped inside one in an ``.h5`` file passes; a ``.keras`` file has them. A few damaged ``.h5``
    structures make the HDF5 library itself loop: read no file from a source that you distrust.

    Args:
        model: a :class:`MobileNetV1`, or a module with the same state dict. Values are cast to its
            dtypes and devices.
        path: the checkpoint.
        strict: every layer must be in both. False loads the layers that are in both, such as a
            file saved with ``include_top=False``; their shapes must agree all the same.

    Returns:
        The layers left out, by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a Keras checkpoint, is damaged, or does not fit the model; the
            message names the file, the layers, and the expected and actual shapes.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"load_keras_weights: there is no file {path}")
    if not path.is_file():
        raise ValueError(f"load_keras_weights: {path} is not a file")
    targets = _targets(model.state_dict())
    absent = [name for _, name in _KERAS_LAYERS[:-1] if name not in targets]
    if absent:
        raise ValueError(
            "load_keras_weights: model must have the layers of mobilenet_v1, "
            f"got {type(model).__name__} without {_listed(absent)}"
        )

    try:
        with _open(path) as (file, names):
            found = _find_weights(file, names)
            missing = tuple(layer for layer in targets if layer not in found)
            unexpected = tuple(layer for layer in found if layer not in targets)
            problems = _mismatches(targets, found)
            if strict or len(missing) == len(targets):
                problems += _absences(missing, unexpected)
            staged = {} if problems else _stage(targets, found)
    except _UNREADABLE as error:
        raise ValueError(
            f"load_keras_weights: {path} cannot be read as a Keras checkpoint: {error}"
        ) from error
    if problems:
        raise ValueError(
            f"load_keras_weights: {path} does not fit the model: {_listed(problems, '; ')}. "
            "Check alpha, num_classes, in_channels and depth_multiplier."
        )
    model.load_state_dict(staged, strict=False)
    return LoadResult(missing, unexpected)


#: What zipfile, json and h5py raise on files that are damaged or of another kind.
_UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    zipfile.BadZipFile,
    zlib.error,
)


@contextmanager
def _open(path: Path) -> Iterator[tuple[h5py.File, dict[str, str]]]:
    """The weights of a checkpoint, and the layers' names by automatic name."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError("load_keras_weights needs h5py: pip install h5py") from error

    with path.open("rb") as stream:
        magic = stream.read(len(_HDF5_MAGIC))
    names = _automatic_names(_KERAS_LAYERS)
    if magic == _HDF5_MAGIC:
        with h5py.File(path, "r") as file:
            yield file, names
    elif magic.startswith(_ZIP_MAGIC):
        with zipfile.ZipFile(path) as archive:
            weights = io.BytesIO(archive.read("model.weights.h5"))
            config = json.loads(archive.read("config.json"))
        layers = config["config"].get("layers", [])  # a subclassed model lists none
        names |= _automatic_names((la["class_name"], la["config"]["name"]) for la in layers)
        with h5py.File(weights, "r") as file:
            yield file, names
    else:
        raise ValueError("it is neither a zip archive (.keras) nor an HDF5 file (.h5)")


def _automatic_names(layers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Name by automatic name: the second Conv2D is ``conv2d_1``."""
    names = {}
    count: Counter[str] = Counter()
    for class_name, name in layers:
        stem = _AUTOMATIC_NAMES.get(class_name)
        if stem is not None:
            names[f"{stem}_{count[stem]}" if count[stem] else stem] = name
            count[stem] += 1
    return names


def _parts(layer: str) -> dict[str, str]:
    return _BATCH_NORM if layer.endswith("_bn") else _CONV


def _targets(state: Mapping[str, Tensor]) -> dict[str, dict[str, _Target]]:
    """By layer and Keras weight, what the model takes."""
    targets: dict[str, dict[str, _Target]] = {}
    channels = 0  # what the convolution before put out
    for class_name, layer in _KERAS_LAYERS:
        keys = {part: f"{layer}.{ours}" for part, ours in _parts(layer).items()}
        keys = {part: key for part, key in keys.items() if key in state}
        if not keys:
            continue
        shapes = {part: tuple(state[key].shape) for part, key in keys.items()}
        if "kernel" in shapes:
            c_out, c_in, height, width = shapes["kernel"]
            if class_name == "DepthwiseConv2D":
                shapes["kernel"] = (height, width, channels, c_out // max(channels, 1))
            else:
                shapes["kernel"] = (height, width, c_in, c_out)
            channels = c_out
        targets[layer] = {part: _Target(key, shapes[part]) for part, key in keys.items()}
    return targets


def _find_weights(file: h5py.File, names: Mapping[str, str]) -> dict[str, dict[str, h5py.Dataset]]:
    """By layer and Keras weight, what the file holds."""
    found = {}
    # Keras 2.13 wrote its second name where all others write "layers".
    layers = file.get("layers", file.get("_layer_checkpoint_dependencies"))
    if layers is not None:
        for automatic, group in layers.items():
            variables = group.get("vars")
            if variables is not None and len(variables):
                layer = _text(variables.attrs.get("name", names.get(automatic, automatic)))
                parts = dict(enumerate(_parts(layer)))
                found[layer] = {parts.get(int(i), i): data for i, data in variables.items()}
    else:
        for layer, group in file.get("model_weights", file).items():
            weights: dict[str, h5py.Dataset] = {}
            if hasattr(group, "visititems"):
                group.visititems(lambda name, item, into=weights: _collect(into, name, item))
            if weights:
                found[layer] = weights
    return found


def _collect(weights: dict[str, h5py.Dataset], name: str, item: Any) -> None:
    """Enter a legacy dataset: ``conv_dw_1/depthwise_kernel:0`` is the weight ``kernel``."""
    if hasattr(item, "shape"):
        part = name.rpartition("/")[2].partition(":")[0]
        weights["kernel" if part == "depthwise_kernel" else part] = item


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _mismatches(
    targets: Mapping[str, Mapping[str, _Target]],
    found: Mapping[str, Mapping[str, h5py.Dataset]],
) -> list[str]:
    """What is wrong with the layers that are in both, a phrase each."""
    problems = []
    for layer in targets:
        if layer not in found:
            continue
        for part in sorted(targets[layer].keys() | found[layer].keys()):
            if part not in found[layer]:
                problems.append(f"the file's layer {layer} has no {part}")
            elif part not in targets[layer]:
                problems.append(f"the file's layer {layer} has a {part}, the model's has none")
            else:
                data, expected = found[layer][part], targets[layer][part].keras_shape
                if tuple(data.shape) != expected:
                    problems.append(
                        f"layer {layer}: expected a {part} of shape {expected}, "
                        f"got {tuple(data.shape)}"
                    )
                elif data.dtype.kind != "f" and not _is_bfloat16(data):
                    problems.append(
                        f"layer {layer}: expected a {part} of floating dtype, got {data.dtype}"
                    )
    return problems


def _listed(items: Sequence[str], separator: str = ", ") -> str:
    more = len(items) - _MAX_SHOWN
    return separator.join(items[:_MAX_SHOWN]) + (f"{separator}and {more} more" if more > 0 else "")


def _absences(missing: tuple[str, ...], unexpected: tuple[str, ...]) -> list[str]:
    problems = []
    if missing == ("conv_preds",):
        problems.append(
            "the file lacks the layer conv_preds, as one saved with include_top=False does "
            "(strict=False loads the rest)"
        )
    elif missing:
        problems.append(f"the file lacks the layers {_listed(missing)}")
    if unexpected:
        problems.append(f"the model lacks the file's layers {_listed(unexpected)}")
    return problems


def _stage(
    targets: Mapping[str, Mapping[str, _Target]],
    found: Mapping[str, Mapping[str, h5py.Dataset]],
) -> dict[str, Tensor]:
    """The weights of the layers that are in both, in torch's shapes, by state dict key."""
    staged = {}
    for class_name, layer in _KERAS_LAYERS:
        if layer not in targets or layer not in found:
            continue
        for part, target in targets[layer].items():
            weight = _to_torch(found[layer][part])
            if part == "kernel" and class_name == "DepthwiseConv2D":
                # (H, W, C, M): both count the output channels as c * M + m.
                weight = weight.permute(2, 3, 0, 1).flatten(0, 1).unsqueeze(1)
            elif part == "kernel":
                weight = weight.permute(3, 2, 0, 1)
            staged[target.key] = weight
    return staged


def _is_bfloat16(data: h5py.Dataset) -> bool:
    return data.dtype.itemsize == 2 and _text(data.attrs.get("dtype", "")) == "bfloat16"


def _to_torch(data: h5py.Dataset) -> Tensor:
    values = np.asarray(data)
    if _is_bfloat16(data):  # HDF5 knows no bfloat16: Keras stores two opaque bytes
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("=")))
