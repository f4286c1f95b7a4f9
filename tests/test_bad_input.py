"""The same bad inputs to every backend: the same sentence, before anything runs."""

from __future__ import annotations

import re

import pytest
import torch

from mnet_kernels import _C, backends, ops

X = torch.randn(2, 4, 8, 8)
WEIGHT = torch.randn(4, 1, 3, 3)
ONES = torch.ones(4)

#: (what is wrong, changed arguments, the sentence: argument, expected, actual)
CASES = [
    ("rank of x", dict(x=X[0]), r"x: expected 4 dimensions \(N, C, H, W\), got shape \(4, 8, 8\)"),
    ("dtype of x", dict(x=X.int()), r"x: expected float32, float64, float16 or bfloat16, got Int"),
    ("complex x", dict(x=X.cfloat()), r"x: expected float32, .*, got ComplexFloat"),
    (
        "no channels",
        dict(x=X[:, :0]),
        r"x: expected at least one channel, got shape \(2, 0",
    ),
    ("rank of weight", dict(weight=WEIGHT[:, 0]), r"weight: expected 4 dimensions .*\(4, 3, 3\)"),
    (
        "channels",
        dict(weight=torch.randn(6, 1, 3, 3)),
        r"weight: expected shape \(4\*M, 1, Kh, Kw\) for x with 4 channels, got shape \(6, 1, 3",
    ),
    ("not depthwise", dict(weight=torch.randn(4, 4, 3, 3)), r"weight: expected shape \(4\*M, 1"),
    ("empty kernel", dict(weight=WEIGHT[:, :, :0]), r"weight: expected shape \(4\*M, 1, Kh, Kw\)"),
    ("dtype mix", dict(weight=WEIGHT.double()), r"weight: expected x's dtype float32, got float64"),
    (
        "scale length",
        dict(scale=torch.ones(3)),
        r"scale: expected shape \(4,\), .*got .*\(3,\)",
    ),
    ("scale rank", dict(scale=torch.ones(4, 1)), r"scale: expected shape \(4,\), .*\(4, 1\)"),
    ("scale dtype", dict(scale=ONES.double()), r"scale: expected float32 \(x is float32\), got fl"),
    (
        "shift length",
        dict(shift=torch.ones(5)),
        r"shift: expected shape \(4,\), .*got .*\(5,\)",
    ),
    ("shift dtype", dict(shift=ONES.half()), r"shift: expected float32 .*, got float16"),
    ("zero stride", dict(stride=0), r"stride: expected positive, got \(0, 0\)"),
    ("negative stride", dict(stride=(1, -2)), r"stride: expected positive, got \(1, -2\)"),
    ("three strides", dict(stride=(1, 1, 1)), r"stride: expected an int or a pair"),
    ("zero dilation", dict(dilation=0), r"dilation: expected positive, got \(0, 0\)"),
    (
        "negative padding",
        dict(padding=-1),
        r"padding: expected non-negative, got \(-1, -1",
    ),
    ("three paddings", dict(padding=(1, 1, 1)), r"padding: expected an int, \(h, w\), \(top"),
    ("huge dilation", dict(dilation=2**40), r"stride, padding and dilation: expected below 2\^31"),
    (
        "no output",
        dict(padding=0, x=X[..., :2]),
        r"x: expected a padded size .*3 x 3 .*8 x 2",
    ),
    ("empty plane", dict(x=X[..., :0], padding=3), r"x: expected a padded size .* got 14 x 6"),
    (
        "activation",
        dict(activation="gelu"),
        r"activation: expected one of identity, .*'gelu'",
    ),
    ("slope", dict(slope=float("nan")), r"slope: expected a finite number, got nan"),
    ("infinite slope", dict(slope=float("inf")), r"slope: expected a finite number, got inf"),
]
SERVING = [name for name in backends.NAMES if backends.why_not(name) is None]


@pytest.mark.parametrize("backend", [None, *SERVING])
@pytest.mark.parametrize("change,sentence", [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_dwconv_bn_act(backend, change, sentence):
    call = dict(x=X, weight=WEIGHT, scale=ONES, shift=ONES, padding=1) | change
    if backend in ("cpu", "triton") and call["x"].dtype in (torch.int32, torch.complex64):
        sentence = f"backend: expected one that can serve x, got '{backend}'"
    with pytest.raises(RuntimeError, match="^dwconv_bn_act: " + sentence) as caught:
        ops.dwconv_bn_act(**call, backend=backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", [None, *SERVING])
@pytest.mark.parametrize(
    "change,sentence",
    [
        (
            dict(weight=torch.randn(6, 3, 1, 1)),
            r"weight: expected shape \(C_out, 4, Kh, Kw\) for",
        ),
        (dict(groups=3), r"groups: expected a positive divisor of x's 4 channels, got 3"),
        (dict(groups=-1), r"groups: expected a positive divisor of x's 4 channels, got -1"),
        (dict(stride=0), r"stride: expected positive"),
        (dict(activation="tanh"), r"activation: expected one of"),
        (dict(scale=torch.ones(3)), r"scale: expected shape \(6,\)"),
    ],
    ids=str,
)
def test_conv_bn_act(backend, change, sentence):
    x = X.to(memory_format=torch.channels_last)
    call = dict(x=x, weight=torch.randn(6, 4, 1, 1)) | change
    with pytest.raises(RuntimeError, match="^conv_bn_act: " + sentence):
        ops.conv_bn_act(**call, backend=backend)


def test_packed_weights_of_another_layer():
    packed = ops.pack_conv_weight(torch.randn(6, 4, 3, 3))
    with pytest.raises(RuntimeError, match=r"conv_bn_act: packed: expected .* got 1152 values"):
        ops.conv_bn_act_packed(X, packed, kernel_size=1, out_channels=6)
    with pytest.raises(RuntimeError, match="weight: expected a float32 or bfloat16 CPU"):
        ops.pack_conv_weight(torch.randn(6, 4, 3, 3).double())
    with pytest.raises(RuntimeError, match="x: expected float32 or bfloat16, got float64"):
        ops.conv_bn_act_packed(X.double(), packed.double(), kernel_size=3, out_channels=6)


@pytest.mark.parametrize("backend", [None, *SERVING])
def test_wrong_python_types(backend):
    for bad in (dict(x="image"), dict(x=None), dict(weight=3), dict(stride="two"), dict(slope="x")):
        argument = next(iter(bad))
        call = dict(x=X, weight=WEIGHT) | bad
        with pytest.raises((RuntimeError, TypeError), match=rf"{argument}\b") as caught:
            ops.dwconv_bn_act(**call, backend=backend)
        assert type(bad[argument]).__name__ in str(caught.value)  # the actual type


def test_backends_that_cannot_serve():
    with pytest.raises(RuntimeError, match="there is no backend 'tpu'; the backends are cpu, cuda"):
        ops.dwconv_bn_act(X, WEIGHT, backend="tpu")
    for name in set(backends.NAMES) - set(SERVING):
        reason = backends.why_not(name)
        with pytest.raises(RuntimeError, match=re.escape(reason)):
            ops.dwconv_bn_act(X, WEIGHT, backend=name)


@pytest.mark.parametrize("name", ["weight", "scale", "shift"])
def test_device_mix(name):
    call = dict(x=X, weight=WEIGHT, scale=ONES, shift=ONES)
    call[name] = call[name].to("meta")
    for backend in (None, *SERVING):
        sentence = f"^dwconv_bn_act: {name}: expected x's device cpu, got meta"
        with pytest.raises(RuntimeError, match=sentence):
            ops.dwconv_bn_act(**call, backend=backend)


def test_instruction_sets():
    with pytest.raises(RuntimeError, match=r"expected one of .*baseline, got 'mmx'"):
        _C.set_instruction_set("mmx")


def test_inputs_are_left_alone():
    before = [t.clone() for t in (X, WEIGHT, ONES)]
    ops.dwconv_bn_act(X, WEIGHT, ONES, ONES)
    with pytest.raises(RuntimeError):
        ops.dwconv_bn_act(X, WEIGHT, ONES, ONES, stride=0)
    assert all(torch.equal(a, b) for a, b in zip(before, (X, WEIGHT, ONES), strict=True))
