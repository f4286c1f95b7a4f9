// The operators' schemas. Each is implemented once a device: csrc/cpu, csrc/cuda.
//
// stride, dilation: one int or (h, w). padding: one int, (h, w) or (top, left, bottom, right);
// an empty list means TensorFlow's "same". Accumulation and rounding: see mnet_kernels/ops.py.
#include <torch/csrc/stable/library.h>

#include "tensor.h"

STABLE_TORCH_LIBRARY(mnet_kernels, m) {
  m.def(
      "dwconv_bn_act(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, int[2] stride, "
      "int[4] padding, int[2] dilation, str activation, float slope) -> Tensor");
  // (dx, dweight, dscale, dshift) for the gradient dy of the output; frozen statistics. data, sums:
  // whether to compute dx, and the other three; those that are not are empty. CUDA only.
  m.def(
      "dwconv_bn_act_backward(Tensor dy, Tensor x, Tensor weight, Tensor? scale, Tensor? shift, "
      "int[2] stride, int[4] padding, int[2] dilation, str activation, float slope, bool data, "
      "bool sums) -> (Tensor, Tensor, Tensor, Tensor)");
  // A dense convolution (one group) on weights packed by pack_conv_weight; float32, channels_last.
  m.def(
      "conv_bn_act_packed(Tensor x, Tensor packed, Tensor? scale, Tensor? shift, int[2] kernel, "
      "int[2] stride, int[4] padding, int[2] dilation, int out_channels, str activation, "
      "float slope) -> Tensor");
  m.def("pack_conv_weight(Tensor weight) -> Tensor");
  // Float32 channels_last convolutions one after the other; mnet_kernels/sequences.py writes
  // `stages` (n, 16) int64 and `constants`, csrc/cpu/conv_sequence.cpp says what is in them.
  m.def("conv_sequence(Tensor x, Tensor stages, Tensor constants) -> Tensor");
  // The checks alone, for backends that are not written in C++: x's output size and the explicit
  // padding, (OH, OW, top, left, bottom, right). groups = 0 means depthwise.
  m.def(
      "check_conv(str op, Tensor x, Tensor weight, Tensor? scale, Tensor? shift, int[2] stride, "
      "int[4] padding, int[2] dilation, int groups, str activation, float slope) -> int[]");
}

namespace {

std::vector<int64_t> check_conv(std::string op, mnet::Tensor x, mnet::Tensor weight,
                                std::optional<mnet::Tensor> scale,
                                std::optional<mnet::Tensor> shift, std::vector<int64_t> stride,
                                std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                int64_t groups, std::string activation, double slope) {
  const mnet::Problem p = mnet::checked_problem(
      op.c_str(), mnet::facts_of(x), mnet::facts_of(weight), mnet::facts_of(scale),
      mnet::facts_of(shift), {stride, padding, dilation, activation, slope, groups});
  return {p.OH, p.OW, p.top, p.left, p.bottom, p.right};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnet_kernels, CompositeExplicitAutograd, m) {
  m.impl("check_conv", TORCH_BOX(&check_conv));
}
