"""Training by several processes together."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import archives
import pytest
import torch
from torch import nn
from train_processes import TESTS, together

from mnet_kernels import train
from mnet_kernels.models import mobilenet_v1
from mnet_kernels.swap import swap
from mnet_kernels.training import checkpoint, datasets, recipe
from mnet_kernels.training.batches import deaf_to_workers
from mnet_kernels.training.distributed import lost_process

GRADIENTS = """
import sys, torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from test_train_many import problem
from mnet_kernels.training.distributed import group
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
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"},
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


KILLED_WORKER = """
import multiprocessing, pathlib, pickle, sys, torch
from mnet_kernels import train
torch.set_num_threads(1)
def kill(now):
    if now.epoch == 2 and now.step == 1:
        multiprocessing.active_children()[0].kill()
train.train(pickle.loads(bytes.fromhex(sys.argv[1])), pathlib.Path(sys.argv[2]), on_step=kill)
"""


def test_a_killed_data_worker_ends_the_run(small, tmp_path):
    """In a process of its own: torch raises wherever Python is when it hears of the death."""
    recipe = pickle.dumps(replace(small, workers=1, epochs=50, batch=2)).hex()
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WORKER, recipe, tmp_path],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]  # nothing comes after it while Python shuts down
    told = r"mnet_kernels.train.Stopped: a DataLoader worker.* was killed; last good .*epoch 1"
    assert re.match(told, last), done.stderr


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError()])
def test_a_data_worker_killed_while_it_hands_a_batch_over(small, tmp_path, monkeypatch, error):
    """torch itself says only that the connection is lost."""

    def batches(self):
        raise error
        yield

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", batches)
    with pytest.raises(train.Stopped, match=r"a DataLoader worker was killed; last good .*: none"):
        train.train(small, tmp_path)


def test_deaf_to_workers_holds_back_what_torch_raises():
    def handler(number, frame):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    before = signal.signal(signal.SIGCHLD, handler)
    try:
        with deaf_to_workers():
            os.kill(os.getpid(), signal.SIGCHLD)
        with pytest.raises(RuntimeError, match="killed"):
            os.kill(os.getpid(), signal.SIGCHLD)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_an_error_that_a_data_worker_tells_of_is_no_lost_process():
    error = RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: bad")
    assert lost_process(error) is None
