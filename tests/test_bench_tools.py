"""bench-compare and the tables, on results made up here: a planted slowdown must show, and noise, a
slower machine or a bad file must not."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import compare_results  # noqa: E402
import result_files  # noqa: E402
import tables  # noqa: E402
from shapes import shapes  # noqa: E402


def summary(median: float, spread: float) -> dict[str, float]:
    return {"median": median, "p20": median * (1 - spread), "p80": median * (1 + spread)}


def row(ours: float, peer: float = 200.0, engine: float = 50.0, spread: float = 0.02, **facts):
    """A layer's row; times in microseconds."""
    made = {
        "kind": "layer", "model": "mobilenet_v1", "shape": [32, 112, 112, 3, 1], "batch": 1,
        "dtype": "float32", "layout": "channels_last", "threads": 2, "cache": "warm",
        "us": {
            "ours": summary(ours, spread), "folded": summary(peer, spread),
            "OpenVINO": summary(engine, spread), "copy": summary(20.0, spread),
        },
        "best_torch": "folded", "speedup_torch": summary(peer / ours, spread),
        "best_engine": "OpenVINO", "speedup_engine": summary(engine / ours, spread),
        "error": {"ours": 1e-7, "folded": 1e-7, "OpenVINO": 1e-7},
        "missing_peers": {"ncnn": "ncnn is not installed"}, "fraction_of_copy": 0.4,
    }  # fmt: skip
    best = "torch" if peer < engine else "engine"
    made["best_peer"], made["speedup"] = made[f"best_{best}"], made[f"speedup_{best}"]
    return made | facts


def result(*rows, **environment):
    facts = {
        "format": result_files.FORMAT, "cpu": "a CPU", "instruction_set": "avx2", "threads": 2,
        "malloc": {}, "commit": "abc1234", "date": "2026-01-02", "torch": "2.14.1",
        "peers": {"OpenVINO": "2026.4.1", "ncnn": None},
    }  # fmt: skip
    return {
        "machine_info": {"mnet_kernels": facts | environment},
        "benchmarks": [{"extra_info": r} for r in rows],
    }


@pytest.fixture
def write(tmp_path):
    def write(name: str, content) -> str:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("new", "status", "verdict"),
    [
        (row(100.0), 0, "noise"),
        (row(120.0), 1, "slower"),
        (row(80.0), 0, "faster"),
        (row(104.0, spread=0.001), 0, "noise"),  # certain, and too little to care
        (row(120.0, spread=0.3), 0, "noise"),  # much, and not certain
        (row(150.0, peer=300.0, engine=75.0), 0, "noise"),  # the machine got slower, not we
        (row(100.0, peer=150.0, engine=37.5), 1, "slower"),  # hidden by a faster machine
    ],
)
def test_slowdowns_are_told_from_noise(write, capsys, new, status, verdict):
    files = write("base.json", result(row(100.0))), write("new.json", result(new))
    assert compare_results.main([*files, "--verbose"]) == status
    assert capsys.readouterr().out.splitlines()[1].split()[0] == verdict


def test_rows_are_compared_with_their_like(write, capsys):
    kinds = [{"batch": 16}, {"dtype": "bfloat16"}, {"threads": 1}, {"cache": "cold"}]
    base = result(row(100.0), *(row(900.0, **kind) for kind in kinds), row(1.0, model="gone"))
    new = result(*(row(900.0, **kind) for kind in reversed(kinds)), row(100.0))
    assert compare_results.main([write("b.json", base), write("n.json", new)]) == 0
    assert "5 rows in both" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps(result(row(100.0)))[:-40], "not JSON, or cut short"),
        ("[]", "not a result of `make bench`"),
        (result(row(100.0), format=1), "expected format 2, got 1"),
        (result({k: v for k, v in row(1.0).items() if k != "us"}), "a row has no us"),
        (result(row(100.0), cpu="another CPU"), "another machine: cpu was a CPU, is another CPU"),
        (result(row(100.0), malloc={"MALLOC_MMAP_MAX_": "0"}), "measured with tuned malloc"),
        (result(row(100.0, batch=7)), "no row in common"),
    ],
)
def test_a_bad_file_is_named_and_left_out(write, capsys, content, words):
    base, bad = write("base.json", result(row(100.0))), write("bad.json", content)
    good = write("good.json", result(row(101.0)))
    assert compare_results.main([base, bad]) == 2
    assert compare_results.main([base, bad, good]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1]
    assert bad in lines[0] and words in lines[0]


def test_a_base_that_is_not_there_is_one_line(capsys, tmp_path):
    assert compare_results.main([str(tmp_path / "gone.json"), "x.json"]) == 2
    assert "gone.json: cannot be read" in capsys.readouterr().err


def test_tables_keep_pytorch_and_engines_apart_and_show_losses(write):
    network = row(8000.0, 12000.0, 6000.0, kind="network", size=224, fraction_of_matrix=0.75)
    del network["shape"]
    network["us"]["ours channels_last"] = summary(1.0, 0.0)  # not what the speed-ups are of
    rows = [row(100.0), row(90.0, shape=[64, 112, 112, 3, 2], dtype="bfloat16"), network]
    rows.append(row(100.0, 103.0, 100.5, spread=0.05, shape=[9, 9, 9, 3, 1]))
    text = tables.render([Path(write("cpu.json", result(*rows)))])
    assert (
        "| mobilenet_v1, 224, b1, f32, 2 threads | 12 | 6 | 8 | 75% | 1.50x | **0.75x** |" in text
    )
    assert "| 32, 112, 1 | 200.0 | 50.0 | 100.0 | 40% | 2.00x | **0.50x** | - |" in text
    assert "1.03x~ | 1.00x~ |" in text
    assert "| **2** of 3 |" in text  # two layers lost, one within noise
    assert "OpenVINO 2026.4.1" in text and "ncnn None" not in text


def test_tables_leave_a_bad_file_out(write, capsys):
    good, bad = write("good.json", result(row(100.0))), write("bad.json", "{")
    assert tables.main([good, bad]) == 0
    told = capsys.readouterr()
    assert "left out" in told.err and bad in told.err and "| 32, 112, 1 |" in told.out
    assert tables.main([bad]) == 2


def test_tables_replace_the_marked_part_only(write):
    page = write("page.md", "a\n<!-- measured: begin -->\nstale\n<!-- measured: end -->\nb\n")
    good = write("good.json", result(row(100.0)))
    assert tables.main([good, "--write", page]) == 0
    text = Path(page).read_text()
    assert text.startswith("a\n<!--") and text.endswith("<!-- measured: end -->\nb\n")
    assert "stale" not in text and "| 32, 112, 1 |" in text
    assert tables.main([good, "--write", write("bare.md", "nothing here")]) == 2


@pytest.mark.parametrize("model", ["mobilenet_v2", "mobilenet_v3_large", "convnext_tiny"])
def test_shape_files_are_the_networks_layers(model):
    import torch
    import torchvision

    with torch.device("meta"):
        network = getattr(torchvision.models, model)().eval()
    found: dict[tuple[int, ...], int] = {}

    def note(conv, args, _):
        key = (*args[0].shape[1:], conv.kernel_size[0], conv.stride[0])
        found[key] = found.get(key, 0) + 1

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups > 1:
            module.register_forward_hook(note)
    network(torch.empty(1, 3, 224, 224, device="meta"))
    kernel = 5 if model == "mobilenet_v3_large" else None
    expected = [(*key, n) for key, n in found.items() if kernel in (None, key[3])]
    assert shapes(model) == expected
