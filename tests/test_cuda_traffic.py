"""Memory traffic of the CUDA kernels, counted in emulation (tests/emulation/traffic.py): against
the committed table, and the goals for what the heuristic chooses at batch 256."""

from __future__ import annotations

import functools

import pytest
from emulation import traffic


@functools.cache
def counted() -> list[traffic.Row]:
    return traffic.table()


def name(row: traffic.Row) -> str:
    return " ".join(str(row[key]) for key in traffic.KEYS)


def test_no_variant_moves_more_than_committed():
    committed = {name(row): row for row in traffic.committed()}
    here = {name(row): row for row in counted()}
    assert here.keys() == committed.keys(), "renew the table: see tests/emulation/traffic.py"
    worse = [
        f"{key}: {ratio} {committed[key][ratio]} -> {row[ratio]:.3f}"
        for key, row in here.items()
        for ratio in traffic.RATIOS
        if row[ratio] > 1.01 * committed[key][ratio] + 0.001
    ]
    assert not worse, "\n".join(worse)


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_goals_of_the_chosen_variants(layout):
    """What reaches the L2 cache is at most 1.3 times the input, in whole sectors for
    channels_last; shared memory has no conflict above two-way. The general kernel is not built for
    speed."""
    chosen = [row for row in counted() if row["chosen"] and row["layout"] == layout]
    assert len(chosen) == len(traffic.layers()) * len(traffic.DTYPES) * (1 + len(traffic.PASSES))
    if layout == "nhwc":
        assert all(row["x_sectors"] == 1 and row["y_sectors"] in (0, 1) for row in chosen)
        assert not any(row["variant"] == "general" for row in chosen)
    for row in chosen:
        if row["variant"] == "general":
            continue
        assert row["stride"] == "2" or row["past_l1"] <= 1.3, name(row)
        assert row["ways"] <= 2, name(row)


def test_training_moves_five_tensors_not_seven():
    """The backward of channels_last layers, beside what three steps would move: the sums, dconv
    with the weight's sums, dx of dconv. Of stride 2, x is four of y's size."""
    layers: dict[tuple, dict[str, float]] = {}
    for row in counted():
        if row["layout"] == "nhwc":
            layer = tuple(row[key] for key in traffic.KEYS[:7])
            layers.setdefault(layer, {})[row["variant"]] = row["tensors"]
    for layer, moved in layers.items():
        x = 1 if layer[-1] == "1" else 4
        dx = 1 + x  # at least
        one = moved["backward_reduction"] + moved["one_pass_through"]
        assert one <= 1.08 * (3 * x + 2), (layer, one)
        three = moved["backward_reduction"] + moved["backward_through"] + dx
        assert three - one >= 0.95 * 2, (layer, three, one)
        assert moved["one_pass_frozen"] <= 1.08 * (2 * x + 1), (layer, moved)
        assert moved["backward_frozen"] + dx - moved["one_pass_frozen"] >= 0.95 * 2, (layer, moved)
