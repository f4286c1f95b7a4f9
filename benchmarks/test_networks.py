"""Whole networks: swap against every peer.

`make bench` runs the large batches twice, with glibc's default malloc and with one that keeps
large blocks: most of a large-batch gain over eager is page faults.
"""

from __future__ import annotations

import pytest
import torch
import torchvision
from machine import THREADS
from peers import Case, Ready, to_last
from rows import DTYPES, flops, parameter_bytes, row

from mnet_kernels import swap
from mnet_kernels.models import mobilenet_v1
from mnet_kernels.subjects import randomise_batchnorm

V1, SMALL = "mobilenet_v1", "mobilenet_v1 alpha 0.5"
V2, V3, B0 = "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0"
NETWORKS = {
    V1: (mobilenet_v1, {}, 224),
    SMALL: (mobilenet_v1, {"alpha": 0.5, "num_classes": 10}, 32),
    V2: (torchvision.models.mobilenet_v2, {}, 224),
    V3: (torchvision.models.mobilenet_v3_large, {}, 224),
    B0: (torchvision.models.efficientnet_b0, {}, 224),
}
USUAL = {
    (V1, 1, "float32", THREADS), (V1, 1, "bfloat16", THREADS), (V1, 1, "float32", 1),
    (V1, 32, "float32", THREADS), (SMALL, 32, "float32", THREADS), (SMALL, 32, "bfloat16", THREADS),
    (V2, 1, "float32", THREADS), (V2, 1, "bfloat16", THREADS), (V2, 32, "float32", THREADS),
    (V3, 1, "float32", THREADS), (V3, 1, "bfloat16", THREADS),
    (B0, 1, "float32", THREADS),
}  # fmt: skip
#: Peers that take seconds to build, where they have a chance of being the best.
COMPILED = ("torch.compile", "torch.compile frozen")
SLOW = {
    (V1, 1, "float32", THREADS): (*COMPILED, "torch.compile max-autotune", "XNNPACK", "ncnn"),
    (V1, 32, "float32", THREADS): ("torch.compile frozen", "XNNPACK"),
    (SMALL, 32, "float32", THREADS): (*COMPILED, "XNNPACK"),
    (V2, 1, "float32", THREADS): (*COMPILED, "XNNPACK", "ncnn"),
    (V2, 32, "float32", THREADS): ("torch.compile frozen", "XNNPACK"),
    (V3, 1, "float32", THREADS): (*COMPILED, "XNNPACK", "ncnn"),
    (B0, 1, "float32", THREADS): ("torch.compile frozen", "XNNPACK"),
    (V1, 1, "float32", 1): ("XNNPACK",),
    (V1, 1, "bfloat16", THREADS): ("torch.compile frozen",),
    (V2, 1, "bfloat16", THREADS): ("torch.compile frozen",),
}


def _rows():
    for name in NETWORKS:
        for batch in (1, 8, 32):
            for dtype in DTYPES:
                for threads in sorted({1, THREADS}, reverse=True):
                    key = (name, batch, dtype, threads)
                    yield row(*key, full=key not in USUAL)


@pytest.mark.parametrize("name,batch,dtype,threads", list(_rows()))
def test_network(race, name, batch, dtype, threads):
    constructor, options, size = NETWORKS[name]
    model = constructor(**options).eval()
    randomise_batchnorm(model, torch.randn(4, 3, size, size), 0)
    model = model.to(DTYPES[dtype])
    x = torch.randn(batch, 3, size, size).to(DTYPES[dtype])
    fast = swap(model)
    classes = options.get("num_classes", 1000)
    race(
        Case(model, x, threads), Ready(fast), {"ours channels_last": Ready(fast, to_last)},
        budget_s=6, slow=SLOW.get((name, batch, dtype, threads), ()),
        kind="network", model=name, size=size, layout="contiguous", flops=flops(model, x),
        bytes=x.nbytes + batch * classes * x.element_size() + parameter_bytes(model),
    )  # fmt: skip
