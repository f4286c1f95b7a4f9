"""Native and swapped models from the same seed stay together on real data.

A freshly made MobileNet multiplies a rounding by two to a hundred in every step of the recipe's
learning rate (its gradients are in the hundreds): no two ways to round stay together for 100 of
those, native's two layouts no more than native and ours. So the free run is a slow one, and along
a course of the recipe's own rate both take each step from the same state.
"""

import copy

import pytest
import torch
from torch import nn

from mnet_kernels.models import mobilenet_v1
from mnet_kernels.swap import explain, swap
from mnet_kernels.training import datasets, recipe

STEPS, BATCH = 100, 16


@pytest.fixture(scope="module")
def batches():
    """Pictures in [-1, 1] and classes of each step: scikit-learn's digits."""
    images = datasets.open_images("digits").train
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    found = []
    for step in range(STEPS):
        at = torch.arange(BATCH * step, BATCH * (step + 1)) % len(order)
        chosen = [images[i] for i in order[at]]
        x = recipe.scale(torch.stack([image for image, _ in chosen]))
        found.append((x, torch.tensor([label for _, label in chosen])))
    return found


def pair(dtype):
    """A native model, and a swapped one from the same seed."""
    models = []
    for make in (lambda m: m, swap):
        torch.manual_seed(1)
        models.append(make(mobilenet_v1(0.25, 10, dropout=0.0).to(dtype)).train())
    assert sum(row.training != "native" for row in explain(models[1]).rows) >= 13
    return models


def without_scaler():
    return torch.amp.GradScaler("cpu", enabled=False)


def run(model, batches, rate=1e-5):
    """(losses by step, state at the end), in float64."""
    optimizer = recipe.nadam(model, rate)
    dtype = next(model.parameters()).dtype
    losses = [
        recipe.step(model, optimizer, without_scaler(), x.to(dtype), y)[0] for x, y in batches
    ]
    return torch.stack(losses).double(), {k: v.double() for k, v in model.state_dict().items()}


def apart(a, b):
    """How far two runs are from one another at most, in any loss and any element of the state."""
    (losses, state), (others, other) = a, b
    states = max(float((state[k] - other[k]).abs().max()) for k in state)
    return max(states, float((losses - others).abs().max()))


#: Four and a half million roundings of the dtype: 1e-9 in float64.
ROUNDINGS = 1e-9 / torch.finfo(torch.float64).eps


def test_a_free_run_stays_together_over_100_steps(batches):
    native, fast = (run(model, batches) for model in pair(torch.float64))
    assert native[0][-10:].mean() < native[0][:10].mean(), "it learns"
    assert apart(native, fast) < ROUNDINGS * torch.finfo(torch.float64).eps


def test_it_would_notice_a_part_in_a_million(batches):
    native, other = pair(torch.float64)[0], pair(torch.float64)[0]
    other.conv_dw_7_bn.eps *= 1 + 1e-6
    few = batches[:10]
    assert apart(run(native, few), run(other, few)) > ROUNDINGS * torch.finfo(torch.float64).eps


def take(model, optimizer, state):
    """Both get a state: (of the model, of the optimiser)."""
    model.load_state_dict(state[0])
    optimizer.load_state_dict(copy.deepcopy(state[1]))


OPTIMIZERS = {
    "nadam": lambda model: recipe.nadam(model, 1e-3),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_of_the_recipe_is_natives(name, batches):
    """On native's course in float64: loss, and where the step leads to."""
    models = pair(torch.float64)
    optimizers = [OPTIMIZERS[name](model) for model in models]
    losses = []
    for x, y in batches[: 100 if name == "sgd" else 30]:
        x, y = x[:8], y[:8]
        state = models[0].state_dict(), optimizers[0].state_dict()
        take(models[1], optimizers[1], state)
        pairs = zip(models, optimizers, strict=True)
        steps = [recipe.step(m, o, without_scaler(), x.double(), y)[0] for m, o in pairs]
        losses.append(float(steps[0]))
        torch.testing.assert_close(steps[1], steps[0], rtol=0, atol=1e-9)
        ours, native = (model.state_dict() for model in reversed(models))
        for key, value in native.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-9, msg=key)
    assert sum(losses[-10:]) < sum(losses[:10]), "it learns"


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_lower_precision_is_no_further_from_float64_than_native(autocast, batches):
    """Losses and gradients at ten points of the same course, channels_last: the median of ours may
    be twice as far from float64 as native's, or some roundings of the dtype."""
    course = pair(torch.float64)[0]
    optimizer = OPTIMIZERS["nadam"](course)
    models = pair(torch.float32)
    errors = [[], []]  # native's and ours: (of the loss, of the gradients) at each point
    for step, (x, y) in enumerate(batches[:50]):
        if step % 5 == 0:
            exact = gradients(copy.deepcopy(course), x.double(), y, None)
            for error, model in zip(errors, models, strict=True):
                model.load_state_dict(course.state_dict())
                found = gradients(model, x.to(memory_format=torch.channels_last), y, autocast)
                error.append([float(relative(a, b)) for a, b in zip(found, exact, strict=True)])
        recipe.step(course, optimizer, without_scaler(), x.double(), y)
    eps = torch.finfo(autocast or torch.float32).eps
    native, ours = torch.tensor(errors).median(dim=1).values
    assert (ours <= torch.maximum(2 * native, torch.tensor(8 * eps))).all(), errors


def gradients(model, x, y, autocast):
    """(loss, all gradients in one vector)."""
    model.zero_grad()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def relative(found, exact):
    return (found.double() - exact).norm() / exact.norm()
