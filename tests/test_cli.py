"""The command: exit codes, one-line errors, and what each subcommand prints."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mnet_kernels
from mnet_kernels import cli, data, subjects
from mnet_kernels import compare as comparing
from mnet_kernels.inputs import packaged_file
from mnet_kernels.swap import sites, swap

TINY = "mobilenet_v1:alpha=0.25,size=32,classes=10"
COMMAND = [sys.executable, "-m", "mnet_kernels"]
ROOT = Path(__file__).parents[1]


def start(*arguments: str) -> subprocess.Popen:
    """In the background; with Ctrl-C's signal heard, which background jobs of a shell ignore."""
    pipe = subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # unlike "ignored", not kept
    try:
        return subprocess.Popen(
            [*COMMAND, *arguments], stdout=pipe, stderr=pipe, text=True, env=environment
        )
    finally:
        signal.signal(signal.SIGINT, before)


# ---- bad input ----

BAD_INPUT = [
    # (arguments, words of the one line: the argument, what was expected, what came)
    ("summary --alpha 1e9", ("--alpha", "memory")),
    ("bogus", ["No such command 'bogus'"]),
    ("compare --bogus", ["No such option '--bogus'"]),
    ("compare --image", ["'--image' requires an argument"]),
    ("compare bogus_v1", ["model: expected mobilenet_v1, a torchvision name", "got 'bogus_v1'"]),
    ("compare mobilnet_v2", ["did you mean mobilenet_v2"]),
    ("compare timm:bogus", ["or timm:NAME, got 'timm:bogus'"]),
    ("compare mobilenet_v1:bogus=1", ["expected options size, classes, alpha", "got 'bogus=1'"]),
    ("compare mobilenet_v1:alpha=x", ["alpha: expected a positive float, got 'x'"]),
    ("compare mobilenet_v1:alpha=nan", ["alpha: expected a positive float, got 'nan'"]),
    ("compare mobilenet_v1:alpha=0.001", ["alpha must be at least 0.03125", "got 0.001"]),
    ("compare mobilenet_v1:size=0", ["size: expected a positive int, got '0'"]),
    ("compare mobilenet_v1:size=4", ["model mobilenet_v1:size=4: cannot be built or run"]),
    ("compare --dtype int8", ["'--dtype'", "'int8' is not one of 'float32', 'bfloat16'"]),
    ("compare --layout nchw", ["'--layout'", "'nchw' is not one of 'contiguous'"]),
    ("compare --backend bogus", ["--backend: expected cpu, cuda, triton, native, got 'bogus'"]),
    ("compare --batch 0", ["'--batch'", "expected positive batch sizes, got '0'"]),
    ("compare --batch=-1", ["'--batch'", "expected positive batch sizes, got '-1'"]),
    ("compare --batch 1,two", ["'--batch'", "expected positive batch sizes, got '1,two'"]),
    ("compare --rounds 0", ["'--rounds'", "0 is not in the range"]),
    ("compare --threads x", ["'--threads'", "'x' is not a valid integer"]),
    ("compare --image {tmp}/none.jpg", ["none.jpg: expected a file, found none"]),
    ("compare --image {tmp}", ["expected a readable image"]),
    ("compare --image {text}", ["expected an image (JPEG, PNG, ...), got a file of 5 bytes"]),
    ("compare --image {cut}", ["expected a readable image, got: image file is truncated"]),
    ("compare --weights {tmp}/none.pth", ["none.pth: expected a file, found nothing"]),
    ("compare --weights {tmp}/none.h5", ["none.h5", "there is no file"]),
    ("compare --weights {text}", ["expected a PyTorch state dict, got a file of 5 bytes"]),
    ("compare a b --weights {text}", ["--weights: expected one MODEL to go with it, got 2"]),
    ("compare --json {tmp}/none/x.json", ["'--json'", "none/x.json: no such directory"]),
    ("compare --html {tmp}", ["'--html'", "expected a file to write, got the directory"]),
    ("demo --html {tmp}", ["'--html'", "expected a file to write, got the directory"]),
    ("demo --html {tmp}/x.html --weights {text}", ["expected a PyTorch state dict"]),
    ("tradeoff --alpha x", ["'--alpha'", "expected numbers from 0.03125, got 'x'"]),
    ("tradeoff --alpha 1,nan", ["'--alpha'", "got '1,nan'"]),
    ("tradeoff --size 224,8", ["'--size'", "expected whole numbers from 32, got '224,8'"]),
    ("tradeoff --batch 0", ["'--batch'", "0 is not in the range"]),
    ("tradeoff --plot {tmp}/x.doc", ["x.doc: expected a suffix of", "png", "svg"]),
    (
        "tradeoff --size 64 --no-others --plot {tmp}/x.png",
        ["--plot: expected networks whose accuracy is published"],
    ),
    ("tradeoff --json {tmp}/none/x.json", ["'--json'", "none/x.json: no such directory"]),
    ("tradeoff --weights {tmp}", ["weights and data: expected both or neither, got one"]),
    ("tradeoff --weights {text} --data imagefolder:{tmp}", ["text: expected a folder"]),
    ("tradeoff --weights {tmp} --data imagefolder:x", ["mobilenet_7_5_192_tf.h5", "got cut.jpg"]),
    ("summary --alpha nan", ["--alpha", "got nan"]),
    ("summary --size 1", ["'--size'", "1 is not in the range"]),
    ("summary --classes 0", ["'--classes'", "0 is not in the range"]),
]


@pytest.fixture
def files(tmp_path):
    """Places for {tmp}, {text} (no image, no weights) and {cut} (half a photograph)."""
    text, cut = tmp_path / "text", tmp_path / "cut.jpg"
    text.write_bytes(b"hello")
    china = packaged_file("scikit-learn", "sklearn/datasets/images/china.jpg")
    cut.write_bytes(china.read_bytes()[:20_000])
    return {"tmp": tmp_path, "text": text, "cut": cut}


@pytest.mark.parametrize(("line", "words"), BAD_INPUT, ids=[line for line, _ in BAD_INPUT])
def test_bad_input_is_one_line_and_status_2(capsys, files, line, words):
    status = cli.main([argument.format(**files) for argument in line.split()])
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("mnet-kernels: error: ")
    assert error.count("\n") == 1
    assert all(word in error for word in words), error


def test_an_unavailable_backend_is_refused_with_its_reason(capsys):
    from mnet_kernels import backends

    absent = [row for row in backends.table() if not row.available]
    for row in absent:
        assert cli.main(["compare", TINY, "--backend", row.backend]) == 2
        assert f"{row.backend} cannot serve here: {row.reason}" in capsys.readouterr().err


def test_bad_input_needs_no_traceback_in_a_process_of_its_own():
    process = start("compare", "bogus_v1")
    output, error = process.communicate(timeout=600)
    assert process.returncode == 2
    assert "Traceback" not in output + error


def test_an_unbuilt_package_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr("mnet_kernels.timing.build_info", lambda: None)
    assert cli.main(["info"]) == 0
    assert cli.NOT_BUILT in capsys.readouterr().out
    assert cli.main(["compare", TINY]) == 2
    assert capsys.readouterr().err == f"mnet-kernels: error: {cli.NOT_BUILT}\n"


def test_a_missing_package_names_the_extra_to_install(monkeypatch, capsys):
    for module in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    assert cli.main(["compare", "mobilenet_v2"]) == 2
    error = capsys.readouterr().err
    assert "torchvision is needed here and not installed" in error
    assert "pip install 'mnet_kernels[demo]'" in error


def test_missing_photographs_name_the_extra_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(data, "packaged_file", lambda distribution, name: None)
    assert cli.main(["demo", "--html", str(tmp_path / "x.html")]) == 2
    error = capsys.readouterr().err
    assert "photograph china: expected sklearn/datasets/images/china.jpg" in error
    assert "pip install 'mnet_kernels[demo]'" in error


# ---- leaving early ----


def test_ctrl_c_is_one_line_and_status_130():
    process = start("compare", "mobilenet_v1", "--rounds", "1000")
    process.stdout.readline()  # it has begun
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=600)[1]
    assert process.returncode == 130
    assert error.strip() == "mnet-kernels: interrupted"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line_and_status_2():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "info"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "mnet-kernels: error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("saved", [False, True])
def test_ctrl_c_in_training_says_how_to_go_on(saved, capsys, tmp_path, monkeypatch):
    def interrupted(*arguments, **settings):
        if saved:
            (tmp_path / "checkpoint.pt").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("mnet_kernels.train.train", interrupted)
    assert cli.main(["train", "--output", str(tmp_path)]) == 130
    error = capsys.readouterr().err
    assert ("with --resume goes on" in error) == saved
    assert ("begins anew" in error) != saved


def test_a_broken_pipe_is_quiet():
    process = start("summary")
    process.stdout.close()
    error = process.stderr.read()
    process.wait(timeout=600)
    process.stderr.close()
    assert error == ""


# ---- what each command prints ----


def test_help_comes_without_the_heavy_packages():
    script = (
        "import sys; from mnet_kernels import cli; status = cli.main(['--help']); "
        "heavy = {'torchvision', 'timm', 'sklearn', 'skimage'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else status)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert all(
        command in done.stdout for command in ("info", "summary", "compare", "demo", "report")
    )


def test_no_command_prints_the_help(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert "Commands:" in text
    assert "..." not in text.partition("Commands:")[2]


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mnet_kernels {mnet_kernels.__version__}\n"


def test_info_says_what_is_built_and_which_backends_serve(capsys):
    from mnet_kernels import backends

    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "instruction set" in text
    for row in backends.table():
        assert row.backend in text
        assert row.reason in text


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.keys() == {"environment", "build", "backends"}
    assert {row["backend"] for row in told["backends"]} == {"cpu", "cuda", "triton", "native"}


def test_summary_prints_the_three_totals(capsys):
    assert cli.main(["summary", "--alpha", "0.5", "--size", "32", "--classes", "10"]) == 0
    text = capsys.readouterr().out
    assert all(total in text for total in ("834,666", "823,722", "10,944"))


def test_compare_prints_one_block_a_batch_and_writes_both_files(capsys, tmp_path):
    page, result = tmp_path / "r.html", tmp_path / "r.json"
    line = ["compare", TINY, "--batch", "1,2", "--rounds", "2", "--layers"]
    assert cli.main([*line, "--html", str(page), "--json", str(result)]) == 0
    text = capsys.readouterr().out
    assert f"{TINY}, batch 1" in text
    assert f"{TINY}, batch 2" in text
    assert "conv_dw_13" in text
    assert "The answers are the same" in text
    assert max(map(len, text.splitlines())) <= 100
    assert [row["batch"] for row in json.loads(result.read_text())["rows"]] == [1, 2]
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_compare_exits_1_and_names_the_row_where_answers_differ(capsys, monkeypatch):
    def wrong(model, backend=None):
        fast = swap(model, backend=backend)
        next(sites(fast))[1].register_forward_hook(lambda _, args, y: y + 1)
        return fast

    monkeypatch.setattr(comparing, "swap", wrong)
    assert cli.main(["compare", TINY, "--rounds", "1"]) == 1
    output, error = capsys.readouterr()
    assert "The answers differ" in output
    assert f"mnet-kernels: answers differ: {TINY}, batch 1: swapped is off by" in error
    assert f"{TINY}, batch 1, layer conv1: swapped is off by" in error


def test_compare_looks_at_the_users_photograph(capsys, files):
    china = packaged_file("scikit-learn", "sklearn/datasets/images/china.jpg")
    assert cli.main(["compare", TINY, "--image", str(china), "--rounds", "1"]) == 0
    assert "1/1" in capsys.readouterr().out


@pytest.mark.parametrize("found", [None, "mobilenet_v2-b0353104.pth"], ids=["missing", "broken"])
def test_demo_goes_on_with_v1_without_the_weights(capsys, monkeypatch, tmp_path, found):
    if found is not None:
        (tmp_path / found).write_bytes(b"cut off")
    path = tmp_path / found if found else None
    monkeypatch.setattr(subjects, "find_mobilenet_v2_weights", lambda: path)
    subject = subjects.subject
    monkeypatch.setattr(
        subjects,
        "subject",
        lambda spec, *rest: subject(TINY if spec == "mobilenet_v1" else spec, *rest),
    )
    page = tmp_path / "demo.html"
    assert cli.main(["demo", "--html", str(page), "--rounds", "1", "--batch", "1"]) == 0
    text = capsys.readouterr().out
    reason = "is neither in the package" if found is None else "expected a sha256 that begins with"
    assert "No trained MobileNet V2, going on with V1: " in text
    assert reason in text
    assert "5/5" in text
    assert f"Report: {page}" in text
