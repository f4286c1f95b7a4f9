"""``swap``: exchange convolution + BatchNorm + activation for one pass, in any model, and back.

Read find.py for what is exchanged where, exchange.py for how it is done and undone.
"""

from mnet_kernels.swap.exchange import explain, restore, sites, swap

__all__ = ["explain", "restore", "sites", "swap"]
