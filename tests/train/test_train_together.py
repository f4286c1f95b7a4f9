"""Native and swapped models from the same seed stay together on real data."""

import torch

from mnet_kernels import datasets, recipe
from mnet_kernels.models import mobilenet_v1
from mnet_kernels.swap import sites, swap


def without_scaler():
    return torch.amp.GradScaler("cpu", enabled=False)


def hundred_steps(model, steps=100):
    """Loss by step on scikit-learn's digits, and the model's last state; float64."""
    images = datasets.open_images("digits")
    optimizer, scaler = recipe.nadam(model.train(), 1e-3), without_scaler()
    losses = []
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(0))
    for i in range(steps):
        batch = [images.train[j] for j in order[torch.arange(32 * i, 32 * i + 32) % len(order)]]
        x = recipe.scale(torch.stack([image for image, _ in batch])).double()
        y = torch.tensor([label for _, label in batch])
        losses.append(recipe.step(model, optimizer, scaler, x, y)[0])
    return torch.stack(losses), {k: v.double().clone() for k, v in model.state_dict().items()}


def furthest(a, b):
    (losses, state), (others, other) = a, b
    states = max(float((state[k] - other[k]).abs().max()) for k in state)
    return max(states, float((losses - others).abs().max()))


def test_native_and_swapped_stay_together_over_100_steps():
    native = mobilenet_v1(0.125, 10, dropout=0.0).double()
    before = {k: v.clone() for k, v in native.state_dict().items()}
    expected = hundred_steps(native)
    assert expected[0][-10:].mean() < 0.8 * expected[0][:10].mean(), "it learns"
    native.load_state_dict(before)
    fast = swap(native)
    assert len(list(sites(fast))) == 27
    assert furthest(hundred_steps(fast), expected) < 1e-9


def test_staying_together_would_notice_a_part_in_a_million():
    native = mobilenet_v1(0.125, 10, dropout=0.0).double()
    before = {k: v.clone() for k, v in native.state_dict().items()}
    expected = hundred_steps(native, 10)
    native.load_state_dict(before)
    native.conv_dw_7_bn.eps *= 1 + 1e-6
    assert furthest(hundred_steps(native, 10), expected) > 1e-9
