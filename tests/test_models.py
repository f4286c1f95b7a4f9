"""MobileNet V1's facts from the paper and from Keras, its table, and bad checkpoints."""

import math
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mnet_kernels.models import load_keras_weights, mobilenet_v1, summary
from mnet_kernels.models.mobilenet import SamePad2d

# Name, output channels and output side at 224: table 1 of arXiv:1704.04861.
PUBLISHED_LAYERS = [
    ("conv1", 32, 112),
    *[("conv_dw_1", 32, 112), ("conv_pw_1", 64, 112)],
    *[("conv_dw_2", 64, 56), ("conv_pw_2", 128, 56)],
    *[("conv_dw_3", 128, 56), ("conv_pw_3", 128, 56)],
    *[("conv_dw_4", 128, 28), ("conv_pw_4", 256, 28)],
    *[("conv_dw_5", 256, 28), ("conv_pw_5", 256, 28)],
    *[("conv_dw_6", 256, 14), ("conv_pw_6", 512, 14)],
    *[(f"conv_{kind}_{i}", 512, 14) for i in range(7, 12) for kind in ("dw", "pw")],
    *[("conv_dw_12", 512, 7), ("conv_pw_12", 1024, 7)],
    *[("conv_dw_13", 1024, 7), ("conv_pw_13", 1024, 7)],
    ("global_average_pooling2d", 1024, 1),
    ("conv_preds", 1000, 1),
]


@pytest.mark.parametrize("padding", ["same", "torch"])
def test_published_layer_table(padding):
    rows = {row.name: row for row in summary(mobilenet_v1(padding=padding)).rows}
    for name, channels, side in PUBLISHED_LAYERS:
        assert rows[name].output_shape == (None, channels, side, side), name
    assert rows["reshape_2"].output_shape == (None, 1000)


def test_parameters_and_multiply_adds_at_224():
    table = summary(mobilenet_v1(), (2, 3, 224, 224))  # a batch changes nothing
    assert table.total_params == 4_253_864
    assert table.multiply_adds == 568_740_352


@pytest.mark.parametrize(
    ("alpha", "size", "multiply_adds"),
    [
        (0.75, 224, 325_400_448),
        (0.5, 224, 149_497_088),
        (0.25, 224, 41_030_272),
        (1.0, 192, 418_121_728),
        (1.0, 160, 290_675_200),
        (1.0, 128, 186_400_768),
    ],
)
def test_multiply_adds(alpha, size, multiply_adds):
    assert summary(mobilenet_v1(alpha), (1, 3, size, size)).multiply_adds == multiply_adds


def test_parameters_as_keras_counts_them():
    table = summary(mobilenet_v1(0.5, 10), (1, 3, 32, 32))
    assert table.total_params == 834_666
    assert table.trainable_params == 823_722
    assert table.non_trainable_params == 10_944
    assert sum(row.params for row in table.rows) == table.total_params


def test_batch_norm_as_keras():
    norms = [m for m in mobilenet_v1(0.25).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 27
    assert {(bn.eps, bn.momentum) for bn in norms} == {(1e-3, 0.01)}


def test_state_dict_is_plain():
    keys = list(mobilenet_v1(0.25).state_dict())
    assert keys[0] == "conv1.weight"
    assert "conv_dw_1.weight" in keys and "conv_pw_13_bn.running_var" in keys
    assert keys[-2:] == ["conv_preds.weight", "conv_preds.bias"]
    assert all(key.count(".") == 1 for key in keys)
    # The padding holds no weights: a checkpoint does not depend on it.
    assert keys == list(mobilenet_v1(0.25, padding="torch").state_dict())


def test_options():
    model = mobilenet_v1(0.3, 7, in_channels=1, depth_multiplier=2, dropout=0.5)
    assert model.conv1.weight.shape == (int(32 * 0.3), 1, 3, 3)
    assert model.conv_dw_1.weight.shape == (2 * int(32 * 0.3), 1, 3, 3)
    assert model.dropout.p == 0.5
    assert model(torch.zeros(2, 1, 32, 40)).shape == (2, 7)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[("alpha", value) for value in (0, -1, math.nan, math.inf, "1", True, 0.03)],
        *[("num_classes", value) for value in (0, -1, 2.5, None)],
        *[("in_channels", value) for value in (0, "3")],
        *[("depth_multiplier", value) for value in (0, 1.5)],
        *[("dropout", value) for value in (-0.1, 1.1, math.nan, None)],
        *[("padding", value) for value in ("valid", 1, None)],
    ],
)
def test_bad_arguments(argument, value):
    with pytest.raises(ValueError, match=rf"^mobilenet_v1: {argument} must be .*, got "):
        mobilenet_v1(**{argument: value})


@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (5, 2), (7, 3)]),
)
@settings(deadline=None)
def test_same_padding_is_tensorflows(rows, cols, kernel_stride):
    kernel, stride = kernel_stride

    def expected(size):
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2

    (top, bottom), (left, right) = expected(rows), expected(cols)
    padded = SamePad2d(kernel, stride)(torch.ones(1, 1, rows, cols))
    assert torch.equal(
        padded, nn.ZeroPad2d((left, right, top, bottom))(torch.ones(1, 1, rows, cols))
    )


def test_same_padding_needs_the_kernel_to_cover_the_stride():
    with pytest.raises(ValueError, match="kernel_size must be at least stride"):
        SamePad2d(1, 2)


@pytest.fixture(scope="module")
def small():
    return mobilenet_v1(0.25, 10).eval()


def test_symbolic_trace_keeps_the_layers(small):
    traced = torch.fx.symbolic_trace(small)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called[:6] == [
        *("conv1", "conv1_bn", "conv1_relu", "conv_dw_1", "conv_dw_1_bn", "conv_dw_1_relu")
    ]
    for size in (32, 33, 97):  # the stem's padding is computed, not recorded
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(traced(x), small(x), rtol=0, atol=0)


def test_export_with_dynamic_sizes(small):
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(
        small, (torch.randn(2, 3, 64, 97),), dynamic_shapes=({0: auto, 2: auto, 3: auto},)
    ).module()
    for shape in ((1, 3, 65, 96), (4, 3, 128, 127)):
        x = torch.randn(shape)
        torch.testing.assert_close(exported(x), small(x))


def test_compiles_into_one_graph(small):
    head = small[:12]  # both kinds of padding; the rest repeats them
    compiled = torch.compile(head, backend="eager", fullgraph=True, dynamic=True)
    for size in (64, 97):
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(compiled(x), head(x))


def test_slice_gives_the_feature_map(small):
    features = small[:-4]
    assert type(features) is nn.Sequential
    assert features(torch.zeros(1, 3, 64, 64)).shape == (1, 256, 2, 2)
    assert features.conv1 is small.conv1
    assert small[-1] is small.reshape_2


# The table


def test_render_is_plain_text():
    text = summary(mobilenet_v1(0.5, 10), (1, 3, 32, 32)).render()
    assert text.isascii() and "\x1b" not in text
    header, first = text.splitlines()[1], text.splitlines()[4]
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        *("Layer (type)", "Output Shape", "Param #", "Multiply-adds")
    ]
    assert "conv1 (Conv2d)" in first and "(None, 16, 16, 16)" in first and "432" in first
    for total in (
        "Total params: 834,666",
        "Trainable params: 823,722",
        "Non-trainable params: 10,944",
        "Multiply-adds: 3,045,632",
    ):
        assert total in text


class Shared(nn.Module):
    """A weight of its own, a layer called twice, a tied weight, a layer never called, a dict."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.register_buffer("cache", torch.zeros(99), persistent=False)
        self.twice = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.twice.weight
        self.up = nn.ConvTranspose1d(1, 2, 3, bias=False)
        self.never = nn.Linear(4, 5)

    def forward(self, x):
        y = self.tied(self.twice(self.twice(x * self.gain)))
        return {"text": "kept", "y": [self.up(y[:, None])]}


def test_summary_of_any_module():
    model = Shared().double()
    model.never.requires_grad_(False)
    model.twice.eval()
    table = summary(model, (3, 4))
    rows = {row.name: row for row in table.rows}
    assert rows["shared"].params == 4  # not the cache, which no checkpoint stores
    assert rows["shared"].output_shape == (None, 2, 6)
    assert (rows["twice"].params, rows["twice"].multiply_adds) == (20, 32)
    assert (rows["tied"].params, rows["tied"].multiply_adds) == (0, 16)
    assert rows["up"].multiply_adds == 4 * 2 * 3
    assert rows["never"].output_shape is None and rows["never"].params == 25
    assert table.total_params == sum(p.numel() for p in model.parameters())
    assert table.non_trainable_params == 25
    assert model.training and not model.twice.training
    assert not any(m._forward_hooks for m in model.modules())


def test_summary_leaves_the_model_as_it_was():
    model = mobilenet_v1(0.25, 10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        summary(model, (1, 4, 32, 32))
    summary(model, (1, 3, 32, 32))
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert model.training and not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("size", [(), (1, 3, 0, 32), (1, 3, 32.0, 32), 32, None, "abcd"])
def test_summary_bad_input_size(size):
    with pytest.raises(ValueError, match=r"^summary: input_size must be"):
        summary(nn.Identity(), size)


# Checkpoints that cannot be loaded; those that can are in test_keras_parity.py


def keras_kernel(name, weight):
    c_in = 1 if name.startswith("conv_dw") else weight.shape[1]
    kernel = weight.detach().permute(2, 3, 1, 0)
    return kernel.reshape(*kernel.shape[:2], -1, 1) if c_in == 1 else kernel


@pytest.fixture
def checkpoint(small, tmp_path):
    """A legacy Keras file of the small model, written without Keras."""
    h5py = pytest.importorskip("h5py", reason="Keras' files are HDF5")
    path = tmp_path / "small.h5"
    with h5py.File(path, "w") as file:
        for name, layer in small.named_children():
            if isinstance(layer, nn.BatchNorm2d):
                keras_names = ("gamma", "beta", "moving_mean", "moving_variance")
                ours = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
                for keras_name, value in zip(keras_names, ours, strict=True):
                    file[f"{name}/{name}/{keras_name}:0"] = value.detach()
            elif isinstance(layer, nn.Conv2d):
                file[f"{name}/{name}/kernel:0"] = keras_kernel(name, layer.weight)
                if layer.bias is not None:
                    file[f"{name}/{name}/bias:0"] = layer.bias.detach()
    return path


def edit(path, change):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "a") as file:
        change(file)


def assert_refused(model, path, match, error=ValueError, **kwargs):
    """One error that names the function and the file, and a model that is as it was."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=match) as caught:
        load_keras_weights(model, path, **kwargs)
    assert str(caught.value).startswith("load_keras_weights: ")
    assert path.name in str(caught.value)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_checkpoint_fits(small, checkpoint):
    model = mobilenet_v1(0.25, 10)
    assert load_keras_weights(model, str(checkpoint)) == ((), ())
    torch.testing.assert_close(model.state_dict(), small.state_dict(), rtol=0, atol=0)


def test_checkpoint_is_cast_to_the_model(small, checkpoint):
    model = mobilenet_v1(0.25, 10).double()
    load_keras_weights(model, checkpoint)
    torch.testing.assert_close(model.conv_pw_7.weight, small.conv_pw_7.weight.double())


def test_wrong_alpha(checkpoint):
    assert_refused(
        mobilenet_v1(0.5, 10),
        checkpoint,
        r"conv1: expected a kernel of shape \(3, 3, 3, 16\), got \(3, 3, 3, 8\); .*and \d+ more.*"
        "Check alpha",
    )


@pytest.mark.parametrize("strict", [True, False])
def test_wrong_number_of_classes(checkpoint, strict):
    assert_refused(
        mobilenet_v1(0.25, 11),
        checkpoint,
        r"conv_preds: expected a bias of shape \(11,\), got \(10,\); layer conv_preds: expected a "
        r"kernel of shape \(1, 1, 256, 11\), got \(1, 1, 256, 10\)",
        strict=strict,
    )


def test_wrong_depth_multiplier(checkpoint):
    assert_refused(
        mobilenet_v1(0.25, 10, depth_multiplier=2),
        checkpoint,
        r"conv_dw_1: expected a kernel of shape \(3, 3, 8, 2\), got \(3, 3, 8, 1\)",
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: f.pop("conv_pw_5"), "the file lacks the layers conv_pw_5"),
        (lambda f: f.pop("conv_preds"), r"lacks the layer conv_preds.*\(strict=False"),
        (lambda f: f.pop("conv1_bn/conv1_bn/beta:0"), "the file's layer conv1_bn has no beta"),
        (lambda f: f.create_dataset("conv1/x/bias", (8,), "f4"), "layer conv1 has a bias"),
        (lambda f: f.create_dataset("dense/kernel", (8, 8), "f4"), "the file's layers dense"),
        (lambda f: f.clear(), "lacks the layers conv1, conv1_bn, conv_dw_1, and 52 more"),
    ],
)
def test_layers_that_do_not_match(checkpoint, change, match):
    edit(checkpoint, change)
    assert_refused(mobilenet_v1(0.25, 10), checkpoint, match)


def test_weights_that_are_not_numbers(checkpoint):
    def change(file):
        del file["conv1_bn/conv1_bn/beta:0"]
        file.create_dataset("conv1_bn/conv1_bn/beta:0", (8,), dtype="int8")

    edit(checkpoint, change)
    assert_refused(mobilenet_v1(0.25, 10), checkpoint, "beta of floating dtype, got int8")


def test_not_strict_loads_what_is_in_both(small, checkpoint):
    def change(file):
        file.move("conv_preds", "my_head")

    edit(checkpoint, change)
    model = mobilenet_v1(0.25, 3)
    result = load_keras_weights(model, checkpoint, strict=False)
    assert (result.missing, result.unexpected) == (("conv_preds",), ("my_head",))
    assert torch.equal(model.conv1.weight, small.conv1.weight)


def test_not_strict_refuses_a_file_with_nothing_in_it(checkpoint):
    edit(checkpoint, lambda file: file.clear())
    assert_refused(mobilenet_v1(0.25, 10), checkpoint, "lacks the layers", strict=False)


def test_files_that_are_no_checkpoints(checkpoint, tmp_path):
    model = mobilenet_v1(0.25, 10)
    text, empty = tmp_path / "text.h5", tmp_path / "empty.keras"
    text.write_text("not a checkpoint")
    empty.touch()
    for path in (text, empty):
        assert_refused(model, path, "neither a zip archive")
    torch.save({}, tmp_path / "torch.keras")
    assert_refused(model, tmp_path / "torch.keras", "model.weights.h5")
    with zipfile.ZipFile(tmp_path / "odd.keras", "w") as archive:
        archive.writestr("model.weights.h5", checkpoint.read_bytes())
        archive.writestr("config.json", "{")
    assert_refused(model, tmp_path / "odd.keras", "cannot be read as a Keras checkpoint")
    assert_refused(model, tmp_path / "nowhere.h5", "there is no file", FileNotFoundError)
    assert_refused(model, tmp_path, "is not a file")


@pytest.mark.parametrize("kept", [9, 1000, 0.5, 0.99])
def test_truncated_h5(checkpoint, kept):
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: kept if kept > 1 else int(len(data) * kept)])
    assert_refused(mobilenet_v1(0.25, 10), checkpoint, "cannot be read as a Keras checkpoint")


def test_model_that_is_no_mobilenet(checkpoint):
    with pytest.raises(ValueError, match="mobilenet_v1, got Linear without conv1, conv1_bn"):
        load_keras_weights(nn.Linear(1, 1), checkpoint)
