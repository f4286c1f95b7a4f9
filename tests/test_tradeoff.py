"""The trade-off: what is counted, measured and published, and the files it leaves."""

import csv
import io
import json
import sys

import pytest
import torch

from mnet_kernels import cli, models, published, report
from mnet_kernels import tradeoff as trading
from mnet_kernels.inputs import InputError
from mnet_kernels.report import curve
from mnet_kernels.tradeoff import Settings

TINY = Settings(alphas=(0.5, 0.25), sizes=(64, 32), batch=3, others=False, rounds=2, memory=False)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads of a machine that has other things to do wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def result(one_thread):
    return trading.tradeoff(TINY)


def test_a_row_a_width_and_resolution(result):
    assert [row["label"] for row in result["rows"]] == ["0.5-64", "0.5-32", "0.25-64", "0.25-32"]
    assert trading.failures(result) == []
    row = result["rows"][0]
    assert row["images_per_second"]["swapped"] == pytest.approx(
        3e3 / row["throughput_ms"]["swapped"]["median"]
    )
    assert row["best_native"] in row["latency_ms"]


def test_what_is_counted_is_the_papers():
    """Table 6 and 7 of the paper: millions of multiply-adds and parameters."""
    paper = {(1.0, 224): (569, 4.2), (0.75, 224): (325, 2.6), (0.5, 224): (149, 1.3),
             (0.25, 224): (41, 0.5), (1.0, 192): (418, 4.2), (1.0, 128): (186, 4.2)}  # fmt: skip
    for network in trading.networks(Settings()):
        if (network.alpha, network.size) in paper:
            counted = models.summary(network.build(), (1, 3, network.size, network.size))
            adds, params = paper[network.alpha, network.size]
            assert counted.multiply_adds / 1e6 == pytest.approx(adds, abs=1)
            assert counted.total_params / 1e6 == pytest.approx(params, abs=0.06)


def test_the_others_are_counted_without_what_only_trains():
    networks = {n.label: n for n in trading.networks(Settings())}
    assert list(networks)[-2:] == ["GoogLeNet", "VGG16"]
    params = sum(p.numel() for p in networks["GoogLeNet"].build().parameters())
    assert params == 6_624_904  # torchvision's own figure


def test_published_accuracies_name_their_source():
    for network in trading.networks(Settings()):
        told = network.published()
        assert told["kind"] == "published"
        assert 0.4 < told["top1"] < told["top5"] < 1
        assert abs(told.get("paper_top1", told["top1"]) - told["top1"]) < 0.01
        assert "TensorFlow-Slim" in told["source"] or "IMAGENET1K_V1" in told["source"]
    assert published.mobilenet_v1(0.5, 33) is None
    for alpha in trading.ALPHAS:
        falling = [published.mobilenet_v1(alpha, size)["top1"] for size in trading.SIZES]
        assert falling == sorted(falling, reverse=True)


def test_a_planted_fault_is_told(monkeypatch):
    swap = trading.comparing.swap

    def wrong(model, backend=None):
        fast = swap(model, backend=backend)
        fast.register_forward_hook(lambda _, args, y: y + 1)
        return fast

    monkeypatch.setattr(trading.comparing, "swap", wrong)
    few = Settings(alphas=(0.25,), sizes=(32,), batch=2, others=False, rounds=1, memory=False)
    told = trading.failures(trading.tradeoff(few))
    assert len(told) == 1
    assert told[0].startswith("0.25-32: swapped is off by")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
def test_peak_memory_grows_with_what_is_held():
    network = trading._Network("", "", 0.25, 64)
    small, large = (trading._peak_in_child(network, False, batch) for batch in (2, 64))
    largest = 64 * 16 * 32 * 32 * 4  # the first pair's result, input and output
    assert 0 < small < large
    assert 2 * largest < large < 20 * largest


def test_measured_accuracy_replaces_the_published(monkeypatch, tmp_path):
    (tmp_path / "mobilenet_2_5_32_tf.h5").touch()
    (tmp_path / "mobilenet_5_0_999_tf.h5").touch()
    asked = []

    def evaluate(candidate, images):
        asked.append((candidate, images))
        ways = {way: {"top1": 0.5, "top5": 0.75} for way in ("native", "swapped")}
        return {"ways": ways, "images": 4}

    monkeypatch.setattr(trading.evaluate, "candidate", lambda *given: given)
    monkeypatch.setattr(trading.evaluate, "evaluate", evaluate)
    few = Settings(alphas=(0.25,), sizes=(32, 64), batch=2, others=False, rounds=1, memory=False,
                   weights=tmp_path, images="imagefolder:x")  # fmt: skip
    first, second = trading.tradeoff(few)["rows"]
    assert asked == [
        (("mobilenet_v1:alpha=0.25,size=32", tmp_path / "mobilenet_2_5_32_tf.h5"), "imagefolder:x")
    ]
    assert first["accuracy"] == {
        "top1": 0.5, "top5": 0.75, "native_top1": 0.5, "kind": "measured",
        "source": "mobilenet_2_5_32_tf.h5 on 4 pictures of imagefolder:x",
    }  # fmt: skip
    assert second["accuracy"] is None


def test_keras_names_of_weights(tmp_path):
    names = {1.0: "1_0", 0.75: "7_5", 0.5: "5_0", 0.25: "2_5"}
    for name in names.values():
        (tmp_path / f"mobilenet_{name}_192_tf.h5").touch()
    (tmp_path / "vgg16-397923af.pth").touch()
    found = trading._checkpoints(tmp_path, trading.networks(Settings()))
    assert {spec: path.name for spec, path in found.items()} == {
        **{
            f"mobilenet_v1:alpha={a},size=192": f"mobilenet_{n}_192_tf.h5" for a, n in names.items()
        },
        "vgg16": "vgg16-397923af.pth",
    }
    with pytest.raises(InputError, match="expected both or neither"):
        trading.tradeoff(Settings(weights=tmp_path))


# ---- files ----


def test_csv_has_a_line_a_network(result):
    lines = list(csv.DictReader(io.StringIO(trading.to_csv(result))))
    assert [line["label"] for line in lines] == [row["label"] for row in result["rows"]]
    first, row = lines[0], result["rows"][0]
    assert float(first["latency_ms_swapped"]) == row["latency_ms"]["swapped"]["median"]
    assert int(first["params"]) == row["params"]


def test_markdown_says_where_it_is_from(result):
    text = trading.to_markdown(result)
    assert text.count("\n| 0.") == 4
    assert "Measured on" in text


@pytest.mark.parametrize(("kind", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_plot(result, kind, begin):
    told = json.loads(json.dumps(result))
    for row in told["rows"]:
        row["accuracy"] = published.mobilenet_v1(0.25, 128)
    assert curve.draw_tradeoff(told, kind).startswith(begin)


def test_the_command_says_how_long_and_writes_everything(tmp_path, capsys):
    files = {kind: tmp_path / f"t.{kind}" for kind in ("json", "csv", "markdown", "html")}
    options = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    line = ["tradeoff", "--alpha", "0.25", "--size", "32", "--batch", "2", "--no-others"]
    assert cli.main([*line, "--rounds", "1", "--threads", "1", *options]) == 0
    text = capsys.readouterr().out
    assert "Measures 1 network, native and swapped: about" in text
    assert "0.25-32" in text
    assert max(map(len, text.splitlines())) <= 100
    evidence = report.read([files["json"]])
    assert len(evidence.tradeoffs) == 1
    assert "Trade-off" in files["html"].read_text()
