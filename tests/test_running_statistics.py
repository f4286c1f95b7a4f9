"""Running statistics after a batch, in place, against nn.BatchNorm2d's formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from mnet_kernels import batch_statistics
from mnet_kernels.batch_statistics import update


def given(dtype=torch.float32, channels=37):
    running = torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype)
    return *running, torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, 0.013])
def test_values(dtype, momentum):
    tensors = given(dtype)
    running_mean, running_var, mean, var = (t.double().clone() for t in tensors)
    update(*tensors, momentum, 12)
    expected = (
        (1 - momentum) * running_mean + momentum * mean,
        (1 - momentum) * running_var + momentum * var * (12 / 11),
    )
    for right, got in zip(expected, tensors, strict=False):
        torch.testing.assert_close(got, right.to(dtype), rtol=2e-7, atol=0)
    assert torch.equal(tensors[2].double(), mean)


def test_strides():
    tensors = given()
    wide = [torch.stack([t, torch.full_like(t, 7.0)], 1)[:, 0] for t in tensors]
    update(*tensors, 0.3, 5)
    update(*wide, 0.3, 5)
    for t, strided in zip(tensors, wide, strict=True):
        assert torch.equal(t, strided) and (strided._base[:, 1] == 7).all()


def test_whatever_the_gradient_mode():
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            tensors = given()
            before = tensors[0].clone()
            update(*tensors, 0.5, 9)
            assert not torch.equal(before, tensors[0])


def test_opcheck():
    opcheck(batch_statistics._update, (*given(), 0.1, 12))


@pytest.mark.parametrize("name", ["running_mean", "running_var", "var"])
def test_bad_input(name):
    names = ["running_mean", "running_var", "mean", "var"]
    for wrong, sentence in (
        (torch.ones(3), r"expected mean's shape \(37,\), got shape \(3,\)"),
        (torch.ones(37).double(), "expected mean's dtype float32, got float64"),
    ):
        tensors = dict(zip(names, given(), strict=True))
        kept = {n: t.clone() for n, t in tensors.items()}
        with pytest.raises(RuntimeError, match=f"update_running_statistics: {name}: {sentence}"):
            update(*(tensors | {name: wrong}).values(), 0.1, 12)
        assert all(torch.equal(kept[n], t) for n, t in tensors.items())
