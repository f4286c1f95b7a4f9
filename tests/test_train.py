"""Training: the recipe against Keras, resuming to the bit, many processes, and what goes wrong."""

import csv
import errno
import io
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import archives
import numpy as np
import pytest
import torch
from torch import nn

from mnet_kernels import checkpoint, cli, datasets, recipe, train
from mnet_kernels.data import InputError
from mnet_kernels.models import mobilenet_v1
from mnet_kernels.recipe import Recipe
from mnet_kernels.swap import sites, swap
from mnet_kernels.train import Stopped

# Keras' own.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ROOT = Path(__file__).parents[1]
TIMES = ("images_per_second", "seconds")


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """96 training pictures, 32 for validation."""
    return f"fashion-mnist:{archives.fashion_mnist(tmp_path_factory.mktemp('fashion'))}"


@pytest.fixture
def small(fashion):
    return Recipe(data=fashion, alpha=0.125, epochs=3, batch=16)


@pytest.fixture(scope="module")
def finished(fashion, tmp_path_factory):
    """What one epoch of ``small`` leaves."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished")
    train.train(Recipe(data=fashion, alpha=0.125, epochs=1, batch=16), folder)
    return folder


@pytest.fixture
def one_epoch(finished, tmp_path):
    """A copy of it, to be resumed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def metrics(rows):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def start(code, *arguments, **environment):
    """A Python process that runs ``code``."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
    )


def without_scaler():
    return torch.amp.GradScaler("cpu", enabled=False)


# ---- the recipe ----


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


# ---- parity of a training step with Keras ----


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


# ---- native and swapped stay together ----


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


# ---- a run ----


def test_a_run_leaves_its_files_and_learns(fashion, tmp_path):
    steps = []
    settings = Recipe(data=fashion, alpha=0.25, epochs=12, batch=16, shift=0.0, flips=False)
    rows = train.train(settings, tmp_path, on_step=steps.append)
    assert [row["epoch"] for row in rows] == list(range(1, 13))
    assert rows[-1]["train_accuracy"] > 0.5 > 2 * rows[0]["train_accuracy"] - 0.5
    assert [(s.epoch, s.step) for s in steps[:7]] == [*((1, i) for i in range(1, 7)), (2, 1)]
    assert steps[-1].loss == pytest.approx(rows[-1]["train_loss"])
    assert steps[-1].accuracy == pytest.approx(rows[-1]["train_accuracy"])

    written = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [{k: float(v) for k, v in row.items()} for row in written] == rows
    held = checkpoint.load(tmp_path / "checkpoint.pt")
    assert held["epoch"] == 12 and held["rows"] == rows
    best = max(row["validation_accuracy"] for row in rows)
    held = checkpoint.load(tmp_path / "best.pt")
    assert held["rows"][-1]["validation_accuracy"] == best
    if pytest.importorskip("matplotlib"):
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
        assert "Training curves" in (tmp_path / "report.html").read_text()
    assert not list(tmp_path.glob("*.tmp"))


def test_validation_is_over_every_picture_in_eval_mode(small, tmp_path):
    """The row's figures again from best.pt, picture by picture."""
    small = replace(small, data="digits", alpha=0.0625 * 2, epochs=1, batch=64)
    (row,) = train.train(small, tmp_path)
    model = checkpoint.model_of(
        checkpoint.load(tmp_path / "checkpoint.pt"), tmp_path / "checkpoint.pt"
    )
    validation = datasets.open_images("digits").validation
    x = recipe.scale(torch.stack([validation[i][0] for i in range(len(validation))]))
    y = torch.tensor([validation[i][1] for i in range(len(validation))])
    with torch.no_grad():
        logits = model(x)
    assert row["validation_accuracy"] == pytest.approx(
        float((logits.argmax(1) == y).float().mean())
    )
    loss = float(torch.nn.functional.cross_entropy(logits, y))
    assert row["validation_loss"] == pytest.approx(loss, rel=1e-4)


def test_workers_change_nothing(small, tmp_path):
    one = train.train(replace(small, epochs=2), tmp_path / "one")
    two = train.train(replace(small, epochs=2, workers=2), tmp_path / "two")
    assert metrics(one) == metrics(two)


def test_the_seed_changes_everything(small, tmp_path):
    one, two = (
        train.train(replace(small, epochs=1, seed=seed), tmp_path / str(seed)) for seed in (1, 2)
    )
    assert one[0]["train_loss"] != two[0]["train_loss"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_train_and_resume(small, tmp_path, precision):
    small = replace(small, precision=precision, epochs=2)
    rows = train.train(small, tmp_path / "whole")
    assert all(np.isfinite(row["train_loss"]) for row in rows)
    exact = train.train(replace(small, precision="fp32", epochs=1), tmp_path / "exact")
    assert rows[0]["train_loss"] != exact[0]["train_loss"], "autocast was on"
    assert rows[0]["train_loss"] == pytest.approx(exact[0]["train_loss"], rel=0.1)
    train.train(replace(small, epochs=1), tmp_path / "parts")
    again = train.train(small, tmp_path / "parts", resume=True)
    assert metrics(again) == metrics(rows)
    scaler = checkpoint.load(tmp_path / "parts" / "checkpoint.pt")["scaler"]
    assert bool(scaler) == (precision == "fp16")


def test_tensorboard_is_told_where_it_is(small, tmp_path, monkeypatch):
    told = []

    class Writer:
        def __init__(self, folder, purge_step):
            told.append((folder, purge_step))

        def add_scalar(self, name, value, epoch):
            told.append((name, value, epoch))

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    rows = train.train(replace(small, epochs=2), tmp_path)
    assert told[0] == (str(tmp_path / "tensorboard"), 1)
    assert ("validation_loss", rows[1]["validation_loss"], 2) in told
    assert len(told) == 1 + 2 * 6


# ---- interruptions ----

KILLED = """
import os, signal, sys, torch
from pathlib import Path
from mnet_kernels.recipe import Recipe
from mnet_kernels.train import train
torch.set_num_threads(1)
def on_step(now):
    if (now.epoch, now.step) == (2, 4):
        os.kill(os.getpid(), signal.SIGKILL)
recipe = Recipe(data=sys.argv[1], alpha=0.125, epochs=3, batch=16, backend=sys.argv[3])
train(recipe, Path(sys.argv[2]), on_step=on_step)
"""


@pytest.mark.parametrize("backend", recipe.BACKENDS)
def test_a_killed_run_is_resumed_to_the_bit(small, tmp_path, backend):
    process = start(KILLED, small.data, tmp_path / "killed", backend)
    assert process.wait(timeout=60) == -signal.SIGKILL, process.stderr.read()
    process.communicate()
    assert checkpoint.load(tmp_path / "killed" / "checkpoint.pt")["epoch"] == 1
    small = replace(small, backend=backend)
    resumed = train.train(small, tmp_path / "killed", resume=True)
    whole = train.train(small, tmp_path / "whole")
    assert metrics(resumed) == metrics(whole)
    a, b = (checkpoint.load(tmp_path / run / "checkpoint.pt") for run in ("killed", "whole"))
    torch.testing.assert_close(a["model"], b["model"], rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer"], b["optimizer"], rtol=0, atol=0)
    lines = (tmp_path / "killed" / "metrics.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["epoch", "1", "2", "3"]


def test_resuming_would_notice_a_lost_state(small, one_epoch, tmp_path):
    """The comparison above is sharp: without the optimiser's moments it fails."""
    path = one_epoch / "checkpoint.pt"
    held = checkpoint.load(path)
    for state in held["optimizer"]["state"].values():
        state["exp_avg"].zero_()
    checkpoint.save(path, held)
    resumed = train.train(small, one_epoch, resume=True)
    whole = train.train(small, tmp_path / "whole")
    assert metrics(resumed)[1:] != metrics(whole)[1:]


def test_what_an_interruption_left_out_is_made_up_for(small, tmp_path):
    rows = train.train(replace(small, epochs=2), tmp_path)
    (tmp_path / "metrics.csv").unlink()
    again = train.train(replace(small, epochs=2), tmp_path, resume=True)
    assert again == rows
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3


def test_native_and_swapped_take_each_others_checkpoints(small, one_epoch):
    rows = train.train(replace(small, epochs=2, backend="native"), one_epoch, resume=True)
    assert len(rows) == 2


# ---- what goes wrong ----


def refused(words, settings, output, **kwargs):
    with pytest.raises(InputError) as caught:
        train.train(settings, output, **kwargs)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_is_not_overwritten(small, one_epoch):
    refused("it holds a run already", small, one_epoch)


def test_nothing_to_resume(small, tmp_path):
    refused("checkpoint.pt: expected a file, found none", small, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("alpha", 0.25), ("size", 48), ("batch", 8), ("seed", 1), ("shift", 0.2), ("flips", False)],
)
def test_a_checkpoint_of_another_run_is_refused(small, one_epoch, setting, value):
    other = replace(small, **{setting: value})
    words = f"checkpoint.pt: expected {setting} {value}, as asked for now, got "
    refused(words, other, one_epoch, resume=True)
    refused("expected classes ['0', ", replace(small, data="digits"), one_epoch, resume=True)


def test_a_checkpoint_with_weights_of_another_network_is_refused(small, one_epoch):
    path = one_epoch / "checkpoint.pt"
    held = checkpoint.load(path)
    held["model"] = mobilenet_v1(0.25, 10).state_dict()
    checkpoint.save(path, held)
    refused("its weights are not this network's: size mismatch", small, one_epoch, resume=True)
    with pytest.raises(InputError, match="its weights are not this network's"):
        checkpoint.model_of(held, path)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.999])
def test_a_cut_checkpoint_is_refused(small, one_epoch, fraction):
    path = one_epoch / "checkpoint.pt"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    refused("expected one of mnet-kernels train, got a file of", small, one_epoch, resume=True)
    torch.save({"weight": torch.zeros(1)}, path)
    refused(
        "expected the format 'mnet_kernels training 1', got none", small, one_epoch, resume=True
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch": 1}, "batch: expected a multiple of the 1 processes, at least two"),
        ({"batch": 97}, "batch: expected at most the 96 training pictures, got 97"),
        ({"alpha": 0.001}, "alpha must be at least 0.03125"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a number above 0, got nan"),
        ({"shift": 1.0}, "shift: expected a fraction from 0 to 1, got 1.0"),
    ],
)
def test_bad_settings_are_refused(small, tmp_path, settings, words):
    refused(words, replace(small, **settings), tmp_path)


def test_a_place_that_cannot_be_written_is_refused(small, tmp_path):
    (tmp_path / "file").write_text("")
    refused("expected a folder", small, tmp_path / "file")
    refused("expected a folder", small, tmp_path / "file" / "below")


@pytest.mark.parametrize("backend", recipe.BACKENDS)
def test_a_loss_that_is_not_finite_stops_the_run(small, one_epoch, backend):
    """Epoch, step and last good checkpoint are named; the checkpoint is still that of before."""
    small = replace(small, backend=backend)
    before = (one_epoch / "checkpoint.pt").read_bytes()
    original, calls = recipe.augment, itertools.count(1)

    def poisoned(images, *rest):
        x = original(images, *rest)
        return x * float("nan") if next(calls) == 3 else x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "augment", poisoned)
        with pytest.raises(Stopped) as caught:
            train.train(small, one_epoch, resume=True)
    path = one_epoch / "checkpoint.pt"
    assert str(caught.value) == (
        f"epoch 2, step 3: the loss is nan; last good checkpoint: {path} (epoch 1)"
    )
    assert path.read_bytes() == before
    assert len(train.train(small, one_epoch, resume=True)) == 3


def test_the_command_stops_with_one_line_where_the_loss_overflows(fashion, tmp_path, capsys):
    line = f"train --data {fashion} --alpha 0.125 --epochs 1 --batch 16 --threads 1"
    line += f" --learning-rate 1e38 --output {tmp_path}"
    assert cli.main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("mnet-kernels: error: epoch 1, ")
    assert "the loss is " in error and error.endswith("last good checkpoint: none\n")
    assert error.count("\n") == 1
    assert not (tmp_path / "checkpoint.pt").exists(), "no checkpoint of nothing but NaN"


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_full_disk_leaves_the_old_checkpoint(small, one_epoch, monkeypatch, where):
    """The write fails half-way, or the system notices only when it must put the data in place."""
    before = (one_epoch / "checkpoint.pt").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Half(io.FileIO):
        def write(self, content):
            super().write(content[: len(content) // 2])
            full()

    def fill(now):
        if where == "write":
            monkeypatch.setattr(checkpoint, "open", lambda *a: Half(*a), raising=False)
        else:
            monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(Stopped) as caught:
        train.train(small, one_epoch, resume=True, on_step=fill)
    assert str(caught.value) == (
        f"epoch 2: {one_epoch / 'checkpoint.pt'} cannot be written: No space left on device; "
        f"last good checkpoint: {one_epoch / 'checkpoint.pt'} (epoch 1)"
    )
    assert (one_epoch / "checkpoint.pt").read_bytes() == before
    assert not list(one_epoch.glob("*.tmp"))
    monkeypatch.undo()
    assert len(train.train(small, one_epoch, resume=True)) == 3


FULL = """
import resource, sys
from mnet_kernels import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_write_that_the_system_refuses(fashion, tmp_path):
    """For real: no file may grow beyond 100 kB."""
    line = f"train --data {fashion} --alpha 0.125 --epochs 1 --batch 16 --output {tmp_path}"
    process = start(FULL, *line.split())
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert "checkpoint.pt" in error and "File too large; last good checkpoint: none" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ---- many processes ----


def together(code, *arguments, world=2):
    """``world`` processes that find each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    return [
        start(code, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(world)
    ]


GRADIENTS = """
import sys, torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from test_train import problem
from mnet_kernels.distributed import group
torch.set_num_threads(1)
with group("cpu") as ranks:
    result = {}
    for backend in ("native", "swap"):
        for frozen in (True, False):
            model, x, y = problem(backend, frozen)
            mine = slice(ranks.rank, None, ranks.world)
            parallel = DistributedDataParallel(model)
            nn.functional.cross_entropy(parallel(x[mine]), y[mine]).backward()
            result[backend, frozen] = [p.grad for p in model.parameters()]
    sums = ranks.sum(torch.tensor([1.0 + ranks.rank])), ranks.max(torch.tensor([ranks.rank]))
    statistics = model.conv1_bn.running_mean.fill_(ranks.rank)
    ranks.share_buffers(model)
    result["rank 0's"] = statistics
    torch.save((result, *sums), f"{sys.argv[1]}/{ranks.rank}.pt")
"""


def problem(backend, frozen):
    """(model, x, y), the same in every process; frozen: the norms keep their statistics."""
    torch.manual_seed(0)
    model = mobilenet_v1(0.125, 10, dropout=0.0).double().train()
    x, y = torch.randn(16, 3, 32, 32, dtype=torch.float64), torch.arange(16) % 10
    if frozen:
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            model(x)  # gives them statistics that fit, so that nothing vanishes
        for norm in norms:
            norm.eval()
    return swap(model) if backend == "swap" else model, x, y


def gradients(model, x, y):
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    return [p.grad.clone() for p in model.parameters()]


def test_gradients_of_two_processes_are_those_of_one(tmp_path):
    """With frozen norms they are the joined batch's. With batch statistics each process normalises
    its own half, so that they are the mean of the halves' gradients, and not the joined batch's."""
    for process in together(GRADIENTS, tmp_path):
        error = process.communicate(timeout=90)[1]
        assert process.returncode == 0, error
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for result, total, largest in results:
        assert (float(total), int(largest)) == (3.0, 1)
        assert not result["rank 0's"].any()
    for backend in ("native", "swap"):
        model, x, y = problem(backend, frozen=True)
        same(results, (backend, True), gradients(model, x, y))
        model, x, y = problem(backend, frozen=False)
        halves = [gradients(model, x[i::2], y[i::2]) for i in (0, 1)]
        same(results, (backend, False), [(a + b) / 2 for a, b in zip(*halves, strict=True)])
        with pytest.raises(AssertionError):
            same(results, (backend, False), gradients(model, x, y))


def same(results, key, expected):
    for result, *_ in results:
        for got, want in zip(result[key], expected, strict=True):
            assert float(want.abs().max()) > 0
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11 * float(want.abs().max()))


def test_torchrun_trains_on_every_picture_and_saves_once(small, tmp_path):
    """33 validation pictures on two processes: one has 17, the other 16."""
    folder = archives.fashion_mnist(tmp_path / "data", train=32, test=33)
    line = f"train --data fashion-mnist:{folder} --alpha 0.125 --epochs 2 --batch 16 --device cpu"
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 -m mnet_kernels"
    done = subprocess.run(
        [sys.executable, *command.split(), *line.split(), "--output", tmp_path / "run"],
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Training MobileNet V1") == 1
    assert "2 x cpu" in done.stdout
    held = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert held["epoch"] == 2
    model = checkpoint.model_of(held, tmp_path)
    validation = datasets.open_images(f"fashion-mnist:{folder}").validation
    x = recipe.scale(torch.stack([validation[i][0] for i in range(33)]))
    y = torch.tensor([validation[i][1] for i in range(33)])
    with torch.no_grad():
        logits = model(x)
    row = held["rows"][-1]
    assert row["validation_accuracy"] * 33 == pytest.approx(int((logits.argmax(1) == y).sum()))
    loss = float(nn.functional.cross_entropy(logits, y))
    assert row["validation_loss"] == pytest.approx(loss, rel=1e-4)


RANKS = """
import os, signal, sys
from mnet_kernels import cli, train
victim = int(sys.argv.pop(1))
original, steps = train.step, 0
def step(*args):
    global steps
    steps += 1
    if steps == 9 and int(os.environ["RANK"]) == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
train.step = step
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_with_a_usable_checkpoint(small, tmp_path, victim):
    line = f"train --data {small.data} --alpha 0.125 --epochs 3 --batch 16 --device cpu"
    processes = together(RANKS, victim, *line.split(), "--output", tmp_path)
    begin = time.monotonic()
    errors = [process.communicate(timeout=90)[1] for process in processes]
    assert time.monotonic() - begin < 60
    assert processes[victim].returncode == -signal.SIGKILL
    survivor = 1 - victim
    assert processes[survivor].returncode == 2, errors[survivor]
    (told,) = [x for x in errors[survivor].splitlines() if x.startswith("mnet-kernels: error: ")]
    assert "another process of the run was killed or cannot be reached" in told
    assert f"last good checkpoint: {tmp_path / 'checkpoint.pt'} (epoch 1)" in told
    assert "Traceback" not in errors[survivor]
    assert len(train.train(small, tmp_path, resume=True)) == 3, "one process goes on alone"


def test_a_killed_data_worker_ends_the_run(small, tmp_path):
    import multiprocessing

    def kill(now):
        if now.epoch == 2 and now.step == 1:
            multiprocessing.active_children()[0].kill()

    with pytest.raises(Stopped, match=r"a DataLoader worker .* was killed; last good .*epoch 1"):
        train.train(replace(small, workers=1, epochs=50, batch=2), tmp_path, on_step=kill)


# ---- the command ----


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train --data bogus", "data: expected digits, cifar10:PATH"),
        ("train --data cifar10:{tmp}/none", "none does not exist"),
        ("train --data digits --alpha 0.001", "alpha must be at least 0.03125"),
        ("train --data digits --batch 1", "'--batch'"),
        ("train --size 16", "'--size'"),
        ("train --precision fp8", "'fp8' is not one of"),
        ("train --backend cudnn", "'cudnn' is not one of"),
        ("train --resume --output {tmp}", "checkpoint.pt: expected a file, found none"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, line, words):
    arguments = line.format(tmp=tmp_path).split()
    if "--output" not in arguments:
        arguments += ["--output", str(tmp_path / "run")]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("mnet-kernels: error: ")
    assert error.count("\n") == 1
    assert words in error


def test_cuda_is_refused_where_there_is_none(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["train", "--device", "cuda", "--output", str(tmp_path)]) == 2
    assert "expected cpu, torch finds no GPU here" in capsys.readouterr().err


def test_the_command_trains_resumes_and_tells(fashion, tmp_path, capsys):
    line = f"train --data {fashion} --alpha 0.125 --batch 16 --threads 1 --output {tmp_path}"
    assert cli.main([*line.split(), "--epochs", "1"]) == 0
    text = capsys.readouterr().out
    assert "Training MobileNet V1, alpha 0.125" in text
    assert "epoch   1  loss " in text and "images/s" in text
    assert cli.main([*line.split(), "--epochs", "2"]) == 2
    assert "it holds a run already" in capsys.readouterr().err
    assert cli.main([*line.split(), "--epochs", "2", "--resume"]) == 0
    text = capsys.readouterr().out
    assert "epoch   2" in text and "epoch   1  " not in text
    assert "Validation accuracy: " in text


def test_without_matplotlib_there_is_no_curve_and_a_line_says_so(
    fashion, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = f"train --data {fashion} --alpha 0.125 --batch 16 --epochs 1 --output {tmp_path}"
    assert cli.main(line.split()) == 0
    text = capsys.readouterr().out
    assert "No curve.png: matplotlib is needed here and not installed" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.pt", "checkpoint.pt", "metrics.csv", "report.html",
    ]  # fmt: skip
