"""Swapped models in training mode: a depthwise site is one operator for convolution, BatchNorm with
the batch's statistics and activation, and nobody can tell but by the time and memory it takes."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import ACTS, dw_bn, image, network, randomize, reasons
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from mnet_kernels.nn import DepthwiseConvBNAct, training
from mnet_kernels.swap import explain, restore, sites, swap


@pytest.fixture
def calls(monkeypatch):
    """One entry a call of the operator of training."""
    found = []
    operator = training.dwconv_bn_act_training

    def counted(*args, **kwargs):
        found.append(args)
        return operator(*args, **kwargs)

    monkeypatch.setattr(training, "dwconv_bn_act_training", counted)
    return found


def both(model):
    """The model and its swapped copy, which shares nothing, in training mode and float64."""
    model = randomize(model).double()
    return model.train(), swap(copy.deepcopy(model)).train()


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def learn(model, x, call=None):
    """The output, with all gradients added to what is there; the input's gradient."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x) if call is None else call(model, x)
    # Sums of y or of its square alone would give BatchNorm's input next to no gradient.
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), x.grad


def assert_alike(native, fast, x, call=None, steps=2, tolerance=1e-9):
    """Outputs, gradients, parameters and buffers over some steps of SGD."""
    native_sgd, fast_sgd = (torch.optim.SGD(m.parameters(), 0.1) for m in (native, fast))
    for _ in range(steps):
        expected, found = learn(native, x, call), learn(fast, x, call)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        wanted, got = ({name: p.grad for name, p in m.named_parameters()} for m in (native, fast))
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
        for optimizer in (native_sgd, fast_sgd):
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(
            fast.state_dict(), native.state_dict(), rtol=tolerance, atol=tolerance
        )
        x = x.flip(0) * 1.5 + 0.25


def batch(*shape):
    return image(*shape or (3, 8, 7, 6)).double()


# --- the norm's settings --------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTS)
def test_activations(act, calls):
    native, fast = both(dw_bn(act=copy.deepcopy(ACTS[act]), stride=2))
    # PyTorch's own derivative of hardsigmoid has a sixth in float32, also in float64.
    assert_alike(native, fast, batch(), tolerance=1e-6 if act == "hardsigmoid" else 1e-9)
    assert len(calls) == 2
    assert not any("training mode" in reason for reason in reasons(fast).values())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts_and_padding(layout, calls):
    model = network(
        lambda self, x: self.norm(self.conv(F.pad(x, (0, 1, 0, 1)))).relu(),
        conv=nn.Conv2d(8, 16, (3, 2), (2, 1), (1, 0), groups=8, bias=True),
        norm=nn.BatchNorm2d(16),
    )
    native, fast = both(model.to(memory_format=layout))
    x = batch().to(memory_format=layout)
    assert_alike(native, fast, x)
    assert len(calls) == 2
    assert fast(x).is_contiguous(memory_format=layout)


NORMS = {
    "eps and momentum": {"eps": 0.1, "momentum": 0.7},
    "cumulative average": {"momentum": None},
    "no momentum": {"momentum": 0.0},
    "no running statistics": {"track_running_stats": False},
    "not affine": {"affine": False},
    "neither": {"affine": False, "track_running_stats": False},
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_settings_of_the_norm(name, bias, calls):
    model = dw_bn(bias=bias, act=nn.ReLU6())
    model[1] = nn.BatchNorm2d(8, **NORMS[name])
    native, fast = both(model)
    assert_alike(native, fast, batch(), steps=3)
    assert len(calls) == 3
    evaluated = [m.eval()(batch()) for m in (native, fast)]
    torch.testing.assert_close(*evaluated)
    # Without running statistics the batch's are used in eval mode too.
    assert len(calls) == 3 + ("running" in name or name == "neither")


@pytest.mark.parametrize(
    "change",
    [
        {"momentum": 0.5},
        {"momentum": None},
        {"eps": 0.3},
        {"track_running_stats": False},
        {"num_batches_tracked": None},
    ],
    ids=str,
)
def test_settings_are_read_at_every_call(change, calls):
    native, fast = both(dw_bn(act=nn.ReLU()))
    assert_alike(native, fast, batch())
    for model in (native, fast):
        for name, value in change.items():
            setattr(model[1], name, value)
    assert_alike(native, fast, batch())
    assert len(calls) == 4


def test_a_bias_cancels_out(calls):
    native, fast = both(dw_bn(bias=True))
    learn(fast, batch()), learn(native, batch())
    assert fast[0].bias.grad.abs().max() == 0
    assert native[0].bias.grad.abs().max() < 1e-12
    assert len(calls) == 1


def test_modes_are_honoured(calls):
    native, fast = both(nn.Sequential(dw_bn(act=nn.ReLU6()), dw_bn(act=nn.Hardswish())))
    for step, modes in enumerate([(True, True), (False, True), (True, False), (False, False)]):
        for model in (native, fast):
            for norm, mode in zip(norms(model), modes, strict=True):
                norm.train(mode)
        calls.clear()
        assert_alike(native, fast, batch(), steps=1)
        assert len(calls) == sum(modes), step
    for model in (native, fast):
        model.eval()
    torch.testing.assert_close(fast(batch()), native(batch()))
    counters = [[int(n.num_batches_tracked) for n in norms(m)] for m in (native, fast)]
    assert counters == [[2, 2], [2, 2]]


def test_frozen_parameters_get_no_gradient(calls):
    native, fast = both(nn.Sequential(dw_bn(act=nn.ReLU6()), dw_bn()))
    for model in (native, fast):
        model[0].requires_grad_(False)
        model[1][1].weight.requires_grad_(False)
    expected, found = learn(native, batch()), learn(fast, batch())
    torch.testing.assert_close(found, expected)
    for p, q in zip(native.parameters(), fast.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad)


# --- kinds of norm --------------------------------------------------------------------------


def with_norm(norm):
    model = dw_bn()
    model[1] = norm
    return model


def test_timm_norm_with_its_activation(calls):
    layers = pytest.importorskip("timm.layers")
    native, fast = both(with_norm(layers.BatchNormAct2d(8, act_layer=nn.SiLU)))
    assert_alike(native, fast, batch())
    assert len(calls) == 2


def test_frozen_norm_class_has_no_batch_statistics(calls):
    native, fast = both(with_norm(torchvision.ops.FrozenBatchNorm2d(8)))
    assert_alike(native, fast, batch())
    assert not calls and next(iter(sites(fast)))[1].why_native("cpu", torch.float64) is None


class Clamped(nn.BatchNorm2d):
    def forward(self, x):
        y = super().forward(x)
        if self.training:
            self.running_var = self.running_var.clamp(min=0.9)
        return y


class Shared(nn.BatchNorm2d):
    def forward(self, x):
        if self.training and torch.distributed.is_initialized():
            raise NotImplementedError
        return super().forward(x)


NATIVE = {
    "synchronised": (
        lambda: nn.SyncBatchNorm(8), "SyncBatchNorm shares its statistics between processes"
    ),
    "trains otherwise": (lambda: Clamped(8), "the norm does not train as nn.BatchNorm2d does"),
    "talks": (lambda: Shared(8), "the norm's forward talks to other processes"),
}  # fmt: skip


@pytest.mark.parametrize("name", NATIVE)
def test_norms_that_train_themselves(name, calls):
    make, reason = NATIVE[name]
    native, fast = both(with_norm(make()))
    assert reasons(fast) == {"0": f"{reason}: native in training mode"}
    (row,) = explain(fast.eval()).rows
    assert (row.backend, row.reason, row.training) == ("cpu", "", "native")
    assert row.why_native_training == f"{reason}: native in training mode"
    assert_alike(native, fast.train(), batch())
    assert not calls


def test_the_norm_of_a_layer_of_ours_may_be_exchanged(calls):
    layer = DepthwiseConvBNAct(8, activation="relu6").double()
    assert_alike(Native(copy.deepcopy(layer)), layer, batch())
    assert len(calls) == 2
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    layer(batch())
    assert "SyncBatchNorm" in layer.conv.why_native("cpu", torch.float64)
    assert layer.bn.num_batches_tracked == 3 and len(calls) == 2


class Native(nn.Module):
    """A layer of ours, module by module."""

    def __init__(self, layer):
        super().__init__()
        self.conv, self.bn = layer.conv, layer.bn

    def forward(self, x):
        return self.conv.forward_native(x)


def test_a_swapped_layer_of_ours_has_its_own_mode(calls):
    model = nn.Sequential(DepthwiseConvBNAct(8)).double()
    fast = swap(model)
    model.eval(), fast.train()
    model(batch())
    assert not calls and model[0].bn.num_batches_tracked == 0
    fast(batch())
    assert len(calls) == 1 and fast[0].bn.num_batches_tracked == 1


# --- what stays native ----------------------------------------------------------------------


def test_dense_convolutions_are_native_and_the_table_says_so(calls):
    native, fast = both(nn.Sequential(dw_bn(act=nn.ReLU6()), dw_bn(groups=1)))
    assert_alike(native, fast, batch())
    assert len(calls) == 2
    reason = (
        "convolutions but depthwise, plain 1x1 and small first ones are native in training mode"
    )
    for mode, rows in (
        (True, [("cpu", ""), ("native", reason)]),
        (False, [("cpu", ""), ("folded", "")]),
    ):
        explanation = explain(fast.train(mode))
        assert [(row.backend, row.reason) for row in explanation.rows] == rows
        assert [row.training for row in explanation.rows] == ["cpu", "native"]
        assert [row.why_native_training for row in explanation.rows] == ["", reason]
    text = str(explanation)
    assert "2 of 2 rows run fused, 1 in training." in text
    assert f"Native in training, 1 rows: {reason}." in text


def pointwise(**options):
    return dw_bn(groups=1, **{"kernel_size": 1, "padding": 0, **options})


POINTWISE = {
    "served": ({}, torch.float32, True),
    "with a bias": ({"bias": True}, torch.float32, True),
    "strided": ({"stride": 2}, torch.float32, False),
    "padded": ({"padding": 1}, torch.float32, False),
    "float64": ({}, torch.float64, False),
    "bfloat16": ({}, torch.bfloat16, False),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_1x1_convolutions_in_float32(name, monkeypatch):
    options, dtype, served = POINTWISE[name]
    calls, operator = [], training.conv_bn_act_training
    monkeypatch.setattr(
        training, "conv_bn_act_training", lambda *t, **c: calls.append(t) or operator(*t, **c)
    )
    model = nn.Sequential(dw_bn(act=nn.ReLU6()), *pointwise(**options), nn.ReLU(), nn.Flatten())
    native = randomize(model).to(dtype).train()
    fast = swap(copy.deepcopy(native)).train()
    row = explain(fast).rows[1]
    assert (row.training == "cpu", bool(row.why_native_training)) == (served, not served)
    if dtype == torch.bfloat16:  # rounding decides the rest
        fast(batch().to(dtype))
    else:
        tolerance = 1e-9 if dtype == torch.float64 else 1e-4
        assert_alike(native, fast, batch().to(dtype), tolerance=tolerance)
    assert bool(calls) == served
    assert all(t[0].is_contiguous(memory_format=torch.channels_last) for t in calls)


FIRST = {
    "strided": (dict(out_channels=24, stride=2, padding=1), True),
    "of a bias": (dict(out_channels=24, stride=2, bias=True), True),
    "of uneven sizes": (
        dict(in_channels=2, kernel_size=(3, 2), stride=(1, 2), padding=(0, 1)),
        True,
    ),
    "1x1, strided": (dict(kernel_size=1, stride=2), True),
    "of large patches": (dict(out_channels=8, stride=1, padding=1), False),
    "dilated": (dict(out_channels=40, dilation=2), False),
    "of many channels": (dict(in_channels=8, out_channels=64, stride=2), False),
}


@pytest.mark.parametrize("name", FIRST)
def test_first_convolutions_in_float32(name, monkeypatch):
    options, served = FIRST[name]
    options = {"in_channels": 3, "out_channels": 12, "kernel_size": 3, "bias": False, **options}
    found, operator = [], training.conv_bn_act_training
    monkeypatch.setattr(
        training, "conv_bn_act_training", lambda *t, **c: found.append(t) or operator(*t, **c)
    )
    model = nn.Sequential(
        nn.Conv2d(**options), nn.BatchNorm2d(options["out_channels"]), nn.ReLU6(), nn.Flatten()
    )
    native = randomize(model).train()
    fast = swap(copy.deepcopy(native)).train()
    assert (explain(fast).rows[0].training == "cpu") == served
    x = image(3, options["in_channels"], 11, 9)
    for _ in range(2):
        results = []
        for module in (native, fast):
            y = module(x)
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
            results.append([y, *(p.grad for p in module.parameters()), *module.buffers()])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert len(found) == (2 if served else 0)
    assert_alike(native, fast, x, tolerance=1e-4)  # x has a gradient: native
    assert len(found) == (2 if served else 0)


def test_1x1_convolutions_whose_layout_is_seen_stay_native_in_others(monkeypatch):
    monkeypatch.delattr(training, "conv_bn_act_training")
    native = randomize(pointwise()).train()
    fast = swap(copy.deepcopy(native)).train()
    x = batch().float()
    assert_alike(native, fast, x, tolerance=1e-5)
    assert fast(x).is_contiguous()


def test_dense_convolutions_take_their_layout_where_nobody_sees_it(calls):
    native, fast = both(
        nn.Sequential(dw_bn(groups=1, act=nn.ReLU()), dw_bn(act=nn.ReLU6()), nn.Flatten())
    )
    assert_alike(native, fast, batch())
    assert calls[0][0].is_contiguous(memory_format=torch.channels_last)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "change",
    [
        lambda conv: parametrize.register_parametrization(conv, "weight", Doubled()),
        lambda conv: nn.utils.parametrizations.weight_norm(conv),
        lambda conv: prune.l1_unstructured(conv, "weight", 0.3),
    ],
    ids=["parametrization", "weight norm", "pruned"],
)
def test_computed_weights(change, when, calls):
    native = randomize(dw_bn(act=nn.ReLU())).double().train()
    fast = copy.deepcopy(native)
    for step in ("swap", "change") if when == "after" else ("change", "swap"):
        if step == "swap":
            fast = swap(fast)
        else:
            change(native[0]), change(fast[0])
    assert all(reasons(fast).values())
    assert_alike(native, fast, batch())
    assert not calls
    torch.testing.assert_close(fast.eval()(batch()), native.eval()(batch()))


def test_one_value_a_channel_and_none_are_the_norms_own_error(calls):
    native, fast = both(dw_bn())
    for shape in ((1, 8, 1, 1), (0, 8, 4, 4)):
        outcomes = []
        for model in (native, fast):
            try:
                outcomes.append(model(batch(*shape)).shape)
            except Exception as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1]
    assert not calls
    torch.testing.assert_close(fast.state_dict(), native.state_dict(), equal_nan=True)


def test_where_no_backend_serves_it_is_native_and_says_so(calls):
    native = randomize(dw_bn()).double().train()
    fast = swap(copy.deepcopy(native), backend="triton")
    assert_alike(native, fast, batch())
    assert not calls and "triton" in reasons(fast)["0"]


# --- with the rest of torch -----------------------------------------------------------------


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
    """Native keeps input, convolution and norm (or output); ours its input, which is all there is
    to share where the stride is 2. The whole is 44 % at 224x224."""
    totals = [0, 0]
    for channels, size, stride in MOBILENET_V1:
        native = dw_bn(channels, nn.ReLU6(), stride=stride).train()
        x = image(2, channels, size, size).requires_grad_()
        for i, model in enumerate((native, swap(native).train())):
            totals[i] += kept_bytes(model, x)
    assert 0.3 * totals[0] < totals[1] < 0.5 * totals[0]


#: Channels, height (of the network at 112x112, a quarter as wide), stride.
MOBILENET_V1 = [
    (8, 56, 1), (16, 56, 2), (32, 28, 1), (32, 28, 2), (64, 14, 1), (64, 14, 2),
    *[(128, 7, 1)] * 5, (128, 7, 2), (256, 4, 1),
]  # fmt: skip
