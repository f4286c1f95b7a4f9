"""mnet_kernels: fused depthwise-conv + BatchNorm + activation kernels for PyTorch."""
