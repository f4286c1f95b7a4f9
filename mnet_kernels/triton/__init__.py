"""Triton kernels: the operators for GPUs without a compiler at hand, and for AMD's.

One file an operator, each with its kernels, its operators in torch and their launches.
backends.py imports operators.py at its first use: importing triton takes a second, and may not be
possible.
"""

import os

#: Triton's interpreter runs its kernels on CPU tensors: for tests, never chosen automatically.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")
