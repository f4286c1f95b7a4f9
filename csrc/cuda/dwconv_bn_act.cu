// dwconv_bn_act on a GPU: check the call, make its memory dense, choose the kernel, start it on the
// current stream of x's device. Nothing is allocated but the output and copies of odd strides.
#include <atomic>

#include "dwconv_launch.h"
#include "dwconv_variants.cuh"
#include "facts.h"
#include "operators.h"

namespace mnet::cuda {
namespace {

constexpr const char* kOp = "dwconv_bn_act";

std::atomic<const char*> forced{nullptr};

const char* variant_for(const DwconvCall& call) {
  const char* name = forced.load();
  return name != nullptr ? name : choose(call);
}

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
  const TensorFacts facts = facts_of(x);
  const Problem p = checked_problem(
      kOp, facts, facts_of(weight), facts_of(scale), facts_of(shift),
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
  launch(Launcher::on(current_stream(facts.device_index)), variant_for(call), call);
  return y;
}

std::vector<std::string> variants() {
  const auto names = DwconvVariants::names();
  return {names.begin(), names.end()};
}

void force_variant(const std::string& name) {
  const char* found = nullptr;
  for (const char* known : DwconvVariants::names())
    if (name == known) found = known;
  if (found == nullptr && !name.empty())
    throw std::runtime_error("force_variant: there is no variant '" + name + "'");
  forced.store(found);
}

CallFacts facts_of_call(const std::vector<int64_t>& x, const std::string& dtype, bool channels_last,
                        const std::vector<int64_t>& weight, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  TensorFacts input, taps;
  input.present = taps.present = true;
  input.sizes = x.data(), input.dim = static_cast<int64_t>(x.size());
  taps.sizes = weight.data(), taps.dim = static_cast<int64_t>(weight.size());
  input.dtype = dtype == "float32"    ? DType::float32
                : dtype == "float16"  ? DType::float16
                : dtype == "bfloat16" ? DType::bfloat16
                : dtype == "float64"  ? DType::float64
                                      : DType::other;
  taps.dtype = input.dtype;
  input.dtype_name = taps.dtype_name = dtype.c_str();
  const Problem p =
      checked_problem(kOp, input, taps, {}, {}, {stride, padding, dilation, "relu6", 0});
  check_dtype(kOp, p);
  const DwconvCall call = call_of(p, channels_last);
  const char* variant = variant_for(call);
  KernelFacts kernel;
  launch(Launcher::looking(&kernel), variant, call);
  const auto able = DwconvVariants::able(call);
  return {variant,
          {able.begin(), able.end()},
          kernel.blocks,
          kernel.threads,
          kernel.shared_bytes,
          kernel.registers,
          kernel.local_bytes,
          kernel.blocks_per_sm};
}

}  // namespace mnet::cuda

STABLE_TORCH_LIBRARY_IMPL(mnet_kernels, CUDA, m) {
  m.impl("dwconv_bn_act", TORCH_BOX(&mnet::cuda::dwconv_bn_act));
}
