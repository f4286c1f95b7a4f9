// dwconv_bn_act on a GPU: check the call, make its memory dense, choose the kernel, start it on the
// current stream of x's device. Nothing is allocated but the output and copies of odd strides.
#include "chosen.h"
#include "dwconv_launch.h"
#include "dwconv_variants.cuh"
#include "operators.h"

namespace mnet::cuda {
namespace {

constexpr const char* kOp = "dwconv_bn_act";

Forced<DwconvVariants> forced;

void launch(const Launcher& launcher, const char* variant, const DwconvCall& call) {
  try {
    switch (call.dtype) {
      case DType::float16: return launch_float16(launcher, variant, call);
      case DType::bfloat16: return launch_bfloat16(launcher, variant, call);
      default: return launch_float32(launcher, variant, call);
    }
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(check::join(kOp, ": ", error.what(), " (kernel ", variant, ")"));
  }
}

}  // namespace

Tensor dwconv_bn_act(Tensor x, Tensor weight, std::optional<Tensor> scale,
                     std::optional<Tensor> shift, std::vector<int64_t> stride,
                     std::vector<int64_t> padding, std::vector<int64_t> dilation,
                     std::string activation, double slope) {
  const TensorFacts facts = mnet::facts_of(x);
  const Problem p = checked_problem(
      kOp, facts, mnet::facts_of(weight), mnet::facts_of(scale), mnet::facts_of(shift),
      {std::move(stride), std::move(padding), std::move(dilation), std::move(activation), slope});
  check_dtype(kOp, p);
  const torch::stable::accelerator::DeviceGuard guard(facts.device_index);
  const Layout layout = layout_of(x);
  const Tensor input = mnet::dense(x, layout);
  const Tensor taps = mnet::dense(weight, Layout::contiguous);
  const std::optional<Tensor> scales = dense(scale), shifts = dense(shift);
  Tensor y = empty_4d(x, p.N, p.K, p.OH, p.OW, layout);
  if (p.N == 0) return y;

  DwconvCall call = call_of(p, layout == Layout::channels_last);
  call.x = input.const_data_ptr();
  call.weight = taps.const_data_ptr();
  call.scale = values(scales);
  call.shift = values(shifts);
  call.y = y.mutable_data_ptr();
  launch(Launcher::on(current_stream(facts.device_index)), forced.or_chosen(call), call);
  return y;
}

std::vector<std::string> variants() { return names_of<DwconvVariants>(); }

void force_variant(const std::string& name) { forced.set("force_variant", name); }

CallFacts facts_of_call(const std::vector<int64_t>& x, const std::string& dtype, bool channels_last,
                        const std::vector<int64_t>& weight, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  const Problem p = checked_problem(kOp, facts_of(x, dtype), facts_of(weight, dtype), {}, {},
                                    {stride, padding, dilation, "relu6", 0});
  check_dtype(kOp, p);
  const DwconvCall call = call_of(p, channels_last);
  return facts_of_variant<DwconvVariants>(forced.or_chosen(call), call, launch);
}

}  // namespace mnet::cuda

STABLE_TORCH_LIBRARY_IMPL(mnet_kernels, CUDA, m) {
  m.impl("dwconv_bn_act", TORCH_BOX(&mnet::cuda::dwconv_bn_act));
}
