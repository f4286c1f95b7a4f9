"""The command mnet-kernels train."""

import sys

import pytest
import torch

from mnet_kernels import cli


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
