// separable_conv on a GPU: check the call, make its memory dense channels_last, choose the kernel,
// start it on the current stream of x's device. Channels_last tensors are read as they are and
// nothing but the output is allocated; a contiguous x (or residual) is copied once on the way in,
// and the result once on the way out.
#include "../separable.h"
#include "chosen.h"
#include "operators.h"
#include "separable_launch.h"
#include "separable_variants.cuh"

namespace mnet::cuda {
namespace {

constexpr const char* kOp = "separable_conv";

Forced<SeparableVariants> forced;

void launch(const Launcher& launcher, const char* variant, const SeparableCall& call) {
  try {
    switch (call.depthwise.dtype) {
      case DType::float16: return launch_separable_float16(launcher, variant, call);
      case DType::bfloat16: return launch_separable_bfloat16(launcher, variant, call);
      default:
        return (call.tf32 ? launch_separable_tf32 : launch_separable_float32)(launcher, variant,
                                                                              call);
    }
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(check::join(kOp, ": ", error.what(), " (kernel ", variant, ")"));
  }
}

// All but the pointers.
SeparableCall separable_call_of(const SeparableProblem& problem, const DeviceLimits& limits,
                                bool tf32) {
  check_dtype(kOp, problem.depthwise);
  SeparableCall call{};
  call.depthwise = call_of(problem.depthwise, true);
  call.K = problem.pointwise.K;
  call.pw_activation = problem.pointwise.activation;
  call.multiprocessors = limits.multiprocessors;
  call.shared_limit = limits.shared_bytes;
  call.tf32 = tf32;
  if (!separable_fits(call))
    check::fail(kOp, "x", "rows, columns and channels below 2^31",
                check::join("a result of ", call.K, " x ", call.depthwise.OH, " x ",
                            call.depthwise.OW, " by way of ", call.depthwise.K, " channels"));
  return call;
}

}  // namespace

Tensor separable_conv(Tensor x, Tensor dw_weight, std::optional<Tensor> dw_scale,
                      std::optional<Tensor> dw_shift, Tensor pw_weight,
                      std::optional<Tensor> pw_scale, std::optional<Tensor> pw_shift,
                      std::optional<Tensor> residual, std::vector<int64_t> stride,
                      std::vector<int64_t> padding, std::vector<int64_t> dilation,
                      std::string dw_activation, std::string pw_activation, double slope,
                      bool tf32) {
  const TensorFacts facts = mnet::facts_of(x);
  const SeparableProblem problem = checked_separable(
      kOp,
      {facts, mnet::facts_of(dw_weight), mnet::facts_of(dw_scale), mnet::facts_of(dw_shift),
       mnet::facts_of(pw_weight), mnet::facts_of(pw_scale), mnet::facts_of(pw_shift),
       mnet::facts_of(residual)},
      std::move(stride), std::move(padding), std::move(dilation), std::move(dw_activation),
      std::move(pw_activation), slope);
  SeparableCall call = separable_call_of(problem, limits_of(facts.device_index), tf32);
  const DwconvCall& dw = call.depthwise;
  const torch::stable::accelerator::DeviceGuard guard(facts.device_index);
  const Layout layout = layout_of(x);
  Tensor y = empty_4d(x, dw.N, call.K, dw.OH, dw.OW, Layout::channels_last);
  if (dw.N > 0) {
    const Tensor input = mnet::dense(x, Layout::channels_last);
    const Tensor taps = mnet::dense(dw_weight, Layout::contiguous);
    const Tensor matrix = mnet::dense(pw_weight, Layout::contiguous);
    if (residual) residual = mnet::dense(*residual, Layout::channels_last);
    const std::optional<Tensor> dw_scales = dense(dw_scale), dw_shifts = dense(dw_shift);
    const std::optional<Tensor> pw_scales = dense(pw_scale), pw_shifts = dense(pw_shift);
    call.depthwise.x = input.const_data_ptr();
    call.depthwise.weight = taps.const_data_ptr();
    call.depthwise.scale = values(dw_scales);
    call.depthwise.shift = values(dw_shifts);
    call.pw_weight = matrix.const_data_ptr();
    call.pw_scale = values(pw_scales);
    call.pw_shift = values(pw_shifts);
    call.residual = residual ? residual->const_data_ptr() : nullptr;
    call.y = y.mutable_data_ptr();
    launch(Launcher::on(current_stream(facts.device_index)), forced.or_chosen(call), call);
  }
  return mnet::dense(y, layout);
}

std::vector<std::string> separable_variants() { return names_of<SeparableVariants>(); }

void force_separable_variant(const std::string& name) {
  forced.set("force_separable_variant", name);
}

CallFacts facts_of_separable_call(const std::vector<int64_t>& x, const std::string& dtype,
                                  const std::vector<int64_t>& dw_weight, int64_t outputs,
                                  const std::vector<int64_t>& stride,
                                  const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation, bool tf32) {
  const std::vector<int64_t> pw_weight{outputs, dw_weight.empty() ? 0 : dw_weight[0], 1, 1};
  SeparableTensors t;
  t.x = facts_of(x, dtype), t.dw_weight = facts_of(dw_weight, dtype);
  t.pw_weight = facts_of(pw_weight, dtype);
  const SeparableCall call =
      separable_call_of(checked_separable(kOp, t, stride, padding, dilation, "relu6", "relu6", 0),
                        limits_of(0), tf32);
  return facts_of_variant<SeparableVariants>(forced.or_chosen(call), call, launch);
}

}  // namespace mnet::cuda

STABLE_TORCH_LIBRARY_IMPL(mnet_kernels, CUDA, m) {
  m.impl("separable_conv", TORCH_BOX(&mnet::cuda::separable_conv));
}
