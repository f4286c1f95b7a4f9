"""Triton kernels: the operators for GPUs without a compiler at hand, and for AMD's.

One file an operator, each with its kernels, its operators in torch and their launches. Nothing here
is imported before it is used: importing triton takes a second, and may not be possible.
"""
