"""The CUDA operators' checks, without a GPU: bad arguments are told, in the CPU's words, before a
device is touched, so the operators' CUDA implementations can be given them as CPU tensors."""

from __future__ import annotations

import pytest
import torch
from test_bad_input import CASES

pytest.importorskip("mnet_kernels._cuda", exc_type=ImportError)

CONSTANTS = {"stride": 1, "padding": 1, "dilation": 1, "activation": "relu", "slope": 0.0}


def call(name: str, tensors: dict, **others):
    """`name` as dispatched for CUDA tensors."""
    constants = CONSTANTS | {key: others.pop(key) for key in CONSTANTS if key in others}
    for key, size in (("stride", 2), ("padding", 4), ("dilation", 2)):
        value = constants[key]
        constants[key] = [value] * size if isinstance(value, int) else list(value)
    operator = getattr(torch.ops.mnet_kernels, name).default
    key = torch._C.DispatchKey.CUDA
    return operator._op_dk(key, *tensors.values(), *constants.values(), *others.values())


def tensors() -> dict:
    return {"x": torch.randn(2, 4, 8, 8), "weight": torch.randn(4, 1, 3, 3)}


def training() -> dict:
    return tensors() | {"gamma": torch.ones(4), "beta": torch.ones(4)}


def gradients_of(given: dict) -> dict:
    """What the backward of training takes, in its order; a GPU keeps no convolution."""
    first = {"dy": torch.randn(2, 4, 8, 8), "x": given["x"], "z": torch.empty(0)}
    return first | given | {"mean": torch.ones(4), "var": torch.ones(4)}


@pytest.mark.parametrize("name", [
    "dwconv_bn_act", "dwconv_bn_act_backward", "dwconv_bn_act_training",
    "dwconv_bn_act_training_backward", "separable_conv", "conv_bn_act",
])  # fmt: skip
def test_is_registered(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mnet_kernels::{name}", "CUDA")


@pytest.mark.parametrize("change,sentence", [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_forward_and_backward_say_what_the_cpu_says(change, sentence):
    given = tensors() | {"scale": torch.ones(4), "shift": torch.ones(4)}
    given = {name: change.get(name, t) for name, t in given.items()}
    others = {name: value for name, value in change.items() if name in CONSTANTS}
    with pytest.raises(RuntimeError, match="^dwconv_bn_act: " + sentence):
        call("dwconv_bn_act", given, **others)
    gradient = {"dy": torch.randn(2, 4, 8, 8)} | given
    with pytest.raises(RuntimeError, match="^dwconv_bn_act_backward: " + sentence):
        call("dwconv_bn_act_backward", gradient, **others, data=True, sums=True)


TRAINING = [
    ({"gamma": torch.ones(3)}, r"gamma: expected shape \(4,\), one value an output channel"),
    ({"beta": torch.ones(4).double()}, r"beta: expected float32 \(x is float32\), got float64"),
    ({"weight": torch.randn(5, 1, 3, 3)}, "weight: expected shape"),
    ({"x": torch.randn(2, 4, 8, 8).double(), "weight": torch.randn(4, 1, 3, 3).double()},
     "x: expected float32, float16 or bfloat16 on a GPU, got float64"),
    ({"x": torch.randn(1, 4, 1, 1)},
     r"x: expected more than one value a channel in training, got an output of shape \(1, 4, 1, 1"),
    ({"eps": -1.0}, "eps: expected a finite number, at least 0, got -1"),
    ({"eps": float("nan")}, "eps: expected a finite number, at least 0, got nan"),
    ({"activation": "tanh"}, "activation: expected one of identity, .*, got 'tanh'"),
]  # fmt: skip


@pytest.mark.parametrize("change,sentence", TRAINING, ids=[sentence for _, sentence in TRAINING])
def test_training(change, sentence):
    given = {name: change.get(name, t) for name, t in training().items()}
    others = {"activation": change.get("activation", "relu"), "eps": change.get("eps", 1e-5)}
    with pytest.raises(RuntimeError, match="^dwconv_bn_act_training: " + sentence):
        call("dwconv_bn_act_training", given, **others)
    given = gradients_of(given)
    with pytest.raises(RuntimeError, match="^dwconv_bn_act_training_backward: " + sentence):
        call("dwconv_bn_act_training_backward", given, **others, data=True, sums=True)


@pytest.mark.parametrize("change,sentence", [
    ({"dy": torch.randn(2, 4, 8, 7)}, r"dy: expected the output's shape \(2, 4, 8, 8\), got"),
    ({"dy": torch.randn(2, 4, 8, 8).double()}, "dy: expected x's dtype float32, got float64"),
    ({"mean": torch.ones(3)}, r"mean: expected shape \(4,\)"),
    ({"var": torch.ones(4).double()}, r"var: expected float32 \(x is float32\), got float64"),
])  # fmt: skip
def test_what_only_the_backward_of_training_takes(change, sentence):
    given = gradients_of(training()) | change
    with pytest.raises(RuntimeError, match="^dwconv_bn_act_training_backward: " + sentence):
        call("dwconv_bn_act_training_backward", given, eps=1e-5, data=True, sums=True)


CONV = [
    ({"x": torch.randn(4, 8, 8)}, "x: expected 4 dimensions"),
    ({"weight": torch.randn(6, 3, 3, 3)}, r"weight: expected shape \(C_out, 4, Kh, Kw\)"),
    ({"weight": torch.randn(6, 4, 3, 3).bfloat16()}, "weight: expected x's dtype float32"),
    ({"scale": torch.ones(4)}, r"scale: expected shape \(6,\), one value an output channel"),
    ({"shift": torch.ones(6).half()}, r"shift: expected float32 \(x is float32\), got float16"),
    ({"x": torch.randn(2, 4, 8, 8).double(), "weight": torch.randn(6, 4, 3, 3).double(),
      "scale": None, "shift": None},
     "x: expected float32, float16 or bfloat16 on a GPU, got float64"),
    ({"stride": 0}, "stride: expected positive"),
    ({"activation": "tanh"}, "activation: expected one of identity, .*, got 'tanh'"),
]  # fmt: skip


@pytest.mark.parametrize("change,sentence", CONV, ids=[sentence for _, sentence in CONV])
def test_a_dense_convolution(change, sentence):
    given = {"x": torch.randn(2, 4, 8, 8), "weight": torch.randn(6, 4, 3, 3)}
    given |= {"scale": torch.ones(6), "shift": torch.ones(6)}
    given = {name: change.get(name, t) for name, t in given.items()}
    others = {name: value for name, value in change.items() if name in CONSTANTS}
    with pytest.raises(RuntimeError, match="^conv_bn_act: " + sentence):
        call("conv_bn_act", given, **others)
