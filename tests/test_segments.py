"""Batches: the smaller an image has become, the more of them go through together."""

from __future__ import annotations

import pytest
import torch
from networks import image, randomize
from test_sequences import both_dtypes, one_by_one
from torchvision.models import mobilenet_v2, mobilenet_v3_small

from mnet_kernels.swap import swap

#: Residual sums, gates (which read an older value), and strips; what an image takes shrinks from
#: more than a segment may hold to a few kilobytes.
NETWORKS = {
    "v2": (lambda: mobilenet_v2(num_classes=70, width_mult=0.35), 160),
    "v3": (lambda: mobilenet_v3_small(num_classes=70, width_mult=0.5), 190),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
@both_dtypes
def test_the_same_bits_as_image_by_image(name, threads, dtype):
    make, size = NETWORKS[name]
    net = randomize(make().eval()).to(dtype)
    fast, features = swap(net), swap(net.features)
    torch.set_num_threads(threads)  # the fixture of all tests sets it back
    for batch in (3, 11):
        x = image(batch, 3, size, size - 9).to(dtype)
        with torch.no_grad():
            y, maps = fast(x), features(x)
            assert torch.equal(y, fast(x))
            assert torch.equal(y, torch.cat([fast(one[None]) for one in x]))
        assert torch.equal(maps, one_by_one(features, x))
        assert len(maps.flatten(1).unique(dim=0)) == batch
