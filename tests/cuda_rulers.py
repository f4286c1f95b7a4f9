"""What the tests of the CUDA backend on a GPU share: problems and marks."""

from __future__ import annotations

import pytest
import torch

from mnet_kernels import backends

WHY_NOT = backends.why_not("cuda", device="cuda")
#: As pytestmark.
ON_A_GPU = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.usefixtures("poisoned_memory"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])

# Channels and sizes at both sides of a vector (8 or 4), a warp, a tile; planes below the kernel.
SHAPES = [
    (1, 1, 1, 1), (2, 3, 2, 9), (1, 8, 7, 7), (3, 7, 7, 7), (2, 16, 14, 14), (1, 9, 8, 6),
    (2, 31, 15, 33), (1, 32, 16, 16), (1, 33, 17, 9), (1, 64, 34, 7), (2, 40, 5, 130),
    (1, 4, 57, 56), (1, 2, 112, 113), (5, 130, 3, 4), (1, 256, 9, 1),
]  # fmt: skip
FAST = [((k, k), {"stride": s, "padding": k // 2}) for k in (3, 5, 7) for s in (1, 2)]
ANY = [
    ((1, 1), {}),
    ((2, 3), {"padding": (1, 2)}),
    ((3, 3), {"stride": (1, 2), "padding": (2, 0)}),
    ((3, 3), {"stride": 3, "padding": 1}),
    ((3, 3), {"stride": 2, "padding": (0, 0, 1, 1)}),
    ((3, 3), {"padding": (3, 0, 1, 2)}),
    ((3, 5), {"dilation": (3, 2), "padding": (3, 4), "stride": (2, 3)}),
    ((5, 5), {"stride": 2, "padding": "same"}),
    ((11, 1), {"padding": (5, 0)}),
]
