"""Which pairs of a run go in one pass: decided, set, measured, told; the same bits either way."""

from __future__ import annotations

import json

import pytest
import torch
from test_sequences import Net, image, one_by_one, randomize

from mnet_kernels import SeparableConv
from mnet_kernels.nn import FusedConv2d
from mnet_kernels.runs import one_pass
from mnet_kernels.runs.pairs import pairs, runners
from mnet_kernels.runs.runner import KIND
from mnet_kernels.swap import explain, swap

plan = torch.ops.mnet_kernels.conv_sequence_plan.default


def ways(fast) -> list[bool]:
    return [pair.in_one_pass for runner in runners(fast) for pair in pairs(runner)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forced_either_way_gives_the_same_bits(threads, dtype):
    net = randomize(Net()).to(dtype)
    x = image(1, 3, 40, 37).to(dtype)
    torch.set_num_threads(threads)
    results = []
    with torch.no_grad():
        for forced in (True, False, None):
            fast = swap(net, pairs=forced)
            assert ways(fast) == []  # nothing to tell before the first call
            results.append(fast(x))
            assert len(ways(fast)) == 4
            if forced is not None:
                assert set(ways(fast)) == {forced}
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0], one_by_one(fast, x))


def test_one_pair_is_set_and_the_call_follows():
    fast = swap(randomize(Net()), pairs=True)
    x = image(2, 3, 20, 20)
    with torch.no_grad():
        before = fast(x)
        fast[2].conv[1][0].fusion.pair = False
        assert torch.equal(fast(x), before)
    assert ways(fast) == [True, False, True, True]
    assert "2.conv.1.0 + 2.conv.2.0: one after the other (measured or set)" in str(explain(fast))


def test_explain_tells_decision_reason_and_memory():
    fast = swap(randomize(Net()))
    with torch.no_grad():
        fast(image(1, 3, 40, 40))
    text = " ".join(str(explain(fast)).split())
    assert "1.conv.1.0 + 1.conv.2.0: in one pass (estimated extra cost" in text
    assert "Weights and constants packed for these calls:" in text
    assert sum(r.packed_bytes() for r in runners(fast)) > 4 * sum(
        p.numel() for n, p in fast.named_parameters() if p.dim() == 4
    )


def test_the_cost_model():
    """Large planes in one pass; wide channels at small planes, one image for two threads, apart."""

    def decision(channels, size, threads, dtype=torch.float32):
        rows = torch.tensor([
            [0, channels, channels, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, 0],
            [1, channels, channels, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, -1, 16 * channels],
        ])  # fmt: skip
        x = torch.empty(1, dtype=dtype).expand(1, channels, size, size)
        constants = torch.empty(1).expand(channels * channels + 64 * channels)
        together, fused, separate = plan(x, rows, constants.contiguous(), threads)[:3]
        assert (together > 0) == (fused <= separate)
        return together > 0

    assert decision(64, 112, 1)
    assert decision(64, 112, 2)
    assert decision(512, 14, 1)
    assert not decision(1024, 7, 2)
    assert not decision(512, 7, 2)


def test_measured_with_example_inputs(tmp_path):
    net = randomize(Net())
    x = image(1, 3, 24, 24)
    fast = swap(net, example_inputs=x)
    for module in fast.modules():  # which of them is faster is the machine's affair
        if getattr(module, "fusion", None) is not None:
            module.fusion.declined = None
    depthwise = [fast.get_submodule(f"{i}.conv.1.0") for i in (1, 2, 3, 4)]
    told = [conv.fusion.pair for conv in depthwise]
    if all(conv.fusion.pair is not None for conv in depthwise):
        with torch.no_grad():
            fast(x)
        assert ways(fast) == told
    depthwise[0].fusion.pair, depthwise[1].fusion.pair = True, False
    path = tmp_path / "decisions.json"
    explain(fast).save(path)
    again = swap(net, decisions=path)
    found = [again.get_submodule(f"{i}.conv.1.0").fusion.pair for i in (1, 2)]
    assert found == [True, False]
    content = json.loads(path.read_text())
    content["1.conv.1.0"]["pair"] = "perhaps"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match='"pair": expected true or false, got'):
        swap(net, decisions=path)


def test_kinds_are_checked():
    rows = torch.tensor([[1, 8, 4, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, -1, 0]])
    rows[0, KIND] = 7
    with pytest.raises(RuntimeError, match="conv_sequence: stages: expected a kind from 0 to 6"):
        torch.ops.mnet_kernels.conv_sequence(torch.ones(1, 8, 4, 4), rows, torch.zeros(999))


class OnAGpu(torch.Tensor):
    is_cpu, is_cuda = False, True


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_gpus_backend_gets_the_weight_as_it_reads_it(monkeypatch, backend, channels_last):
    """Kept by tap for Triton's channels_last kernel, which would copy it at every call."""
    given = []
    monkeypatch.setattr(one_pass, "separable_conv", lambda *args, **_: given.append(args[1]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(FusedConv2d, "serving", lambda *_: backend)
    block = SeparableConv(6, 10).eval()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 6, 9, 9).to(memory_format=layout).as_subclass(OnAGpu)
    with torch.no_grad():
        for _ in range(2):
            one_pass.in_one_pass(block.conv_dw, block.conv_pw, x)
    first, again = given
    assert first.data_ptr() == again.data_ptr() and torch.equal(first, block.conv_dw.weight)
    by_tap = backend == "triton" and channels_last
    assert first.permute(2, 3, 1, 0).is_contiguous() == by_tap
