"""A run: what it leaves, and what changes it or does not."""

import csv
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from train_processes import metrics

from mnet_kernels import train
from mnet_kernels.training import checkpoint, datasets, recipe
from mnet_kernels.training.recipe import Recipe


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
