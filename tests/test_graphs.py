"""graphed: what it refuses, and what it honours, on a recording that is a plain call."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from networks import image, randomize
from torch import nn

from mnet_kernels import graphed, graphs
from mnet_kernels.nn import FusedConv2d
from mnet_kernels.swap import swap


def test_refusals():
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    with pytest.raises(RuntimeError, match="graphed: example: expected a CUDA tensor, got one on"):
        graphed(model, image(1, 3, 8, 8))
    with pytest.raises(TypeError, match="graphed: model: expected a Module, got function"):
        graphed(lambda x: x, image(1, 3, 8, 8))
    with pytest.raises(TypeError, match="graphed: example: expected a Tensor, got list"):
        graphed(model, [1])


@pytest.fixture
def recorded(monkeypatch):
    """Recordings, as on a GPU: the constants and addresses of the recording are read at replay."""
    made = []

    def record(call, device):
        assert device == torch.device("cpu")  # the example's
        result = call()
        made.append(result)

        def replay():
            fused = [m for m in made.model.modules() if isinstance(m, FusedConv2d)]
            kept = [m.__dict__.get("_kept") for m in fused]
            result.copy_(call())
            assert [m.__dict__.get("_kept") for m in fused] == kept  # nothing is made at replay

        return result, replay

    class Made(list):
        model = None

    made = Made()
    monkeypatch.setattr(graphs, "record", record)
    return made


@pytest.fixture
def graph(recorded):
    net = randomize(
        nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6)
        )
    )
    recorded.model = fast = swap(net)
    for module in fast.modules():  # site by site, as on a GPU
        module.__dict__.pop("forward", None) if isinstance(module, nn.Sequential) else None
    return graphs.Graphed(fast, image(2, 3, 9, 9))


def test_results_are_the_models_and_the_callers_own(graph, recorded):
    with torch.no_grad():
        for _ in range(2):
            x = image(2, 3, 9, 9)
            y = graph(x)
            assert torch.equal(y, graph.model(x))
            again = graph(x * 2)
            assert torch.equal(y, graph.model(x))
            assert not torch.equal(y, again)
    assert len(recorded) == 1


@pytest.mark.parametrize(
    "wrong,message",
    [
        (lambda x: x[:1], r"x: expected the example's shape \(2, 3, 9, 9\), got \(1, 3, 9, 9\)"),
        (lambda x: x.double(), r"x: expected the example's dtype torch.float32, got torch.float64"),
        (lambda x: x.to("meta"), r"x: expected the example's device cpu, got meta"),
    ],
)
def test_other_inputs_are_refused(graph, wrong, message):
    with pytest.raises(RuntimeError, match="graphed: " + message):
        graph(wrong(image(2, 3, 9, 9)))
    with pytest.raises(TypeError, match="graphed: x: expected a Tensor, got int"):
        graph(3)


def test_training_mode_is_refused(graph):
    graph.model[1].train()
    with pytest.raises(RuntimeError, match="graphed: model: expected eval mode, got 1 in training"):
        graph(image(2, 3, 9, 9))


def exchanged(model):
    model[0].weight = nn.Parameter(torch.randn(6, 3, 3, 3))


def moved(model):
    model[3].weight.data = torch.randn(6, 1, 3, 3)


def statistics(model):
    model[1].running_var.mul_(3)


def weight(model):
    model[3].weight.mul_(2)


@pytest.mark.parametrize("change", [exchanged, moved, statistics, weight])
def test_changes_are_honoured(graph, recorded, change):
    x = image(2, 3, 9, 9)
    with torch.no_grad():
        before = graph(x)
        change(graph.model)
        after = graph(x)
        assert torch.equal(after, graph.model(x))
    assert not torch.equal(before, after)
    if change in (exchanged, moved):
        assert len(recorded) == 2


def test_a_recording_is_of_the_devices_own_streams(monkeypatch):
    """With another device current, and torch's one stream for captures already there."""
    current, log = [0], []

    class Stream:
        def __init__(self):
            self.device = current[-1]

        def wait_stream(self, other):
            assert other.device == self.device

    @contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    @contextmanager
    def stream(on):
        with device(on.device):
            yield

    class Graph:
        def replay(self):
            log.append("replay")

    default = Stream()

    @contextmanager
    def graph(made, stream=default):
        with device(stream.device):
            log.append("begin")
            yield
            log.append("end")

    for name, fake in {
        "device": device, "Stream": Stream, "current_stream": Stream, "stream": stream,
        "CUDAGraph": Graph, "graph": graph,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    _, replay = graphs.record(lambda: log.append(current[-1]), 1)
    replay()
    assert log == [1, 1, 1, "begin", 1, "end", "replay"] and current == [0]
