"""Swapped models in training mode with the rest of torch: checkpointing, averaging, autocast, DDP,
compile, derivatives of second order; the memory that they keep."""

# ruff: noqa: F811 (fixtures)
import copy
import warnings

import pytest
import torch
from networks import dw_bn, image, randomize
from test_training_swap import assert_alike, batch, both, calls, learn, norms, with_norm  # noqa: F401
from test_training_swap_choices import pointwise
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from mnet_kernels.swap import restore, swap


def test_gradient_checkpointing_with_frozen_statistics():
    native, fast = both(nn.Sequential(dw_bn(act=nn.ReLU()), dw_bn(act=nn.ReLU6())))
    native.eval(), fast.eval()
    assert_alike(native, fast, batch(), lambda m, x: checkpoint(m, x, use_reentrant=False))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("last", ["site", "more"])
def test_gradient_checkpointing(last, reentrant, calls):
    """The running statistics are updated as often as native's are: once more for the backward."""
    layers = [dw_bn(act=nn.ReLU()), dw_bn(act=nn.ReLU6())]
    native, fast = both(nn.Sequential(*layers, *([nn.Sigmoid()] if last == "more" else [])))
    assert_alike(native, fast, batch(), lambda m, x: checkpoint(m, x, use_reentrant=reentrant))
    assert len(calls) == 2 * 2 * 2
    counters = [int(n.num_batches_tracked) for m in (native, fast) for n in norms(m)]
    assert counters == [4] * 4


def test_gradients_accumulate():
    native, fast = both(dw_bn(act=nn.ReLU6()))
    for model in (native, fast):
        for i in range(3):
            learn(model, batch() + i)
    for p, q in zip(native.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-9)


def test_averaged_copies(calls):
    """Those of torch.optim.swa_utils, buffers too; and a plain copy stays behind."""
    native, fast = both(nn.Sequential(dw_bn(act=nn.ReLU6()), dw_bn()))
    averages = [
        AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        for m in (native, fast)
    ]
    plain = copy.deepcopy(fast)
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    for i in range(3):
        assert_alike(native, fast, batch() + i, steps=1)
        for average, model in zip(averages, (native, fast), strict=True):
            average.update_parameters(model)
    torch.testing.assert_close(*(a.state_dict() for a in reversed(averages)), rtol=1e-9, atol=1e-9)
    for mode in (True, False):
        y, z = (a.train(mode)(batch()) for a in averages)
        torch.testing.assert_close(z, y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(plain.state_dict(), before, rtol=0, atol=0)
    assert calls


def test_statistics_from_scratch_as_after_averaging(calls):
    """torch.optim.swa_utils.update_bn: momentum None, from reset statistics, without gradients."""
    native, fast = both(nn.Sequential(dw_bn(act=nn.ReLU6()), dw_bn()))
    for model in (native, fast):
        torch.optim.swa_utils.update_bn([batch() + i for i in range(3)], model)
    torch.testing.assert_close(fast.state_dict(), native.state_dict(), rtol=1e-9, atol=1e-9)
    assert len(calls) == 2 * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_scaled_gradients(dtype, calls):
    """Not further from float64 than native, twice over, or a rounding for each of four passes."""
    exact = randomize(dw_bn(act=nn.ReLU6()), seed=3).double().train()
    native = copy.deepcopy(exact).float()
    fast = swap(copy.deepcopy(native))
    x = image(4, 8, 9, 8).to(dtype).float()
    with torch.no_grad():
        for model in (exact, native, fast):
            model[0].weight.copy_(model[0].weight.to(dtype))
    results = []
    for model in (exact, native, fast):
        inputs = x.to(model[0].weight.dtype).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=model is not exact):
            y = model(inputs)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=model is not exact)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        scaler.scale((y.double() * weights).sum()).backward()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler.unscale_(optimizer)
        assert y.dtype == (torch.float64 if model is exact else dtype)
        gradients = {n: p.grad for n, p in model.named_parameters()}
        buffers = {n: b for n, b in model.named_buffers() if "running" in n}
        results.append({"y": y.detach(), **gradients, **buffers})
        assert all(p.grad.dtype == p.dtype for p in model.parameters())
    assert len(calls) == 1
    for name, right in results[0].items():
        native_error, our_error = (
            float((r[name].double() - right).abs().max()) for r in results[1:]
        )
        rounding = 4 * torch.finfo(dtype).eps * float(right.abs().max())
        assert our_error <= max(2 * native_error, rounding), name


@pytest.mark.parametrize("norm_dtype", [torch.float32, torch.bfloat16])
def test_models_in_bfloat16(norm_dtype, calls):
    native = randomize(dw_bn(act=nn.ReLU6())).bfloat16().train()
    native[1].to(norm_dtype)
    fast = swap(copy.deepcopy(native))
    for model in (native, fast):
        learn(model, image(4, 8, 6, 6).bfloat16())
    assert len(calls) == 1
    assert fast[1].running_mean.dtype == fast[1].weight.grad.dtype == norm_dtype
    for name, value in fast.state_dict().items():
        torch.testing.assert_close(value, native.state_dict()[name], rtol=0.02, atol=0.02)
    for p, q in zip(native.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=0.05, atol=0.05 * float(p.grad.abs().max()))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_data_parallel_has_nothing_to_warn_of(channels_last, frozen, process_group, calls):
    """Gradients come with their parameter's strides, also where a weight really is channels_last
    (``.to(memory_format=...)`` leaves a depthwise one as it is)."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    _, fast = both(nn.Sequential(dw_bn(act=nn.ReLU6()), dw_bn(act=nn.ReLU())))
    for conv in (fast[0][0], fast[1][0]):
        conv.weight = nn.Parameter(torch.empty_like(conv.weight, memory_format=layout).normal_())
        assert conv.weight.stride(1) == (1 if channels_last else 9)
    for norm in norms(fast):
        norm.train(not frozen)
    parallel = nn.parallel.DistributedDataParallel(fast)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            learn(parallel, batch().to(memory_format=layout))
    assert len(calls) == (0 if frozen else 4)
    for p in fast.parameters():
        assert p.grad.stride() == p.stride()


def test_compile_of_a_training_step(calls):
    native, fast = both(nn.Sequential(dw_bn(act=nn.ReLU6()), dw_bn(bias=True)))
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert_alike(native, fast, batch(), lambda m, x: m(x) if m is native else compiled(x))


def test_compile_of_a_training_step_in_float32():
    native = randomize(nn.Sequential(dw_bn(act=nn.ReLU6()), pointwise(), nn.Flatten())).train()
    fast = swap(copy.deepcopy(native)).train()
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    call = lambda m, x: m(x) if m is native else compiled(x)  # noqa: E731
    assert_alike(native, fast, batch().float(), call, tolerance=1e-4)


def test_functorch_is_native(calls):
    native, fast = both(with_norm(nn.BatchNorm2d(8, track_running_stats=False)))
    found = []
    for model in (native, fast):
        parameters = {k: v.detach() for k, v in model.named_parameters()}

        def loss(p, model=model):
            return (torch.func.functional_call(model, p, (batch(),)) ** 3).sum()

        found.append(torch.func.grad(loss)(parameters))
    torch.testing.assert_close(found[1], found[0])
    assert not calls


def test_second_derivatives(calls):
    """A gradient penalty: plain PyTorch's derivatives of the gradients."""
    native, fast = both(dw_bn(act=nn.SiLU()))
    for model in (native, fast):
        x = batch().requires_grad_()
        (dx,) = torch.autograd.grad((model(x) ** 3).sum(), x, create_graph=True)
        dx.square().sum().backward()
    for p, q in zip(native.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-8)
    assert len(calls) == 1


def test_what_was_trained_is_restored():
    native, fast = both(dw_bn(act=nn.ReLU6()))
    assert_alike(native, fast, batch())
    back = restore(fast)
    assert_alike(native, back, batch())


# --- memory ---------------------------------------------------------------------------------


def kept_bytes(model, x):
    """What a forward keeps for its backward besides parameters, each block of memory once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, alive = {}, []

    def pack(t):
        alive.append(t)  # its address is not given to another
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(kept.values())


def test_the_depthwise_blocks_of_a_mobilenet_keep_less_than_60_percent():
    """Native keeps input, convolution and norm (or output); ours its input, and the convolution
    where the stride is 2. The whole is 50 % at 224x224."""
    totals = [0, 0]
    for channels, size, stride in MOBILENET_V1:
        native = dw_bn(channels, nn.ReLU6(), stride=stride).train()
        x = image(2, channels, size, size).requires_grad_()
        for i, model in enumerate((native, swap(native).train())):
            totals[i] += kept_bytes(model, x)
    assert 0.3 * totals[0] < totals[1] < 0.52 * totals[0]


#: Channels, height (of the network at 112x112, a quarter as wide), stride.
MOBILENET_V1 = [
    (8, 56, 1), (16, 56, 2), (32, 28, 1), (32, 28, 2), (64, 14, 1), (64, 14, 2),
    *[(128, 7, 1)] * 5, (128, 7, 2), (256, 4, 1),
]  # fmt: skip
