"""The recipe against Keras: pictures, optimiser, one step of a native and of a swapped model."""

import os

import numpy as np
import pytest
import torch
from torch import nn

from mnet_kernels.swap import swap
from mnet_kernels.training import recipe

# Keras' own.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def keras_image():
    os.environ.setdefault("KERAS_BACKEND", "torch")
    return pytest.importorskip("keras.src.legacy.preprocessing.image")


@pytest.mark.parametrize("shape", [(32, 32), (33, 47)])
def test_augmentation_is_keras(shape):
    """Each picture against ImageDataGenerator's own transform of it, on the pixels in [-1, 1]."""
    generator = keras_image().ImageDataGenerator(data_format="channels_last")
    images = torch.randint(0, 256, (6, 3, *shape), dtype=torch.uint8)
    draws = torch.rand(6, 3)
    ours = recipe.augment(images, draws, 0.1, flips=True)
    for x, (row, column, mirror), y in zip(images, draws.tolist(), ours, strict=True):
        parameters = {  # its tx moves columns
            "tx": (2 * column - 1) * 0.1 * shape[1],
            "ty": (2 * row - 1) * 0.1 * shape[0],
            "flip_horizontal": mirror < 0.5,
        }
        picture = recipe.scale(x).permute(1, 2, 0).double().numpy()
        expected = generator.apply_transform(picture, parameters)
        np.testing.assert_allclose(y.permute(1, 2, 0), expected, rtol=0, atol=2e-5)


def test_without_shift_and_flips_pixels_are_only_scaled():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    plain = recipe.augment(images, torch.rand(4, 3), 0.0, flips=False)
    assert torch.equal(plain, images.float() / 127.5 - 1)
    assert (plain.min(), plain.max()) == (-1, 1)


def test_nadam_is_keras():
    keras_image()
    import keras

    values = torch.randn(7, dtype=torch.float64)
    theirs = keras.Variable(values.numpy(), dtype="float64")
    layer = nn.ParameterList([values.clone()])
    ours, optimizer = recipe.nadam(layer, 1e-3), keras.optimizers.Nadam()
    optimizer.build([theirs])
    for _ in range(50):
        gradient = torch.randn(7, dtype=torch.float64)
        optimizer.apply([gradient], [theirs])
        layer[0].grad = gradient
        ours.step()
    # Keras keeps its hyper-parameters in float32.
    torch.testing.assert_close(layer[0].data, theirs.value.data, rtol=0, atol=1e-7)
    assert (layer[0].data - values).abs().min() > 1e-3


def keras_step(model, x, y):
    """(loss, gradients and moving statistics by our names) of one step of Keras, on its weights."""
    import keras

    probabilities = model(x, training=True)
    loss = keras.losses.sparse_categorical_crossentropy(y, probabilities).mean()
    loss.backward()
    found = {}
    for layer in model.layers:
        for weight in layer.weights:
            value = weight.value.detach() if weight.value.grad is None else weight.value.grad
            if weight.value.ndim == 4:
                depthwise = "conv_dw" in layer.name
                order = (2, 3, 0, 1) if depthwise else (3, 2, 0, 1)
                value = value.permute(*order)
                value = value.flatten(0, 1).unsqueeze(1) if depthwise else value
            name = {
                "kernel": "weight", "gamma": "weight", "beta": "bias",
                "moving_mean": "running_mean", "moving_variance": "running_var",
            }.get(weight.name, weight.name)  # fmt: skip
            found[f"{layer.name}.{name}"] = value
    return loss.detach(), found


@pytest.mark.parametrize("swapped", [False, True], ids=["native", "swapped"])
def test_one_training_step_is_keras(swapped, tmp_path, monkeypatch):
    """Loss, every gradient, every moving statistic, in float64.

    Keras moves its variance towards the batch's biased variance (divided by n), torch's BatchNorm
    towards the unbiased one (by n - 1): ours is checked against Keras' with that factor, which is
    8/7 where a channel is eight numbers, and soon nothing. The step itself does not depend on it:
    both normalise with the biased variance.
    """
    keras_image()
    import keras
    from keras.src.backend.common import dtypes
    from keras.src.layers.normalization import batch_normalization
    from test_keras_parity import keras_mobilenet, loaded, save

    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    # Its BatchNorm and mean work in float32 whatever the policy says, which would blur this.
    for module in (batch_normalization.backend, dtypes):
        monkeypatch.setattr(module, "result_type", lambda *_: "float64")
    try:
        reference = keras_mobilenet(32, 0.25, dropout=0.0)
        model = loaded(save(reference, tmp_path / "model.keras"), dropout=0.0).double()
        # Ours took the weights in as float32: Keras must have the same.
        before = {k: v.clone() for k, v in model.state_dict().items()}
        for layer in reference.layers:
            layer.set_weights([w.astype(np.float32) for w in layer.get_weights()])
        x = torch.randn(8, 3, 32, 32).double()  # Keras makes its inputs float32
        y = torch.arange(8) % 10
        loss, expected = keras_step(reference, x.permute(0, 2, 3, 1), y)
    finally:
        keras.config.set_dtype_policy(policy)

    pixels = count_pixels(model, x)
    model.train()
    ours = nn.functional.cross_entropy((swap(model) if swapped else model)(x), y)
    ours.backward()
    torch.testing.assert_close(ours.detach(), loss, rtol=1e-9, atol=0)
    for name, parameter in model.named_parameters():
        scale = float(expected[name].abs().max())
        assert scale > 0
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=0, atol=1e-9 * scale, msg=lambda m, n=name: n + m
        )
    for name, n in pixels.items():
        mean, variance = f"{name}.running_mean", f"{name}.running_var"
        torch.testing.assert_close(model.get_buffer(mean), expected[mean], rtol=0, atol=1e-9)
        kept = 0.99 * before[variance]
        unbiased = kept + (expected[variance] - kept) * n / (n - 1)
        torch.testing.assert_close(model.get_buffer(variance), unbiased, rtol=1e-9, atol=0)
        assert not torch.allclose(model.get_buffer(variance), expected[variance], rtol=1e-9)
    assert len(pixels) == 27 and min(pixels.values()) == 8


def count_pixels(model, x):
    """By BatchNorm, how many numbers a channel it sees: n of its variance."""
    count = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: count.update({name: args[0][:, 0].numel()})
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return count
