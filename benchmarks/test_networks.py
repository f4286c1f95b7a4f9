"""Whole networks: swap against plain PyTorch.

`make bench` runs this twice, with glibc's default malloc and with one that keeps large blocks: most
of a large-batch gain over eager is page faults.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from peers import network_peers

from mnet_kernels import swap
from mnet_kernels.data import randomise_batchnorm
from mnet_kernels.models import mobilenet_v1

NETWORKS = {
    "mobilenet_v1": (mobilenet_v1, {}, 224, (1, 32)),
    "mobilenet_v1 alpha 0.5": (mobilenet_v1, {"alpha": 0.5, "num_classes": 10}, 32, (32,)),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, {}, 224, (1, 32)),
    "mobilenet_v3_large": (torchvision.models.mobilenet_v3_large, {}, 224, (1,)),
}
ROWS = [(name, batch) for name, (*_, batches) in NETWORKS.items() for batch in batches]


@pytest.mark.parametrize("name,batch", ROWS)
def test_network(measure, name, batch):
    constructor, options, size, _ = NETWORKS[name]
    model = constructor(**options).eval()
    randomise_batchnorm(model, torch.randn(4, 3, size, size), 0)
    x = torch.randn(batch, 3, size, size)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(x.double())
    fast = swap(model)
    measure(
        lambda: fast(x), network_peers(model, x), exact, tolerance=1e-3, budget_s=12,
        kind="network", model=name, size=size, batch=batch, dtype="float32",
    )  # fmt: skip
