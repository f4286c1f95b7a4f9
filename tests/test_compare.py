"""Comparing: faults and slowdowns that were planted must show; inputs; the report."""

import json
import math
import re
import time

import pytest
import torch
from report_samples import Page
from torch import nn

from mnet_kernels import compare as comparing
from mnet_kernels import data, report, subjects
from mnet_kernels.compare import Settings, compare, failures, tolerance
from mnet_kernels.data import Photograph
from mnet_kernels.inputs import InputError
from mnet_kernels.subjects import Subject, subject
from mnet_kernels.swap import sites, swap

TINY = "mobilenet_v1:alpha=0.25,size=32,classes=10"
QUICK = Settings(rounds=2, batches=(2,))


@pytest.fixture(scope="module")
def tiny() -> Subject:
    return subject(TINY)


@pytest.fixture(scope="module")
def result(tiny):
    return compare([tiny], Settings(rounds=2, batches=(1, 3)))


def plant(monkeypatch, change):
    """Let every site's fused call run ``change(output)``, and only that: native stays right."""

    def swap_with_fault(model, backend=None):
        fast = swap(model, backend=backend)
        module = list(sites(fast))[3][1]
        module.register_forward_hook(lambda _, args, output: change(output))
        return fast

    monkeypatch.setattr(comparing, "swap", swap_with_fault)


# ---- the comparison ----


def test_a_row_a_batch_and_a_layer_a_site(tiny, result):
    assert [row["batch"] for row in result["rows"]] == [1, 3]
    names = [path for path, _ in sites(swap(tiny.model))]
    assert [layer["layer"] for layer in result["layers"]] == names
    assert {layer["batch"] for layer in result["layers"]} == {1}


def test_answers_of_the_real_kernels_agree(result):
    assert failures(result) == []
    assert all(row["answers"]["top5_same"] == row["batch"] for row in result["rows"])


def test_speed_up_is_against_the_faster_native(result):
    for row in result["rows"] + result["layers"]:
        natives = ("native", "native_channels_last")
        best = min(natives, key=lambda way: row["time_ms"][way]["median"])
        assert row["best_native"] == best
        assert row["speedup"]["p20"] <= row["speedup"]["median"] <= row["speedup"]["p80"]


def test_the_result_is_json_by_its_schema(result):
    again = json.loads(json.dumps(result, allow_nan=False))
    assert again["schema"] == 1
    assert again.keys() == {"schema", "environment", "rows", "layers"}
    common = {"model", "batch", "error", "ok", "time_ms", "best_native", "speedup"}
    assert all(common <= row.keys() for row in again["rows"] + again["layers"])
    assert {"size", "dtype", "layout", "weights", "answers", "fused"} <= again["rows"][0].keys()
    assert {"layer", "pattern", "backend", "input", "output"} <= again["layers"][0].keys()


def test_progress_only_grows_and_stays_within_one(tiny):
    told: list[float] = []
    compare([tiny], QUICK, notify=lambda text, fraction: told.append(fraction))
    assert told == sorted(told)
    assert told[0] == 0.0
    assert told[-1] <= 1.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes(tiny, dtype):
    result = compare([tiny], Settings(rounds=1, batches=(2,), dtype=dtype))
    assert failures(result) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: y + 1e-3 * y.abs().max(), "swapped is off by "),
        (lambda y: y.flip(1), "swapped is off by "),
        (lambda y: torch.full_like(y, math.nan), "swapped is off by not finite"),
    ],
    ids=["a shift of one in a thousand", "channels in the wrong order", "NaN"],
)
def test_a_planted_fault_fails_and_names_its_layer(monkeypatch, tiny, change, words):
    plant(monkeypatch, change)
    result = compare([tiny], QUICK)
    faulty = [layer["layer"] for layer in result["layers"] if not layer["ok"]]
    assert faulty == [list(sites(swap(tiny.model)))[3][0]]
    assert not result["rows"][0]["ok"]
    first, last = failures(result)
    assert first.startswith(f"{TINY}, batch 2: {words}")
    assert f"layer {faulty[0]}" in last
    json.dumps(result, allow_nan=False)


def test_a_planted_slowdown_shows(monkeypatch, tiny):
    plant(monkeypatch, lambda y: time.sleep(0.05) or y)
    result = compare([tiny], Settings(rounds=3))
    assert result["rows"][0]["speedup"]["median"] < 0.9


def test_tolerance_has_a_floor_and_follows_native():
    assert tolerance(0.0, 1, "float32") == pytest.approx(17 * 2**-23)
    assert tolerance(0.0, 4, "bfloat16") == pytest.approx(2 * 2**-7, rel=1e-3)
    assert tolerance(0.0, 1, "float64") == pytest.approx(17 * 2**-52)
    assert tolerance(1e-3, 1, "float32") == 2e-3


def test_a_dead_network_is_refused(tiny):
    dead = Subject("dead", nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), 32, "zero", False)
    nn.init.zeros_(dead.model[1].weight)
    nn.init.zeros_(dead.model[1].bias)
    with pytest.raises(InputError, match="constant or not finite"):
        compare([dead], QUICK)


def test_a_model_that_does_not_classify_is_refused():
    maps = Subject("maps", nn.Conv2d(3, 4, 3), 32, "random", False)
    with pytest.raises(InputError, match=r"model maps: expected class scores \(N, classes\)"):
        compare([maps], QUICK)


# ---- what it runs on ----


def test_random_networks_stay_alive_in_every_layer(tiny):
    outputs = []
    hooks = [
        module.register_forward_hook(lambda _, args, y: outputs.append(y))
        for module in tiny.model.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        tiny.model(data.synthetic_images(4, 32, seed=1))
    for hook in hooks:
        hook.remove()
    assert len(outputs) == 27
    assert all(0.3 < float(y.std()) < 3 for y in outputs)


def test_the_same_seed_gives_the_same_network(tiny):
    again = subject(TINY).model.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in tiny.model.state_dict().items())


def test_preprocessing_is_torchvisions():
    torchvision = pytest.importorskip("torchvision")
    transforms = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    for photograph in data.demo_photographs():
        ours = data.preprocess([photograph.image], 224)[0]
        assert torch.allclose(ours, transforms(photograph.image), atol=1e-6)


def test_every_photograph_is_seen_whatever_the_batch(tiny):
    photographs = data.demo_photographs()
    result = compare([tiny], QUICK, photographs)
    assert result["rows"][0]["answers"]["images"] == len(photographs) == 5


def test_the_trained_network_sees_a_cat_and_an_espresso():
    if subjects.find_mobilenet_v2_weights() is None:
        pytest.skip(f"{subjects.MOBILENET_V2_FILE} is not here")
    photographs = [p for p in data.demo_photographs() if p.name in ("chelsea", "coffee")]
    row = compare([subject("mobilenet_v2")], QUICK, photographs)["rows"][0]
    for way in ("native", "swapped"):
        best = {told["photograph"]: told[way][0]["label"] for told in row["photographs"]}
        assert best == {"chelsea": "Egyptian cat", "coffee": "espresso"}


@pytest.mark.parametrize("name", ["weights.pth", "mobilenet_v2-b0353104.pth"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut off"])
def test_broken_weights_name_file_expected_and_actual(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    expected = "a sha256 that begins with b0353104, got" if "b0353104" in name else "a PyTorch"
    with pytest.raises(InputError) as error:
        subjects.read_weights(path)
    assert str(error.value).startswith(f"weights {path}: expected {expected}")
    assert f"a file of {len(content)} bytes" in str(error.value)


def test_truncated_weights_are_refused(tmp_path, tiny):
    path = tmp_path / "weights.pth"
    torch.save(tiny.model.state_dict(), path)
    subjects.load_weights(tiny.model, path, TINY)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="expected a PyTorch state dict, got a file of"):
        subjects.load_weights(tiny.model, path, TINY)


def test_weights_of_another_model_name_the_first_difference(tmp_path, tiny):
    path = tmp_path / "weights.pth"
    torch.save({**tiny.model.state_dict(), "conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(
        InputError, match=r"whose conv1.weight is \(8, 3, 3, 3\); the file has \(1,\)"
    ):
        subjects.load_weights(tiny.model, path, TINY)


# ---- the report ----


def page_of(result) -> str:
    return report.render(report.of("comparison", result))


def test_the_report_has_every_network_and_layer(result):
    text = page_of(result)
    Page(text)
    assert "The answers are the same" in text
    table = text[text.index('id="rows"') :]
    rows = result["rows"] + result["layers"]
    assert table[: table.index("</table>")].count("<tr>") == 1 + len(rows)
    assert "conv_dw_13" in table


def test_the_report_shows_photographs_and_escapes_names(monkeypatch):
    fake = {"label": "cat & <b>mouse</b>", "probability": 0.5}
    entry = {"photograph": "<img>", "native": [fake], "swapped": [fake]}
    monkeypatch.setattr(comparing, "_labels", lambda outputs, photographs: [entry])
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    image = data.demo_photographs()[0].image
    fed = Subject("linear", model, 8, "random", trained=True)
    text = page_of(compare([fed], QUICK, [Photograph("<img>", image)]))
    assert "&lt;img&gt;" in text
    assert "cat &amp; &lt;b&gt;mouse&lt;/b&gt; 50.0%" in text


def test_the_report_says_when_answers_differ(result):
    wrong = json.loads(json.dumps(result))
    wrong["rows"][0] |= {"ok": False}
    wrong["rows"][0]["error"]["swapped"] = None
    text = page_of(wrong)
    assert "The answers differ: 1 of" in text
    assert re.search(r'<td class="number slower" data-value="inf">not finite</td>', text)


def test_times_wait_for_the_device_that_was_asked_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    settings = Settings(device="cuda:1", rounds=1, budget_s=0.01)
    comparing._speed(dict.fromkeys(comparing.WAYS, lambda: None), settings)
    assert set(waited) == {"cuda:1"}
