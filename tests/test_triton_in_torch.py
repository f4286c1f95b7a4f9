"""The Triton operators inside torch, without a GPU: opaque in Triton's interpreter, traced as
kernels otherwise."""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import rulers
import torch
from rulers import problem
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from mnet_kernels import backends, explain, ops, swap

triton = pytest.importorskip("triton")
tl = triton.language
CONSTANTS = ((2, 1), (0, 1, 2, 1), (1, 1), "hardswish", 0.01)

interpreted = pytest.mark.skipif(
    rulers.BACKEND != "triton", reason="runs under test_triton.py, in Triton's interpreter"
)
traced = pytest.mark.skipif(
    rulers.BACKEND == "triton", reason="the interpreter's kernels are opaque"
)


def test_our_package_does_not_hide_triton():
    import triton

    from mnet_kernels.triton import operators

    assert hasattr(triton, "jit")
    assert operators.__name__ == "mnet_kernels.triton.operators"
    assert sys.modules["triton"] is triton


@interpreted
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(channels_last, requires_grad):
    from mnet_kernels.triton import operators

    p = problem((2, 3, 5, 6), channels_last=channels_last, multiplier=2)
    y = operators.dwconv_bn_act(*p.tensors, *CONSTANTS)
    backward = (torch.randn_like(y), *p.tensors, *CONSTANTS, [True, False, True, True])
    opcheck(torch.ops.mnet_kernels.dwconv_bn_act_triton_backward.default, backward)
    if requires_grad:
        for t in p.tensors:
            t.requires_grad_()
    opcheck(torch.ops.mnet_kernels.dwconv_bn_act_triton.default, (*p.tensors, *CONSTANTS))


@interpreted
def test_compile_and_export():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 1, 3, 3))

        def forward(self, x):
            y = ops.dwconv_bn_act(
                x * 2, self.weight, stride=2, padding="same", activation="silu", backend="triton"
            )
            return y.mean((2, 3))

    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        x = torch.randn(batch, 4, 6, 6)
        torch.testing.assert_close(compiled(x), layer(x))
    (ours,) = torch.autograd.grad(compiled(x).square().sum(), layer.weight)
    (eager,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    torch.testing.assert_close(ours, eager)

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    assert any("dwconv_bn_act_triton" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(5, 4, 6, 6)
    torch.testing.assert_close(program.module()(x), layer(x))


@interpreted
def test_autocast_convolves_in_the_autocast_dtype():
    p = problem((2, 3, 5, 6), padding=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = p.run()
    q = rulers.Problem(p.x.bfloat16(), p.weight.bfloat16(), p.scale, p.shift, p.constants)
    assert torch.equal(y, q.run())


@interpreted
@pytest.mark.parametrize("in_dims", [(0, None), (1, None), (0, 0)])
def test_vmap(in_dims):
    x = torch.randn({0: (2, 1, 3, 4, 4), 1: (1, 2, 3, 4, 4)}[in_dims[0]])
    weight = torch.randn((3, 1, 3, 3) if in_dims[1] is None else (2, 3, 1, 3, 3))

    def call(x, weight):
        return ops.dwconv_bn_act(x, weight, padding=1, backend="triton")

    rows = [call(x.select(in_dims[0], i), weight if in_dims[1] is None else weight[i])
            for i in range(2)]  # fmt: skip
    torch.testing.assert_close(torch.vmap(call, in_dims)(x, weight), torch.stack(rows))


@interpreted
def test_swap():
    conv = torch.nn.Conv2d(4, 4, 3, 2, 1, groups=4, bias=False)
    model = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(4), torch.nn.ReLU6()).eval()
    fast = swap(model, backend="triton")
    assert [row.backend for row in explain(fast).rows] == ["triton"]
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(fast(x), model(x))


@interpreted
def test_offsets_of_64_bits():
    """A padded plane beyond 2^30 pixels, of which the output sees few."""
    p = problem(
        (1, 2, 4, 4), (1, 1), padding=(2**30, 2, 2**30, 2), stride=(2**29, 1), activation="identity"
    )
    y = p.run()
    assert y.shape == (1, 2, 5, 8)
    torch.testing.assert_close(y, _sparse(p, y.shape))


def _sparse(p, shape):
    """Row 2 of the output is row 0 of x, all others are padding."""
    y = p.shift.view(1, -1, 1, 1).expand(shape).clone()
    affine = p.x * p.weight.view(1, -1, 1, 1) * p.scale.view(1, -1, 1, 1)
    y[:, :, 2, 2:6] += affine[:, :, 0]
    return y


@interpreted
def test_every_configuration(monkeypatch):
    """Not only the one that the interpreter would take."""
    from mnet_kernels.triton import launch

    for choice in range(3):
        monkeypatch.setattr(launch, "interpreted_choice", choice)
        for channels_last in (False, True):
            for dtype in (torch.float32, torch.bfloat16):
                p = problem(
                    (1, 3, 7, 8), dtype=dtype, channels_last=channels_last, padding=1, stride=1
                )
                x = p.x.clone(memory_format=torch.preserve_format).requires_grad_()
                weight = p.weight.clone().requires_grad_()
                q = rulers.Problem(x, weight, p.scale, p.shift, p.constants)
                y = q.run()
                rulers.assert_correct(p, y.detach())
                dy = torch.randn(1, 3, 7, 8).to(dtype)
                found = torch.autograd.grad(y, (x, weight), dy)
                rulers.assert_gradients_correct(
                    p, dy, dict(zip(("x", "weight"), found, strict=True))
                )


@triton.jit
def _programs(y_ptr, FAULT: tl.constexpr):
    """y_ptr: (programs, 4) int32; element j of program i becomes j + (j + 1) + ... i terms."""
    i = tl.program_id(0)
    lanes = tl.arange(0, 4)
    if FAULT == "branch" and i > 70:
        lanes += 1
    sum = tl.full((4,), 0, tl.int32)
    for turn in range(0, i):
        sum += turn + lanes
    if FAULT == "overflow":
        sum = i * 2**25
    tl.store(y_ptr + i * 4 + lanes, sum)


@interpreted
def test_programs_of_the_interpreter_whose_loops_differ_run_apart():
    y = torch.full((100, 4), -1, dtype=torch.int32)
    _programs[(100,)](y, "none")
    i, j = torch.arange(100)[:, None], torch.arange(4)
    assert torch.equal(y.long(), i * (i - 1) // 2 + i * j)


@interpreted
@pytest.mark.parametrize("fault", ["branch", "overflow"])
def test_the_interpreter_sees(fault):
    y = torch.zeros(100, 4, dtype=torch.int32)
    with pytest.raises(Exception, match={"branch": "branches", "overflow": "overflows"}[fault]):
        _programs[(100,)](y, fault)


@traced
@pytest.mark.parametrize("channels_last", [False, True])
def test_torch_compile_sees_the_kernels(channels_last):
    """Forward and backward decompose into kernel launches, with a dynamic batch."""
    from mnet_kernels.triton import operators

    constants = ((1, 1), (1, 1, 1, 1), (1, 1), "relu6", 0.01)

    def step(x, weight, scale):
        y = operators.dwconv_bn_act(x, weight, scale, None, *constants)
        needed = [True, True, True, False]
        return y, *operators.dwconv_bn_act_backward(y, x, weight, scale, None, *constants, needed)

    layout = torch.channels_last if channels_last else torch.contiguous_format
    with FakeTensorMode():
        x = torch.empty(4, 8, 14, 14, device="cuda").to(memory_format=layout)
        weight, scale = torch.empty(8, 1, 3, 3, device="cuda"), torch.empty(8, device="cuda")
        graph = make_fx(dispatch_functionalize(step), tracing_mode="fake")(x, weight, scale)
    names = [str(node.target) for node in graph.graph.nodes]
    kernels = [name for name in names if "triton_kernel_wrapper" in name]
    assert len(kernels) == 4


@traced
def test_torch_compile_sees_the_kernels_of_training_of_a_pair_and_of_the_dense():
    from mnet_kernels.triton import operators

    geometry = ((1, 1), (1, 1, 1, 1), (1, 1))

    def step(x, weight, gamma, pointwise, stem):
        constants = (*geometry, "relu6", 0.01, 1e-5)
        y, *statistics = operators.dwconv_bn_act_training(x, weight, gamma, None, *constants)
        gradients = operators.dwconv_bn_act_training_backward(
            y, x, weight, gamma, None, *statistics, *constants, True, True
        )
        pair = operators.separable_conv(
            x, weight, gamma, None, pointwise, None, None, None, *geometry, "relu6", "silu", 0.01
        )
        dense = operators.conv_bn_act(x, stem, None, None, (2, 2), (), (1, 1), "relu", 0.01)
        return *gradients, pair, dense

    with FakeTensorMode():
        x = torch.empty(4, 8, 14, 14, device="cuda").to(memory_format=torch.channels_last)
        weight, gamma = torch.empty(8, 1, 3, 3, device="cuda"), torch.empty(8, device="cuda")
        pointwise = torch.empty(12, 8, 1, 1, device="cuda")
        stem = torch.empty(6, 8, 3, 3, device="cuda")
        graph = make_fx(dispatch_functionalize(step), tracing_mode="fake")(
            x, weight, gamma, pointwise, stem
        )
    names = [str(node.target) for node in graph.graph.nodes]
    assert sum("triton_kernel_wrapper" in name for name in names) == 3 + 5 + 1 + 1


@traced
def test_a_triton_op_of_any_torch_has_our_schema(monkeypatch):
    """Before 2.14 it inferred one from annotations, and there are none."""
    from mnet_kernels.triton import launch

    def triton_op(name, *, mutates_args, schema=None):
        return lambda function: torch._library.triton.infer_schema(
            function, mutates_args=mutates_args
        )

    schema = "(Tensor x, int[2] stride) -> Tensor"
    operator = torch._library.triton.infer_schema
    monkeypatch.setattr(torch.library, "triton_op", triton_op)
    made = launch._operator("mnet_kernels::none", mutates_args=(), schema=schema)
    assert made(lambda x, stride: x) == schema
    assert torch._library.triton.infer_schema is operator


@traced
def test_kernels_start_on_the_device_of_their_tensors(monkeypatch):
    """Not on the current one; while torch traces, nothing starts."""
    from mnet_kernels.triton import dwconv_bn_act, launch

    assert dwconv_bn_act.wrap_triton is launch._Compiled
    current, started = [0], []

    class Device(nullcontext):
        def __enter__(self):
            current.append(self.enter_result.get_device())

        def __exit__(self, *_):
            current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: started.append((grid, current[-1], len(args)))

    monkeypatch.setattr(torch.cuda, "device_of", Device)
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: kernel)
    x = SimpleNamespace(is_cuda=True, get_device=lambda: 1)
    launch.wrap_triton(Kernel())[(7,)](x, None, 3, SIZE=4)
    with FakeTensorMode():
        launch.wrap_triton(Kernel())[(7,)](torch.empty(1, device="cuda"))
    assert started == [((7,), 1, 3), ((7,), 0, 1)] and current == [0]


@traced
def test_export_keeps_the_operator_with_a_dynamic_batch():
    class Layer(torch.nn.Module):
        def forward(self, x, weight):
            return operators.dwconv_bn_act(x * 2, weight, None, None, *CONSTANTS).mean((2, 3))

    from mnet_kernels.triton import operators

    with FakeTensorMode():
        x, weight = torch.empty(4, 8, 9, 9, device="cuda"), torch.empty(8, 1, 3, 3, device="cuda")
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(Layer(), (x, weight), dynamic_shapes=({0: batch}, None))
    assert "dwconv_bn_act_triton" in str(program.graph)
    assert program.range_constraints


@traced
def test_another_batch_tunes_nothing(monkeypatch):
    """Another size of the planes does."""
    from mnet_kernels.triton import arguments
    from mnet_kernels.triton.dwconv_bn_act import _forward

    tuned = []
    monkeypatch.setattr(_forward, "cache", {})
    monkeypatch.setattr(_forward, "cache_results", False)
    monkeypatch.setattr(
        _forward, "_bench", lambda *args, config, **kwargs: tuned.append(config) or 1.0
    )
    monkeypatch.setattr(_forward, "fn", SimpleNamespace(run=lambda *args, **kwargs: None))

    def call(batch, size):
        p = problem((batch, 8, size, size), channels_last=True, padding=1)
        sizes = arguments.Depthwise(p.x, p.weight, p.x, 1, (1, 1), 1)
        _forward.run(
            *p.tensors, None, p.x, *sizes.sizes, 0.01, grid=(1,), ACTIVATION="relu",
            UNROLL=sizes.unrolled, **sizes.constants,
        )  # fmt: skip
        return len(tuned)

    first = call(2, 14)
    assert 1 < first <= 3
    assert call(7, 14) == first
    assert call(7, 12) > first


@traced
def test_why_triton_cannot_serve_here(monkeypatch):
    reason = backends.why_not("triton")
    assert re.fullmatch(
        r"the triton backend serves GPU tensors, not cpu \(.*TRITON_INTERPRET.*\)", reason
    )
    assert "float32, float16 and bfloat16, not float64" in backends.why_not(
        "triton", device="cuda", dtype=torch.float64
    )
    if not torch.cuda.is_available():
        assert backends.why_not("triton", device="cuda") == (
            "the triton backend needs a GPU, and torch sees none"
        )
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    assert backends.why_not("triton", device="cuda") == (
        "the triton backend needs the package triton, which is not installed"
    )
