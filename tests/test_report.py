"""The report: what it reads, what it leaves out and says so, and that its page is sound."""

import json
import re
from pathlib import Path

import pytest
import report_samples as samples
from report_samples import Page

from mnet_kernels import cli, report
from mnet_kernels.report import drawing, figures, tables, words
from mnet_kernels.report.drawing import Axis, Mark
from mnet_kernels.report.rows import Spread, verdict_of

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    """A folder with a result of every kind that one machine can have, and two runs."""
    (tmp_path / "cpu.json").write_text(json.dumps(samples.full_bench()))
    (tmp_path / "tradeoff.json").write_text(json.dumps(samples.tradeoff()))
    for name in ("native", "swap"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(samples.metrics())
    return tmp_path


@pytest.fixture
def page(folder):
    return report.render(report.read([folder]))


# ---- the page ----


def test_the_page_needs_nothing_else(page):
    parsed = Page(page)
    assert parsed.fetched == []
    assert all(link.startswith("#") for link in parsed.links)
    assert not any(w in page for w in ("http:", "https:", "@import", "url(", "<script src"))


def test_links_lead_somewhere_and_ids_are_unique(page):
    parsed = Page(page)
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert {link[1:] for link in parsed.links} <= set(parsed.ids)


def test_every_picture_says_what_it_shows(page):
    pictures = Page(page).pictures
    assert len(pictures) > 10
    for picture in pictures:
        assert picture["role"] == "img"
        assert len(picture["aria-label"]) > 20
        assert picture["children"] == ["title", "desc"]


def test_every_section_is_there(page):
    headings = Page(page).headings
    for words_of in ("Networks", "Training", "Layers", "Depthwise + pointwise pairs",
                     "How far from the limit", "Accuracy against float64", "Training curves",
                     "Trade-off", "Every row", "Measured on"):  # fmt: skip
        assert words_of in headings


def test_every_row_is_in_the_table_and_losses_say_so(page):
    count = len(samples.full_bench()["benchmarks"])
    table = page[page.index('id="rows"') :]
    table = table[: table.index("</table>")]
    assert table.count("<tr>") == 1 + count
    assert table.count("we lose") == 7  # a layer of each of six groups, and a network
    assert table.count(" noise<") == 6
    assert "openvino: not installed" in table
    assert "Against PyTorch" in table


def test_the_summary_counts_losses(folder):
    said = words.summary(report.read([folder]))
    assert "6 of 18 are faster, 6 within noise, 6 slower (the worst, 72 · 56² · 5x5 s2" in said[1]
    assert "In the other layout (contiguous) 12 of 18 are slower" in said[1]
    assert "Against PyTorch alone: 3.63 times, 18 of 18 faster" in said[1]
    assert "against the fastest engine (onnxruntime): 1.21 times, 6 of 18 faster" in said[1]
    assert any(s.startswith("The run swap reached 99") for s in said)


def test_tables_can_be_sorted_by_keyboard(page):
    sorts = Page(page).sorts
    assert len(sorts) > 20
    assert set(sorts) == {"none"}
    assert page.count('<button type="button">') == len(sorts)


def test_names_are_escaped(folder):
    hostile = samples.bench(samples.benchmark("network", 5.0, 9.0, model="<img src=x>"))
    (folder / "hostile.json").write_text(json.dumps(hostile))
    text = report.render(report.read([folder]), title="<b>title</b>")
    assert "<img src" not in text
    assert "&lt;img src=x&gt;" in text
    assert "<b>title" not in text


def test_the_committed_results_make_a_page():
    evidence = report.read([ROOT / "benchmarks/results"])
    assert evidence.rows
    Page(report.render(evidence))


def test_gpu_results_have_a_row_a_layout():
    evidence = report.of("gpu.json", samples.gpu())
    layers = [row for row in evidence.rows if row.kind == "layer"]
    assert [row.facets["layout"] for row in layers] == ["channels_last", "contiguous"]
    assert [row.speedup.median for row in layers] == [4.0, 2.5]
    calls, graphs = (row for row in evidence.rows if row.kind == "network")
    assert calls.speedup.median == graphs.speedup.median == 2.0
    assert calls.others == {"contiguous": 1.5}
    assert graphs.name.endswith("CUDA graph")
    assert "A GPU" in report.render(evidence)


def test_results_of_older_versions_lack_keys():
    old = samples.full_bench()
    for benchmark in old["benchmarks"]:
        for key in (
            "threads", "cache", "direction", "layout", "missing_peers", "speedup_torch",
            "best_torch", "speedup_engine", "best_engine",
        ):  # fmt: skip
            benchmark["extra_info"].pop(key, None)
    del old["machine_info"]["mnet_kernels"]["ceilings"]
    evidence = report.of("old.json", old)
    assert len(evidence.rows) == len(old["benchmarks"])
    assert "copy in memory" in report.render(evidence) or "copy in cache" in report.render(evidence)


# ---- what cannot be used ----

GOOD = json.dumps(samples.full_bench())
LEFT_OUT = [
    ("cut.json", GOOD[: len(GOOD) // 2], "truncated, or no JSON"),
    ("empty.json", "", "truncated, or no JSON"),
    ("list.json", "[1, 2]", "expected a result of mnet_kernels, got other JSON"),
    ("other.json", '{"a": 1}', "expected a result of mnet_kernels (bench, gpu, compare"),
    ("deep.json", "[" * 100_000, "truncated, or no JSON"),
    ("none.json", json.dumps(samples.bench()), "it has no rows"),
    (
        "foreign.json",
        json.dumps({"machine_info": {}, "benchmarks": []}),
        "got pytest-benchmark's of another",
    ),
    (
        "old.json",
        json.dumps(samples.bench(samples.benchmark("layer", 1, 2), mnet_kernels="0.0.1")),
        "it is of mnet_kernels 0.0.1, this is",
    ),
    (
        "elsewhere.json",
        json.dumps(samples.bench(samples.benchmark("layer", 1, 2), cpu="Another one")),
        "it is of another machine: cpu Another one, cpu.json has A processor",
    ),
    (
        "schema.json",
        json.dumps(samples.tradeoff() | {"schema": 2}),
        "expected schema 1, got 2",
    ),
    (
        "text.json",
        json.dumps(samples.bench(samples.benchmark("layer", 1, 2, us={"ours": "fast"}))),
        "row test[layer-1] cannot be read",
    ),
    (
        "negative.json",
        json.dumps(samples.bench(samples.benchmark("layer", 1, 2, speedup=samples.spread(-1)))),
        "expected positive numbers",
    ),
    (
        "peer.json",
        json.dumps(samples.bench(samples.benchmark("layer", 1, 2, best_peer="nobody"))),
        "its best peer 'nobody' was not timed",
    ),
    ("half/metrics.csv", samples.metrics()[:-20], "truncated: line 21: expected 7 numbers"),
    ("bare/metrics.csv", samples.metrics().splitlines()[0], "it has no epochs"),
    ("any/metrics.csv", "a,b\n1,2\n", "expected a metrics.csv of mnet-kernels train"),
]


@pytest.mark.parametrize(("name", "text", "reason"), LEFT_OUT, ids=[n for n, *_ in LEFT_OUT])
def test_what_cannot_be_used_is_named_and_left_out(tmp_path, name, text, reason):
    (tmp_path / "cpu.json").write_text(GOOD)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    evidence = report.read([tmp_path / "cpu.json", tmp_path / name])
    assert len(evidence.rows) == len(samples.full_bench()["benchmarks"])
    assert len(evidence.skipped) == 1
    assert name in evidence.skipped[0]
    assert reason in evidence.skipped[0]
    page = report.render(evidence)
    assert "Left out:" in page
    assert name in page


def leaves(value, path=()):
    """Paths of everything inside of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from leaves(inner, (*path, key))


SMALL = {
    "bench": samples.bench(samples.benchmark("layer", 5, 9), ceilings=samples.CEILINGS),
    "network": samples.bench(samples.benchmark("network", 5, 9)),
    "comparison": samples.comparison(),
    "tradeoff": samples.tradeoff() | {"rows": samples.tradeoff()["rows"][:1]},
    "gpu": samples.gpu(),
}


@pytest.mark.parametrize("kind", SMALL)
def test_whatever_is_wrong_in_a_result_it_is_left_out_or_shown(kind):
    """Every value in turn missing, of another type, or out of range."""
    left_out = 0
    for path in leaves(SMALL[kind]):
        for wrong in (None, "x", -1, {}):
            result = json.loads(json.dumps(SMALL[kind]))
            inside = result
            for key in path[:-1]:
                inside = inside[key]
            inside[path[-1]] = wrong
            try:
                evidence = report.of("result.json", result)
            except ValueError as error:
                assert "\n" not in str(error), (path, wrong)
                left_out += 1
                continue
            try:
                report.render(evidence)
            except Exception as error:
                raise AssertionError(f"{path} = {wrong!r}") from error
    assert left_out > 20


def test_a_file_is_read_once(folder):
    once = report.read([folder])
    assert len(report.read([folder, folder / "cpu.json", folder]).rows) == len(once.rows)


def test_bytes_that_are_no_text_are_left_out(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    assert "no text" in report.read([tmp_path]).skipped[0]


# ---- the command ----


def test_the_command_writes_the_page_and_names_what_it_leaves_out(folder, capsys):
    (folder / "cut.json").write_text(GOOD[:100])
    page = folder / "page.html"
    assert cli.main(["report", str(folder), "-o", str(page)]) == 0
    output, error = capsys.readouterr()
    assert f"Report: {page}" in output
    assert "Whole networks: " in output
    assert "Left out: " in error
    assert "cut.json" in error
    assert page.read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("report", "Missing argument 'PATH...'"),
        ("report {tmp}/none.json", "does not exist"),
        ("report {tmp}/cpu.json -o {tmp}/none/x.html", "none/x.html: no such directory"),
        ("report {tmp}/cpu.json -o {tmp}", "expected a file to write, got the directory"),
        ("report {tmp}/empty", "there is nothing to report"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, line, reason):
    (folder / "empty").mkdir()
    assert cli.main([word.format(tmp=folder) for word in line.split()]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("mnet-kernels: error: ")
    assert reason in error[-1]


def test_a_full_disk_is_one_line(folder, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    assert cli.main(["report", str(folder), "-o", "/dev/full"]) == 2
    assert "/dev/full cannot be written: No space left" in capsys.readouterr().err


# ---- how it is drawn ----


@pytest.mark.parametrize(
    ("axis", "texts"),
    [
        (Axis(0, 16), ["0", "5", "10", "15"]),
        (Axis(0.4, 5, log=True), ["0.5", "1", "2", "5"]),
        (Axis(1e-8, 1e-2, log=True), ["1e-8", "1e-6", "1e-4", "0.01"]),
        (Axis(90, 4000, log=True), ["100", "300", "1,000", "3,000"]),
    ],
)
def test_ticks_are_round_and_few(axis, texts):
    assert [text for _, text in axis.ticks(4)] == texts


def test_an_axis_is_exact_at_its_ends():
    for axis in (Axis(3, 7), Axis(0.3, 70, log=True)):
        assert axis.at(axis.low) == pytest.approx(0)
        assert axis.at(axis.high) == pytest.approx(1)
    assert Axis(1, 100, log=True).at(10) == pytest.approx(0.5)


def test_labels_never_cover_each_other():
    marks = [Mark(1 + i % 3 / 50, 1 + i / 100, "ours", "tip", label=f"label {i}") for i in range(9)]
    axes = Axis(0, 2), Axis(0, 2)
    drawn = drawing.plot(370, 300, *axes, "x", "y", marks=marks)
    boxes = []
    for text in [s for s in drawn.shapes if s["kind"] == "text" and s["css"] == "label"]:
        x, y, wide = float(text["x"]), float(text["y"]), drawing.text_width(text["text"])
        x -= {"start": 0, "middle": wide / 2, "end": wide}[text["anchor"]]
        boxes.append((x, y - 11, x + wide, y + 3))
    assert 0 < len(boxes) < len(marks)
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_bars_of_losses_point_the_other_way():
    evidence = report.of("cpu.json", samples.bench(
        samples.benchmark("layer", 10.0, 20.0), samples.benchmark("layer", 10.0, 5.0)))  # fmt: skip
    (figure,) = figures.speedups(evidence.rows)
    rects = {s["css"]: s for s in figure.drawings[0].shapes if s["kind"] == "rect"}
    base = next(s for s in figure.drawings[0].shapes if s["css"] == "base")
    win, loss, at_1 = rects["faster"], rects["slower"], float(base["x1"])
    assert float(win["x"]) == pytest.approx(at_1, abs=0.2)
    assert float(loss["x"]) + float(loss["width"]) == pytest.approx(at_1, abs=0.2)
    assert float(win["width"]) == pytest.approx(float(loss["width"]), abs=0.3)  # 2 and 1/2


def test_a_win_needs_four_fifths_of_the_rounds():
    assert verdict_of(Spread(1.2, 1.01, 1.4)) == "faster"
    assert verdict_of(Spread(1.2, 0.99, 1.4)) == "noise"
    assert verdict_of(Spread(0.9, 0.8, 1.01)) == "noise"
    assert verdict_of(Spread(0.9, 0.8, 0.99)) == "slower"


def test_the_roofline_has_every_way_of_every_layer():
    evidence = report.of("cpu.json", samples.full_bench())
    (figure,) = figures.roofline(evidence.rows, evidence.environments)
    marks = [s for s in figure.drawings[0].shapes if s["kind"] == "mark"]
    assert len(marks) == 19 * 4  # layers and the pair; ours in two layouts, two peers
    texts = [s["text"] for s in figure.drawings[0].shapes if s["kind"] == "text"]
    assert any("copy in memory, 20 GB/s" in text for text in texts)


def test_the_pareto_front():
    points = [(1, 50), (2, 60), (3, 55), (4, 70), (4, 65), (5, 70)]
    assert figures.pareto(points) == [(1, 50), (2, 60), (4, 70)]


def test_markdown_has_every_cell():
    text = tables.markdown(tables.tradeoff(samples.tradeoff()))
    lines = text.splitlines()
    assert len(lines) == 2 + 4
    assert len({line.count("|") for line in lines}) == 1
    assert "70.9% published" in text
    assert re.search(r"\| 569 M \|", text)
