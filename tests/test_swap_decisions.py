"""swap: memory formats, measured and saved decisions, the table of explain."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from networks import (
    assert_same,
    dw_bn,
    fused,
    hooked,
    image,
    network,
    two_layers,
)
from torch import nn

from mnet_kernels import backends, ops
from mnet_kernels.nn.server import _found
from mnet_kernels.swap import decisions, explain, swap

# --- layout ---------------------------------------------------------------------------------


def layouts_freed(forward, **children):
    model = network(forward, stem=dw_bn(groups=1, act=nn.ReLU()), **children)
    fast = swap(model)
    assert_same(model, fast, image(2, 8, 6, 6))
    return fused(fast)["stem.0"].free_layout


def test_layout_is_free_where_nobody_sees_it():
    pool = nn.AdaptiveAvgPool2d(1)
    assert layouts_freed(lambda self, x: self.pool(self.stem(x)).flatten(1), pool=pool)
    assert layouts_freed(lambda self, x: torch.flatten(self.stem(x), 1))
    assert layouts_freed(lambda self, x: self.stem(x).mean([2, 3]))
    assert layouts_freed(
        lambda self, x: (y := self.stem(x), y * y.mean((2, 3), True))[1].mean((2, 3))
    )
    assert layouts_freed(lambda self, x: torch.cat([self.stem(x), x], 1).sigmoid().mean((-1, -2)))
    assert layouts_freed(lambda self, x: F.max_pool2d(F.gelu(self.stem(x)), 2).flatten(1))
    assert layouts_freed(lambda self, x: self.stem(x)[:, 2:, ::2].mean((2, 3)))
    assert layouts_freed(lambda self, x: torch.cat(self.stem(x).chunk(2, 1)[::-1], 1).flatten(1))


class ViewingConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.view(len(x), -1).view(x.shape))


def test_layout_is_kept_where_somebody_might():
    viewing = ViewingConv(8, 8, 1)
    assert not layouts_freed(lambda self, x: self.other(self.stem(x)).flatten(1), other=viewing)
    assert not layouts_freed(lambda self, x: self.stem(x).flatten(end_dim=1))
    assert not layouts_freed(lambda self, x: self.stem(x).mean([x.dim() - 1, 2]).view(2, -1))
    assert not layouts_freed(lambda self, x: self.stem(x).mean(1, keepdim=True).view(2, -1))
    assert not layouts_freed(lambda self, x: self.stem(x))
    assert not layouts_freed(lambda self, x: self.stem(x).view(2, -1))
    assert not layouts_freed(lambda self, x: self.stem(x).flatten(2))
    assert not layouts_freed(lambda self, x: self.stem(x).sigmoid().view(2, -1))
    assert not layouts_freed(
        lambda self, x: (y := self.stem(x)).mean((2, 3)) + y.view(2, 8, -1)[:, :, 0]
    )
    assert not layouts_freed(lambda self, x: self.stem(x)[:, 2:].reshape(-1).view(2, -1))
    assert not layouts_freed(lambda self, x: self.stem(x)[:, 0].transpose(1, 2))
    assert not layouts_freed(lambda self, x: self.stem(x).as_strided((2, 3), (3, 1)))
    assert not layouts_freed(
        lambda self, x: self.other(self.stem(x)).flatten(1), other=hooked(nn.ReLU())
    )


def test_dense_site_runs_in_channels_last():
    model = nn.Sequential(dw_bn(groups=1), nn.Flatten()).eval()
    fast = swap(model)
    seen = []
    fast[0].register_forward_hook(lambda module, args, y: seen.append(y))
    fast(image(2, 8, 6, 6))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


# --- decisions and the table ----------------------------------------------------------------


def test_measured_decisions(monkeypatch, tmp_path):
    model = two_layers()
    times = iter([(1.0, 2.0), (3.0, 1.0)])
    monkeypatch.setattr(
        decisions, "_race", lambda ways, x: dict(zip(ways, next(times), strict=True))
    )
    x = image(2, 8, 6, 6)
    fast = swap(model.train(), example_inputs=x).eval()
    assert model.training and next(times, None) is None
    assert [row.reason for row in explain(fast).rows] == ["left native: measured 0.50x", ""]
    assert [row.backend for row in explain(fast).rows] == ["native", "folded"]
    assert_same(model.eval(), fast, x)
    explain(fast).save(tmp_path / "decisions.json")
    again = swap(model, decisions=tmp_path / "decisions.json")
    assert explain(again).rows == explain(fast).rows


@pytest.fixture
def _choices_forgotten():
    yield
    _found.cache_clear()


@pytest.mark.usefixtures("_choices_forgotten")
def test_the_fastest_of_several_backends_is_chosen(monkeypatch, tmp_path):
    """Where two can serve, as cuda and triton on a GPU: here triton is let on the CPU."""
    served = []

    def triton(*args):
        served.append("triton")
        return ops._dwconv_bn_act(*args)

    monkeypatch.setitem(backends._PREDICATES, "triton", lambda device, dtype: None)
    monkeypatch.setattr(backends, "triton_operator", lambda name: triton)
    times = {"native": 3.0, "cpu": 2.0, "triton": 1.0}

    def race(ways, x):
        for call in ways.values():
            call(x)
        return {name: times.get(name, 1.0) for name in ways}

    monkeypatch.setattr(decisions, "_race", race)
    model, x = two_layers(), image(2, 8, 6, 6)
    fast = swap(model, example_inputs=x)
    row = explain(fast).rows[0]
    assert (row.backend, row.reason) == ("triton", "measured faster than the usual backend")
    del served[:]
    assert_same(model, fast, x)
    assert served == ["triton"]
    explain(fast).save(tmp_path / "decisions.json")
    assert explain(swap(model, decisions=tmp_path / "decisions.json")).rows == explain(fast).rows
    assert explain(swap(model, "cpu", example_inputs=x)).rows[0].backend == "cpu"
    times["native"] = 0.5
    assert explain(swap(model, example_inputs=x)).rows[0].reason == "left native: measured 0.50x"


def test_measuring_for_real_changes_nothing_else():
    model = two_layers()
    before = copy.deepcopy(model.state_dict())
    fast = swap(model, example_inputs=(image(2, 8, 6, 6),))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(module._forward_pre_hooks for module in fast.modules())
    assert_same(model, fast, image(2, 8, 6, 6))


GOOD = {
    "0.0": {"pattern": "conv_dw 3x3 + bn + relu6", "native": None},
    "1.0": {"pattern": "conv 3x3 + bn", "native": "slow"},
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        ([], "expected an object, got list"),
        ({}, "the model has site '0.0', the other has not"),
        ({**GOOD, "x": GOOD["0.0"]}, "the file has site 'x', the other has not"),
        ({**GOOD, "0.0": None}, """site '0.0': expected "pattern" and "native", got None"""),
        ({**GOOD, "0.0": {"pattern": "conv"}}, "site '0.0': expected"),
        ({**GOOD, "0.0": GOOD["1.0"]}, "expected 'conv_dw 3x3 + bn + relu6', got 'conv 3x3 + bn'"),
        (
            {**GOOD, "1.0": {**GOOD["1.0"], "native": 1}},
            """site '1.0': "native": expected null or a reason, got 1""",
        ),
        (
            {**GOOD, "1.0": {**GOOD["1.0"], "backend": "gpu"}},
            """site '1.0': "backend": expected null or one of cpu, cuda, triton,""",
        ),
        (None, "cannot be read"),
    ],
)
def test_bad_decisions(tmp_path, content, message):
    path = tmp_path / "decisions.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError) as caught:
        swap(two_layers(), decisions=path)
    assert str(caught.value).startswith(f"swap: decisions: {path}: ")
    assert message in str(caught.value)


def test_decisions_of_a_file(tmp_path):
    path = tmp_path / "decisions.json"
    path.write_text(json.dumps(GOOD))
    assert [f.declined for f in fused(swap(two_layers(), decisions=str(path))).values()] == [
        None,
        "slow",
    ]


def test_the_table():
    model = nn.Sequential(*two_layers(), nn.Conv2d(8, 8, 1)).eval()
    explanation = explain(swap(model))
    assert [(r.module, r.pattern, r.backend, r.reason) for r in explanation.rows] == [
        ("0.0", "conv_dw 3x3 + bn + relu6", "cpu", ""),
        ("1.0", "conv 3x3 + bn", "folded", ""),
        ("2", "conv_pw 1x1", "native", "no normalisation follows"),
    ]
    text = str(explanation)
    assert "\x1b" not in text
    for row in explanation.rows:
        assert row.module in text and row.pattern in text and row.reason in text
    assert "2 of 3 rows run fused" in text


def test_repr_tells_what_is_fused():
    assert "fused=norm+relu6" in repr(swap(two_layers()))
