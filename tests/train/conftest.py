"""Small runs of training to look at, interrupt and resume."""

import shutil
from pathlib import Path

import archives
import pytest
import torch

from mnet_kernels import train
from mnet_kernels.training.recipe import Recipe


@pytest.fixture(scope="session")
def fashion(tmp_path_factory):
    """96 training pictures, 32 for validation."""
    return f"fashion-mnist:{archives.fashion_mnist(tmp_path_factory.mktemp('fashion'))}"


@pytest.fixture
def small(fashion):
    return Recipe(data=fashion, alpha=0.125, epochs=3, batch=16)


@pytest.fixture(scope="session")
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
