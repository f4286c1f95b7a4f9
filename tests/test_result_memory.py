"""Memory of large results is kept for the next ones: never while somebody holds it."""

import io
import threading

import pytest
import torch

from mnet_kernels import dwconv_bn_act, dwconv_bn_act_training

X = torch.randn(2, 64, 64, 33).to(memory_format=torch.channels_last)  # more than 1 MB
WEIGHT = torch.randn(64, 1, 3, 3)


def training(x=X):
    return dwconv_bn_act_training(x, WEIGHT, padding=1)


def test_what_is_given_back_is_used_again():
    y = training()
    right, at = y.clone(), y.data_ptr()
    y.fill_(float("nan"))  # what an output must not keep
    del y
    again = training()
    if torch.__version__ >= "2.11":
        assert again.data_ptr() == at
    assert torch.equal(again, right)


@pytest.mark.parametrize("hold", [lambda y: y[1:], lambda y: y.numpy(), lambda y: y.detach()])
def test_what_is_held_stays(hold):
    y = training()
    held, right, at = hold(y), hold(y.clone()), y.data_ptr()
    del y
    others = [training(torch.randn_like(X)) for _ in range(3)]
    assert all(other.data_ptr() != at for other in others)
    assert len({other.data_ptr() for other in others}) == 3
    assert (torch.as_tensor(held) == torch.as_tensor(right)).all()


def test_other_sizes_and_layouts():
    for _ in range(2):
        for batch in (1, 2, 3):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = X[:1].repeat(batch, 1, 2, 1).contiguous(memory_format=layout)
                y = dwconv_bn_act(x, WEIGHT, padding=1)
                assert y.is_contiguous(memory_format=layout)
                torch.testing.assert_close(y, dwconv_bn_act(x, WEIGHT, padding=1, backend="native"))


def test_from_many_threads():
    right, wrong = training(), []

    def run():
        for _ in range(20):
            if not torch.equal(training(), right):
                wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong


def test_backward_of_a_result_that_was_written_to():
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(training(x).mul_(2).sum(), x)
    expected = first.clone()
    first.fill_(float("nan"))
    del first
    (second,) = torch.autograd.grad(training(x).mul_(2).sum(), x)
    assert torch.equal(second, expected)


def test_pickled_and_shared():
    y = training()
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert torch.equal(torch.load(file), y)
    right = y.clone()
    assert y.share_memory_().is_shared() and torch.equal(y, right)
