"""Runs that were killed are resumed to the bit."""

import signal
from dataclasses import replace

import pytest
import torch
from train_processes import metrics, start

from mnet_kernels import train
from mnet_kernels.training import checkpoint

KILLED = """
import os, signal, sys, torch
from pathlib import Path
from mnet_kernels.training.recipe import Recipe
from mnet_kernels.train import train
torch.set_num_threads(1)
def on_step(now):
    if (now.epoch, now.step) == (2, 4):
        os.kill(os.getpid(), signal.SIGKILL)
recipe = Recipe(data=sys.argv[1], alpha=0.125, epochs=3, batch=16, backend=sys.argv[3])
train(recipe, Path(sys.argv[2]), on_step=on_step)
"""


@pytest.mark.parametrize("backend", ["swap", "native", "cpu"])
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
