// The operators' schemas. Each is implemented once a device: csrc/cpu, csrc/cuda.
//
// stride, dilation: one int or (h, w). padding: one int, (h, w) or (top, left, bottom, right);
// an empty list means TensorFlow's "same". Accumulation and rounding: see mnet_kernels/ops.py.
#include <torch/csrc/stable/library.h>

#include "separable.h"
#include "tensor.h"

STABLE_TORCH_LIBRARY(mnet_kernels, m) {
  m.def(
      "dwconv_bn_act(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, int[2] stride, "
      "int[4] padding, int[2] dilation, str activation, float slope) -> Tensor");
  // (dx, dweight, dscale, dshift) for the gradient dy of the output; frozen statistics. data, sums:
  // whether to compute dx, and the other three; those that are not are empty.
  m.def(
      "dwconv_bn_act_backward(Tensor dy, Tensor x, Tensor weight, Tensor? scale, Tensor? shift, "
      "int[2] stride, int[4] padding, int[2] dilation, str activation, float slope, bool data, "
      "bool sums) -> (Tensor, Tensor, Tensor, Tensor)");
  // dwconv_bn_act with the batch's own statistics, as BatchNorm in training: (y, z, mean, var),
  // mean and (biased) var of the convolution, (C*M,), in float32, float64 for float64; z the
  // convolution itself where backward reads it, empty where it is computed again.
  m.def(
      "dwconv_bn_act_training(Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, int[2] stride, "
      "int[4] padding, int[2] dilation, str activation, float slope, float eps) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  // (dx, dweight, dgamma, dbeta) for the gradient dy of y, through the statistics too; those that
  // are not wanted are empty.
  m.def(
      "dwconv_bn_act_training_backward(Tensor dy, Tensor x, Tensor z, Tensor weight, "
      "Tensor? gamma, Tensor? beta, Tensor mean, Tensor var, int[2] stride, int[4] padding, "
      "int[2] dilation, str activation, float slope, float eps, bool data, bool sums) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  // A 1x1 convolution with the batch's own statistics, float32, channels_last: (y, z, mean, var), z
  // the convolution itself.
  m.def(
      "conv_bn_act_training(Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, str activation, "
      "float slope, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  // (dx, dweight, dgamma, dbeta); data: whether to compute dx, sums: whether the other three.
  m.def(
      "conv_bn_act_training_backward(Tensor dy, Tensor x, Tensor z, Tensor weight, Tensor? gamma, "
      "Tensor? beta, Tensor mean, Tensor var, str activation, float slope, float eps, bool data, "
      "bool sums) -> (Tensor, Tensor, Tensor, Tensor)");
  // The rows that a convolution with this weight (K, C, Kh, Kw) multiplies, (N, Kh*Kw*C, OH, OW),
  // float32, channels_last.
  m.def("conv_patches(Tensor x, Tensor weight, int[2] stride, int[4] padding) -> Tensor");
  // BatchNorm's, after a batch of `count` values a channel; var is biased.
  m.def(
      "update_running_statistics(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, "
      "Tensor var, float momentum, int count) -> ()");
  // Depthwise + affine + activation, then pointwise (pw_weight (K, C*M, 1, 1)) + affine +
  // activation, then + residual; what is between the two never reaches memory. tf32: on a GPU, the
  // pointwise half may multiply float32 as TF32.
  m.def(
      "separable_conv(Tensor x, Tensor dw_weight, Tensor? dw_scale, Tensor? dw_shift, "
      "Tensor pw_weight, Tensor? pw_scale, Tensor? pw_shift, Tensor? residual, int[2] stride, "
      "int[4] padding, int[2] dilation, str dw_activation, str pw_activation, float slope, "
      "bool tf32=False) -> Tensor");
  // A dense convolution (one group) + affine + activation on a GPU; no gradient. tf32: likewise.
  m.def(
      "conv_bn_act(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, int[2] stride, "
      "int[4] padding, int[2] dilation, str activation, float slope, bool tf32=False) -> Tensor");
  // A dense convolution (one group) on weights packed by pack_conv_weight: float32 or bfloat16 on
  // the CPU, channels_last.
  m.def(
      "conv_bn_act_packed(Tensor x, Tensor packed, Tensor? scale, Tensor? shift, int[2] kernel, "
      "int[2] stride, int[4] padding, int[2] dilation, int out_channels, str activation, "
      "float slope) -> Tensor");
  m.def("pack_conv_weight(Tensor weight) -> Tensor");
  // The layers of a run one after the other (float32 or bfloat16, channels_last);
  // mnet_kernels/runs/runner.py writes `stages` (n, 16) int64 and `constants`, csrc/cpu/sequence.h
  // says what is in them.
  // flat: the result, of one pixel, is (N, K).
  m.def("conv_sequence(Tensor x, Tensor stages, Tensor constants, bool flat=False) -> Tensor");
  // Which pairs of them it would fuse, and why.
  m.def("conv_sequence_plan(Tensor x, Tensor stages, Tensor constants, int threads) -> int[]");
  // Adds x to a list of tensors whose addresses are watched (csrc/watched_tensors.h); 0: a new
  // list.
  m.def("watch(Tensor x, int list) -> int");
  // The checks alone, for backends that are not written in C++: x's output size and the explicit
  // padding, (OH, OW, top, left, bottom, right). groups = 0 means depthwise.
  m.def(
      "check_conv(str op, Tensor x, Tensor weight, Tensor? scale, Tensor? shift, int[2] stride, "
      "int[4] padding, int[2] dilation, int groups, str activation, float slope) -> int[]");
  m.def(
      "check_separable_conv(Tensor x, Tensor dw_weight, Tensor? dw_scale, Tensor? dw_shift, "
      "Tensor pw_weight, Tensor? pw_scale, Tensor? pw_shift, Tensor? residual, int[2] stride, "
      "int[4] padding, int[2] dilation, str dw_activation, str pw_activation, float slope) -> "
      "int[]");
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

std::vector<int64_t> check_separable_conv(
    mnet::Tensor x, mnet::Tensor dw_weight, std::optional<mnet::Tensor> dw_scale,
    std::optional<mnet::Tensor> dw_shift, mnet::Tensor pw_weight,
    std::optional<mnet::Tensor> pw_scale, std::optional<mnet::Tensor> pw_shift,
    std::optional<mnet::Tensor> residual, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, std::string dw_activation, std::string pw_activation,
    double slope) {
  using mnet::facts_of;
  const mnet::Problem p =
      mnet::checked_separable(
          "separable_conv",
          {facts_of(x), facts_of(dw_weight), facts_of(dw_scale), facts_of(dw_shift),
           facts_of(pw_weight), facts_of(pw_scale), facts_of(pw_shift), facts_of(residual)},
          stride, padding, dilation, dw_activation, pw_activation, slope)
          .depthwise;
  return {p.OH, p.OW, p.top, p.left, p.bottom, p.right};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnet_kernels, CompositeExplicitAutograd, m) {
  m.impl("check_conv", TORCH_BOX(&check_conv));
  m.impl("check_separable_conv", TORCH_BOX(&check_separable_conv));
}
