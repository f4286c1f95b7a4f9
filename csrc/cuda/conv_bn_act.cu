// conv_bn_act on a GPU: check the call, make its memory dense channels_last, choose the kernel,
// start it on the current stream of x's device. Channels_last tensors (a 1x1 weight is one as it
// is) are read as they are and nothing but the output is allocated; a contiguous x is copied once
// on the way in, and the result once on the way out.
#include "chosen.h"
#include "conv_launch.h"
#include "conv_variants.cuh"
#include "operators.h"

namespace mnet::cuda {
namespace {

constexpr const char* kOp = "conv_bn_act";

Forced<ConvVariants> forced;

void launch(const Launcher& launcher, const char* variant, const ConvCall& call) {
  try {
    switch (call.conv.dtype) {
      case DType::float16: return launch_conv_float16(launcher, variant, call);
      case DType::bfloat16: return launch_conv_bfloat16(launcher, variant, call);
      default: return (call.tf32 ? launch_conv_tf32 : launch_conv_float32)(launcher, variant, call);
    }
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(check::join(kOp, ": ", error.what(), " (kernel ", variant, ")"));
  }
}

// All but the pointers.
ConvCall conv_call_of(const Problem& problem, const DeviceLimits& limits, bool tf32) {
  check_dtype(kOp, problem);
  const ConvCall call{call_of(problem, true), limits.multiprocessors, limits.shared_bytes, tf32};
  if (!conv_fits<ConvTile16>(call.conv))  // the smallest tile
    check::fail(
        kOp, "x", "rows, columns, channels, an image and tiles of pixels below 2^31",
        check::join("a convolution of ", problem.N, " x ", problem.C, " x ", problem.H, " x ",
                    problem.W, " to ", problem.K, " x ", problem.OH, " x ", problem.OW));
  return call;
}

}  // namespace

Tensor conv_bn_act(Tensor x, Tensor weight, std::optional<Tensor> scale,
                   std::optional<Tensor> shift, std::vector<int64_t> stride,
                   std::vector<int64_t> padding, std::vector<int64_t> dilation,
                   std::string activation, double slope, bool tf32) {
  const TensorFacts facts = mnet::facts_of(x);
  const Problem problem = checked_problem(kOp, facts, mnet::facts_of(weight), mnet::facts_of(scale),
                                          mnet::facts_of(shift),
                                          {std::move(stride), std::move(padding),
                                           std::move(dilation), std::move(activation), slope, 1});
  ConvCall call = conv_call_of(problem, limits_of(facts.device_index), tf32);
  DwconvCall& conv = call.conv;
  const torch::stable::accelerator::DeviceGuard guard(facts.device_index);
  const Layout layout = layout_of(x);
  Tensor y = empty_4d(x, conv.N, conv.K, conv.OH, conv.OW, Layout::channels_last);
  if (conv.N > 0) {
    const Tensor input = mnet::dense(x, Layout::channels_last);
    const Tensor matrix = mnet::dense(weight, Layout::channels_last);
    const std::optional<Tensor> scales = dense(scale), shifts = dense(shift);
    conv.x = input.const_data_ptr();
    conv.weight = matrix.const_data_ptr();
    conv.scale = values(scales);
    conv.shift = values(shifts);
    conv.y = y.mutable_data_ptr();
    launch(Launcher::on(current_stream(facts.device_index)), forced.or_chosen(call), call);
  }
  return mnet::dense(y, layout);
}

std::vector<std::string> conv_variants() { return names_of<ConvVariants>(); }

void force_conv_variant(const std::string& name) { forced.set("force_conv_variant", name); }

CallFacts facts_of_conv_call(const std::vector<int64_t>& x, const std::string& dtype,
                             const std::vector<int64_t>& weight, const std::vector<int64_t>& stride,
                             const std::vector<int64_t>& padding,
                             const std::vector<int64_t>& dilation, bool tf32) {
  const Problem problem = checked_problem(kOp, facts_of(x, dtype), facts_of(weight, dtype), {}, {},
                                          {stride, padding, dilation, "relu6", 0, 1});
  const ConvCall call = conv_call_of(problem, limits_of(0), tf32);
  return facts_of_variant<ConvVariants>(forced.or_chosen(call), call, launch);
}

}  // namespace mnet::cuda

STABLE_TORCH_LIBRARY_IMPL(mnet_kernels, CUDA, m) {
  m.impl("conv_bn_act", TORCH_BOX(&mnet::cuda::conv_bn_act));
}
