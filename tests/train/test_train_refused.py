"""What goes wrong in a run: one line says it, and the last good checkpoint is there."""

import errno
import io
import itertools
import os
from dataclasses import replace

import pytest
import torch
from train_processes import start

from mnet_kernels import cli, train
from mnet_kernels.inputs import InputError
from mnet_kernels.models import mobilenet_v1
from mnet_kernels.train import Stopped
from mnet_kernels.training import checkpoint, recipe


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
        ({"backend": "cuda"}, "backend: expected one that serves here, got cuda: "),
        ({"backend": "triton"}, "got triton: the triton backend serves GPU tensors, not cpu"),
    ],
)
def test_bad_settings_are_refused(small, tmp_path, settings, words):
    refused(words, replace(small, **settings), tmp_path)


def test_a_place_that_cannot_be_written_is_refused(small, tmp_path):
    (tmp_path / "file").write_text("")
    refused("expected a folder", small, tmp_path / "file")
    refused("expected a folder", small, tmp_path / "file" / "below")


@pytest.mark.parametrize("backend", ["swap", "native"])
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
