"""mobilenet_v1 against the real keras.applications.MobileNet, through its own files.

Every Keras model here has random weights and random BatchNorm statistics, so that a layer left out,
a padding off by one or a statistic misplaced shows in the softmax.
"""

import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

# Read when keras is imported. The CPU also where there is a GPU: TF32 would blur the comparison.
os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("KERAS_TORCH_DEVICE", "cpu")
keras = pytest.importorskip("keras", minversion="3", reason="parity needs Keras 3")
h5py = pytest.importorskip("h5py", reason="Keras' files are HDF5")

from mnet_kernels.models import load_keras_weights, mobilenet_v1  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CLASSES = 10
FORMATS = (".keras", ".weights.h5", ".h5")
TOLERANCE = 1e-5  # of the softmax


def keras_mobilenet(size=32, alpha=0.25, depth_multiplier=1, seed=0, **kwargs):
    """A Keras MobileNet whose every weight and statistic is random, whose logits are far apart."""
    model = keras.applications.MobileNet(
        input_shape=(size, size, 3),
        alpha=alpha,
        depth_multiplier=depth_multiplier,
        weights=None,
        classes=CLASSES,
        **kwargs,
    )
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        shapes = [w.shape for w in layer.get_weights()]
        if len(shapes) == 4:  # gamma, beta, moving mean, moving variance
            (c,) = shapes[0]
            values = (
                rng.uniform(0.5, 1.5, c),
                rng.normal(0, 0.5, c),
                rng.normal(0, 0.3, c),
                rng.uniform(0.25, 1.5, c),
            )
            layer.set_weights(values)
        elif shapes:
            height, width, c_in, _ = shapes[0]
            fan_in = height * width * (1 if "conv_dw" in layer.name else c_in)
            gain = 8 if layer.name == "conv_preds" else 2
            kernel = rng.normal(0, (gain / fan_in) ** 0.5, shapes[0])
            layer.set_weights([kernel, *(rng.normal(0, 1, s) for s in shapes[1:])])
    return model


def save(model, path: Path) -> Path:
    if path.name.endswith(".weights.h5"):
        model.save_weights(path)
    else:
        model.save(path)
    return path


def images(size: int) -> np.ndarray:
    """Two unlike images, (2, size, size, 3): fine noise, and a slope from corner to corner."""
    noise = np.random.default_rng(1).normal(0, 1, (size, size, 3))
    ramp = np.linspace(-1, 1, size)
    slope = (ramp[:, None, None] + ramp[None, :, None]) * np.array([1.0, -0.5, 0.25])
    return np.stack([noise, slope]).astype(np.float32)


def keras_softmax(model, x: np.ndarray) -> np.ndarray:
    return keras.ops.convert_to_numpy(model(x, training=False))


@torch.no_grad()
def our_softmax(model: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    return model.eval()(torch.from_numpy(x).permute(0, 3, 1, 2)).softmax(1).numpy()


def loaded(path: Path, alpha=0.25, depth_multiplier=1, **kwargs):
    model = mobilenet_v1(alpha, CLASSES, depth_multiplier=depth_multiplier, **kwargs)
    result = load_keras_weights(model, path)
    assert result == ((), ())
    return model


def assert_same_state(a: torch.nn.Module, b: torch.nn.Module) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("size", [32, 97, 128, 224])
@pytest.mark.parametrize(
    ("alpha", "depth_multiplier"), [(0.25, 1), (0.5, 1), (0.75, 1), (1.0, 1), (0.5, 2)]
)
def test_softmax_agrees_with_keras(alpha, depth_multiplier, size, tmp_path):
    reference = keras_mobilenet(size, alpha, depth_multiplier, seed=size)
    x = images(size)
    expected = keras_softmax(reference, x)
    assert expected.max() > 0.3, "a flat softmax would agree with anything"

    models = [
        loaded(save(reference, tmp_path / f"model{suffix}"), alpha, depth_multiplier)
        for suffix in FORMATS
    ]
    assert_same_state(models[0], models[1])
    assert_same_state(models[0], models[2])
    np.testing.assert_allclose(our_softmax(models[0], x), expected, rtol=0, atol=TOLERANCE)


def pad_as_torch(model):
    faulty = mobilenet_v1(0.25, CLASSES, depth_multiplier=2, padding="torch")
    faulty.load_state_dict(model.state_dict())
    return faulty


def default_eps(model):
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-5
    return model


def exchange_mean_and_bias(model):
    bn = model.conv_dw_13_bn
    bn.running_mean, bn.bias.data = bn.bias.data, bn.running_mean
    return model


def multiplier_outermost(model):
    """Count a depthwise layer's output channels as m * C + c."""
    weight = model.conv_dw_13.weight.data
    weight.copy_(weight.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1))
    return model


@pytest.mark.parametrize("size", [97, 128])
@pytest.mark.parametrize(
    "fault", [pad_as_torch, default_eps, exchange_mean_and_bias, multiplier_outermost]
)
def test_parity_would_notice(fault, size, tmp_path):
    """The comparison above is sharp: each of these slips is far beyond its tolerance."""
    reference = keras_mobilenet(size, 0.25, 2)
    faulty = fault(loaded(save(reference, tmp_path / "model.keras"), 0.25, 2))
    x = images(size)
    error = np.abs(our_softmax(faulty, x) - keras_softmax(reference, x)).max()
    assert error > 10 * TOLERANCE


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One small model in every format, by suffix; tests change copies."""
    reference, folder = keras_mobilenet(), tmp_path_factory.mktemp("files")
    return {suffix: save(reference, folder / f"model{suffix}") for suffix in FORMATS}


@pytest.fixture(scope="module")
def expected(files):
    return loaded(files[".keras"])


@pytest.mark.parametrize("group", ["layers", "_layer_checkpoint_dependencies"])
def test_weights_without_layer_names(files, expected, group, tmp_path):
    """Older files tell the layers apart by class and order alone; Keras 2.13 has another group."""
    path = Path(shutil.copy(files[".weights.h5"], tmp_path))
    with h5py.File(path, "a") as file:
        for layer in file["layers"].values():
            layer["vars"].attrs.clear()
        file.move("layers", group)
    assert_same_state(loaded(path), expected)


def test_archive_without_layer_names_follows_its_config(files, tmp_path):
    stripped = tmp_path / "stripped.keras"
    with zipfile.ZipFile(files[".keras"]) as old, zipfile.ZipFile(stripped, "w") as new:
        weights = old.extract("model.weights.h5", tmp_path)
        with h5py.File(weights, "a") as file:
            for layer in file["layers"].values():
                layer["vars"].attrs.clear()
        new.write(weights, "model.weights.h5")
        new.writestr("config.json", old.read("config.json").replace(b'"conv_pw_3"', b'"mine"'))
    with pytest.raises(ValueError, match=r"lacks the layers conv_pw_3; .* layers mine"):
        loaded(stripped)


def test_legacy_weights_as_keras_2_named_them(files, expected, tmp_path):
    """No model around the weights, ``:0`` after their names, ``depthwise_kernel``."""
    path = tmp_path / "weights.h5"
    with h5py.File(files[".h5"]) as new, h5py.File(path, "w") as old:
        for layer, group in new["model_weights"].items():
            old.create_group(layer)
            for name, data in group.get(layer, {}).items():
                name = "depthwise_kernel" if "conv_dw" in layer and name == "kernel" else name
                old[f"{layer}/{layer}/{name}:0"] = data[()]
    assert_same_state(loaded(path), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_half_precision_files(dtype, suffix, expected, tmp_path):
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        half = keras_mobilenet()
    finally:
        keras.config.set_dtype_policy(previous)
    model = loaded(save(half, tmp_path / f"half{suffix}"))
    assert model.conv1.weight.dtype == torch.float32
    kernel = expected.conv1.weight
    torch.testing.assert_close(
        model.conv1.weight, kernel.to(getattr(torch, dtype)).float(), rtol=0, atol=0
    )


@pytest.mark.parametrize("suffix", FORMATS)
def test_file_without_head(suffix, expected, tmp_path):
    path = save(keras_mobilenet(include_top=False), tmp_path / f"headless{suffix}")
    model = mobilenet_v1(0.25, CLASSES)
    head = model.conv_preds.weight.clone()
    with pytest.raises(ValueError, match=r"lacks the layer conv_preds.*strict=False"):
        load_keras_weights(model, path)
    result = load_keras_weights(model, path, strict=False)
    assert result.missing == ("conv_preds",) and result.unexpected == ()
    assert torch.equal(model.conv_preds.weight, head)
    assert torch.equal(model.conv_pw_13.weight, expected.conv_pw_13.weight)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file(files, suffix, fraction, tmp_path):
    path, data = tmp_path / f"model{suffix}", files[suffix].read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    model = mobilenet_v1(0.25, CLASSES)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"load_keras_weights: .* cannot be read as a Keras"):
        load_keras_weights(model, path)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_name_does_not_matter(files, expected, suffix, tmp_path):
    assert_same_state(loaded(Path(shutil.copy(files[suffix], tmp_path / "checkpoint"))), expected)
