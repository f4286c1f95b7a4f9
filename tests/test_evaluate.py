"""Evaluation: the counts against a plain loop, every kind of weights, and what is refused."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import archives
import pytest
import torch

from mnet_kernels import cli, data, evaluate, subjects, train
from mnet_kernels.evaluate import candidate
from mnet_kernels.inputs import InputError
from mnet_kernels.training import checkpoint, datasets, recipe
from mnet_kernels.training.recipe import Recipe

pytest.importorskip("torchvision")
# Keras' own.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ROOT = Path(__file__).parents[1]
SMALL = "mobilenet_v1:alpha=0.25,size=64,classes=12"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """imagefolder: 12 classes, 3 pictures each but for the last."""
    folder = tmp_path_factory.mktemp("pictures")
    classes = [chr(ord("a") + i) for i in range(12)]
    archives.image_folder(folder, classes, count=3, size=(80, 100))
    (folder / "l" / "2.png").unlink()
    return f"imagefolder:{folder}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(spec, folder): a run on an image folder that was split."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("trained")
    spec = f"imagefolder:{archives.image_folder(folder / 'data', count=15)}"
    train.train(Recipe(data=spec, alpha=0.125, size=32, epochs=2, batch=8), folder / "run")
    return spec, folder / "run"


def by_hand(model, x, y):
    """(top-1, top-5) as fractions."""
    with torch.no_grad():
        order = model.eval()(x).argsort(1, descending=True)
    hit = order == y[:, None]
    return int(hit[:, 0].sum()) / len(y), int(hit[:, :5].sum()) / len(y)


def read(spec, transform):
    whole = datasets.folder(spec, Path(spec.partition(":")[2]), transform)
    x, y = zip(*(whole[i] for i in range(len(whole))), strict=True)
    return torch.stack(x), torch.tensor(y)


def both(result):
    assert list(result["ways"]) == ["native", "swapped"]
    assert all(row["images_per_second"] > 0 for row in result["ways"].values())
    native, swapped = ((row["top1"], row["top5"]) for row in result["ways"].values())
    return native, swapped


# ---- the counts ----


@pytest.mark.parametrize("batch", [1, 5, 35])
def test_counts_are_those_of_a_plain_loop(pictures, batch):
    result = evaluate.evaluate(candidate(SMALL), pictures, batch=batch)
    x, y = read(pictures, datasets.fit(64))
    expected = by_hand(subjects.subject(SMALL).model, recipe.scale(x), y)
    assert 0 < expected[0] < expected[1] < 1, "figures that tell something"
    assert both(result) == (expected, expected)
    assert (result["images"], result["same_top1"]) == (35, 35)
    assert result["preprocess"] == "keras"


def test_a_swapped_model_that_is_wrong_shows(pictures, monkeypatch):
    real = evaluate.swap

    def wrong(model, backend=None):
        fast = real(model, backend=backend)
        fast.register_forward_hook(lambda _, args, y: y.roll(1, 1))
        return fast

    monkeypatch.setattr(evaluate, "swap", wrong)
    result = evaluate.evaluate(candidate(SMALL), pictures)
    native, swapped = both(result)
    assert native != swapped
    assert result["same_top1"] == 0


def test_the_folder_val_is_taken_where_there_is_one(tmp_path, pictures):
    shutil.copytree(pictures.partition(":")[2], tmp_path / "val")
    result = evaluate.evaluate(candidate(SMALL), f"imagefolder:{tmp_path}")
    assert result["images"] == 35


# ---- preprocessing ----


def test_torchvisions_preprocessing(pictures):
    spec = "mobilenet_v3_small:classes=12"
    chosen = candidate(spec)
    result = evaluate.evaluate(chosen, pictures)
    assert result["preprocess"] == "torchvision"
    from torchvision.transforms._presets import ImageClassification

    x, y = read(pictures, ImageClassification(crop_size=224))
    assert both(result)[0] == by_hand(subjects.subject(spec).model, x, y)


def test_timms_preprocessing(pictures):
    timm = pytest.importorskip("timm")
    spec = "timm:mobilenetv3_small_050:classes=12,size=128"
    chosen = candidate(spec)
    result = evaluate.evaluate(chosen, pictures)
    assert result["preprocess"] == "timm"
    model = subjects.subject(spec).model
    config = timm.data.resolve_model_data_config(model) | {"input_size": (3, 128, 128)}
    x, y = read(pictures, timm.data.create_transform(**config))
    assert both(result)[0] == by_hand(model, x, y)


def test_each_preprocessing_makes_other_numbers(pictures):
    """So that the tests above could not pass with the wrong one."""
    pytest.importorskip("timm")
    chosen = candidate("timm:mobilenetv3_small_050:classes=12,size=128")
    seen = {}
    for preprocess in evaluate.PREPROCESS:
        other = evaluate.Candidate(chosen.subject, preprocess)
        whole, _, (mean, std) = evaluate._pictures(other, pictures, 12)
        channel = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        seen[preprocess] = (whole[0][0] / 255 - channel[0]) / channel[1]
    keras, torchvision, timm = seen.values()
    assert keras.min() >= -1 and keras.max() <= 1
    assert (keras - torchvision).abs().max() > 0.1
    assert (torchvision - timm).abs().max() > 0.02


# ---- weights ----


def test_real_weights_know_real_photographs(tmp_path):
    """Chelsea is an Egyptian cat, coffee an espresso: folders named by WordNet number."""
    if subjects.find_mobilenet_v2_weights() is None:
        pytest.skip("torchvision's weights for MobileNetV2 are not here")
    pytest.importorskip("timm", reason="it knows ImageNet's WordNet numbers")
    photographs = {p.name: p.image for p in data.demo_photographs()}
    for synset, name in (("n02124075", "chelsea"), ("n07920052", "coffee")):
        (tmp_path / synset).mkdir()
        photographs[name].save(tmp_path / synset / "0.png")
    result = evaluate.evaluate(candidate("mobilenet_v2"), f"imagefolder:{tmp_path}")
    assert result["weights"] == subjects.MOBILENET_V2_FILE
    assert both(result) == ((1.0, 1.0), (1.0, 1.0))


def test_weights_from_keras(tmp_path, pictures):
    from test_keras_parity import keras_mobilenet, loaded, save

    path = save(keras_mobilenet(64, 0.25), tmp_path / "model.keras")
    ten = archives.image_folder(tmp_path / "ten", "abcdefghij", count=3, size=(80, 100))
    chosen = candidate("mobilenet_v1:alpha=0.25,size=64,classes=10", path)
    result = evaluate.evaluate(chosen, f"imagefolder:{ten}")
    assert result["weights"] == "model.keras"
    x, y = read(f"imagefolder:{ten}", datasets.fit(64))
    assert both(result)[1] == by_hand(loaded(path), recipe.scale(x), y)


def test_weights_of_timm_and_inside_other_programs_checkpoints(tmp_path, pictures):
    pytest.importorskip("timm")
    safetensors = pytest.importorskip("safetensors.torch")
    spec = "timm:mobilenetv3_small_050:classes=12,size=64"
    state = subjects.subject(spec, seed=3).model.state_dict()
    safetensors.save_file(state, tmp_path / "model.safetensors")
    torch.save({"state_dict": state, "epoch": 7}, tmp_path / "checkpoint.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"hello")
    for name in ("model.safetensors", "checkpoint.pth"):
        found = candidate(spec, tmp_path / name).subject.model.state_dict()
        torch.testing.assert_close(found, state, rtol=0, atol=0)
    with pytest.raises(InputError, match=r"cut.safetensors: expected a PyTorch state dict"):
        candidate(spec, tmp_path / "cut.safetensors")


def test_our_checkpoint_again_gives_what_training_said(trained):
    """On the same split: none of the pictures that it was trained on."""
    spec, run = trained
    chosen = candidate(str(run / "checkpoint.pt"))
    assert chosen.preprocess == "keras"
    result = evaluate.evaluate(chosen, spec)
    row = checkpoint.load(run / "checkpoint.pt")["rows"][-1]
    assert result["images"] == 9
    native, swapped = both(result)
    assert native[0] == swapped[0] == row["validation_accuracy"]
    assert native[1] == 1.0, "there are but three classes"


def test_our_checkpoint_on_other_pictures(trained, tmp_path):
    _, run = trained
    other = archives.image_folder(tmp_path, count=4, seed=5)
    assert (
        evaluate.evaluate(candidate(str(run / "best.pt")), f"imagefolder:{other}")["images"] == 12
    )


def test_our_checkpoint_as_weights(trained):
    _, run = trained
    spec = "mobilenet_v1:alpha=0.125,size=32,classes=3"
    one = candidate(spec, run / "best.pt").subject.model.state_dict()
    two = candidate(str(run / "best.pt")).subject.model.state_dict()
    torch.testing.assert_close(one, two, rtol=0, atol=0)


# ---- many processes ----

PROCESS = """
import json, sys, torch
from mnet_kernels.training.distributed import group
from mnet_kernels.evaluate import candidate, evaluate
torch.set_num_threads(1)
with group("cpu") as ranks:
    result = evaluate(candidate(sys.argv[1]), sys.argv[2], batch=4, group=ranks)
print(json.dumps(result))
"""


def test_processes_share_the_pictures_and_count_each_once(pictures):
    """35 pictures on two processes: one has 18, the other 17."""
    alone = evaluate.evaluate(candidate(SMALL), pictures)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    shared |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, SMALL, pictures],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    for process in processes:
        output, error = process.communicate(timeout=600)
        assert process.returncode == 0, error
        result = json.loads(output)
        assert (result["images"], result["processes"]) == (35, 2)
        assert both(result) == both(alone)


# ---- what is refused ----


def refused(words, spec, *arguments):
    with pytest.raises(InputError) as caught:
        evaluate.evaluate(candidate(*arguments), spec)
    assert words in str(caught.value), caught.value
    assert "\n" not in str(caught.value)


def test_classes_must_be_the_models(trained, pictures, tmp_path):
    spec, run = trained
    words = "expected the model's 12 classes, got 3 (a, b, c)"
    refused(words, spec, SMALL)
    words = "expected the model's 1000 classes, or folders named n01440764 and so on, got 12"
    refused(words, pictures, "mobilenet_v1:alpha=0.25,size=32")
    words = "expected the checkpoint's 3 classes (a, b, c, ...), got 12 (a, b, c, ...)"
    refused(words, pictures, str(run / "best.pt"))
    renamed = archives.image_folder(tmp_path / "renamed", ("a", "b", "x"))
    refused("expected the checkpoint's 3 classes", f"imagefolder:{renamed}", str(run / "best.pt"))
    unknown = archives.image_folder(tmp_path / "unknown", ("n00000000", "n02124075"))
    words = "n00000000 is not one of ImageNet's 1000 classes"
    refused(words, f"imagefolder:{unknown}", "mobilenet_v1:alpha=0.25,size=32")


def test_checkpoints_that_cannot_be_used(trained, tmp_path, pictures):
    _, run = trained
    refused("expected a file, found none", pictures, str(tmp_path / "none.pt"))
    cut = tmp_path / "cut.pt"
    cut.write_bytes((run / "best.pt").read_bytes()[:1000])
    refused("expected one of mnet-kernels train, got a file of 1,000 bytes", pictures, str(cut))
    refused("is a checkpoint and has its own", pictures, str(run / "best.pt"), run / "best.pt")
    refused("preprocess: expected keras", pictures, str(run / "best.pt"), None, "timm")
    refused("preprocess timm: expected a model of timm", pictures, SMALL, None, "timm")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("evaluate", "Missing argument 'MODEL'"),
        ("evaluate bogus --data digits", "model: expected mobilenet_v1, a torchvision name"),
        (f"evaluate {SMALL}", "Missing option '--data'"),
        (f"evaluate {SMALL} --data imagefolder:/none", "expected a folder a class, with pictures"),
        (f"evaluate {SMALL} --data bogus:x", "data: expected digits, cifar10:PATH"),
        (f"evaluate {SMALL} --data digits", "expected the model's 12 classes, got 10"),
        (f"evaluate {SMALL} --data digits --preprocess tf", "'tf' is not one of"),
        (f"evaluate {SMALL} --data digits --backend bogus", "--backend: expected cpu, cuda"),
        (f"evaluate {SMALL} --data digits --weights /none.pth", "expected a file, found nothing"),
    ],
)
def test_bad_input_is_one_line(capsys, line, words):
    assert cli.main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("mnet-kernels: error: ")
    assert error.count("\n") == 1
    assert words in error


# ---- the command ----


def test_the_command_prints_both_ways_side_by_side(trained, tmp_path, capsys):
    spec, run = trained
    result = tmp_path / "result.json"
    line = ["evaluate", str(run / "best.pt"), "--data", spec, "--json", str(result)]
    assert cli.main(line) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("native", "swapped", "top-1", "top-5", "images/s"))
    assert "for 9 of 9 pictures" in " ".join(text.split())
    told = json.loads(result.read_text())
    assert told["schema"] == 1 and told["data"] == spec
    assert "torch" in told["environment"]


def test_a_killed_data_worker_is_one_line(pictures, capsys, monkeypatch):
    def batches(self):
        raise RuntimeError("DataLoader worker (pid 42) is killed by signal: Killed.")

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", batches)
    assert cli.main(["evaluate", SMALL, "--data", pictures]) == 2
    told = "mnet-kernels: error: a DataLoader worker (pid 42) was killed"
    assert capsys.readouterr().err.splitlines()[-1] == told


KILLED_WORKER = """
import multiprocessing, sys
from mnet_kernels import cli, evaluate
timed = evaluate._timed
def kill(*args):
    for worker in multiprocessing.active_children():
        worker.kill()
    return timed(*args)
evaluate._timed = kill
sys.exit(cli.main(sys.argv[1:]))
"""


def test_nothing_is_raised_after_a_worker_was_killed(pictures):
    """Not either while Python shuts down."""
    line = f"evaluate {SMALL} --data {pictures} --batch 1 --workers 1 --threads 1"
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WORKER, *line.split()],
        capture_output=True, text=True, timeout=600, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("mnet-kernels: error: a DataLoader worker") and "was killed" in last
    assert "Traceback" not in done.stderr
