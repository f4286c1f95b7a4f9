// dwconv_bn_act_backward on a GPU: check the call, make its memory dense, allocate the results and
// the room for what lies between the steps, start the kernels on the current stream of x's device.
#include <tuple>

#include "chosen.h"
#include "dwconv_backward.cuh"
#include "dwconv_backward_launch.h"
#include "dwconv_launch.h"
#include "dwconv_variants.cuh"
#include "facts.h"
#include "operators.h"

namespace mnet::cuda {
namespace {

constexpr const char* kOp = "dwconv_bn_act_backward";

Forced<BackwardVariants> forced;

void launch(const Launcher& launcher, const BackwardChoice& choice,
            const DwconvBackwardCall& call) {
  auto run = [&](auto backward, auto forward) {
    backward(launcher, choice, call, [&](const DwconvCall& transposed) {
      forward(launcher, choose(transposed), transposed);
    });
  };
  try {
    switch (call.forward.dtype) {
      case DType::float16: return run(launch_backward_float16, launch_float16);
      case DType::bfloat16: return run(launch_backward_bfloat16, launch_bfloat16);
      default: return run(launch_backward_float32, launch_float32);
    }
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(
        check::join(kOp, ": ", error.what(), " (kernels ", choice.first, ", ", choice.data, ")"));
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> dwconv_bn_act_backward(
    Tensor dy, Tensor x, Tensor weight, std::optional<Tensor> scale, std::optional<Tensor> shift,
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    std::string activation, double slope, bool data, bool sums) {
  const TensorFacts facts = mnet::facts_of(x);
  const Problem p = checked_problem(
      kOp, facts, mnet::facts_of(weight), mnet::facts_of(scale), mnet::facts_of(shift),
      {std::move(stride), std::move(padding), std::move(dilation), std::move(activation), slope});
  check_dtype(kOp, p);
  check::gradient(kOp, mnet::facts_of(dy), p, facts);
  const torch::stable::accelerator::DeviceGuard guard(facts.device_index);
  const Layout layout = layout_of(x);
  const Tensor input = mnet::dense(x, layout), gradient = mnet::dense(dy, layout);
  const Tensor taps = mnet::dense(weight, Layout::contiguous);
  const std::optional<Tensor> scales = dense(scale), shifts = dense(shift);

  Tensor dx = data ? empty_4d(x, p.N, p.C, p.H, p.W, layout) : empty_strided(x, {0}, {1});
  Tensor dweight =
      sums ? empty_4d(x, p.K, 1, p.KH, p.KW, Layout::contiguous) : empty_strided(x, {0}, {1});
  Tensor dscale = empty_floats(x, sums ? p.K : 0), dshift = empty_floats(x, sums ? p.K : 0);

  DwconvBackwardCall call{};
  call.forward = call_of(p, layout == Layout::channels_last);
  call.forward.x = input.const_data_ptr();
  call.forward.weight = taps.const_data_ptr();
  call.forward.scale = values(scales);
  call.forward.shift = values(shifts);
  call.dy = gradient.const_data_ptr();
  if (data) call.dx = dx.mutable_data_ptr();
  if (sums) {
    call.dweight = dweight.mutable_data_ptr();
    call.dscale = floats(dscale);
    call.dshift = floats(dshift);
  }

  const BackwardChoice choice = choose(call, forced_backward());
  std::optional<Tensor> dconv, partials, flipped;  // freed in the stream's order
  if (choice.needs_dconv(data)) {
    dconv = empty_4d(x, p.N, p.K, p.OH, p.OW, layout);
    call.dconv = dconv->mutable_data_ptr();
  }
  if (sums) {
    call.chunks = chunks_of(call, choice);
    call.rows = p.KH * p.KW + 2;
    partials = empty_floats(x, call.chunks * call.rows * p.K);
    call.partials = floats(*partials);
  }
  if (data && choice.needs_flipped()) {
    flipped = empty_4d(x, p.K, 1, p.KH, p.KW, Layout::contiguous);
    call.flipped = flipped->mutable_data_ptr();
  }
  launch(Launcher::on(current_stream(facts.device_index)), choice, call);
  return {dx, dweight, dscale, dshift};
}

std::vector<std::string> backward_variants() { return names_of<BackwardVariants>(); }
void force_backward(const std::string& name) { forced.set("force_backward", name); }
std::string_view forced_backward() { return forced.name(); }

}  // namespace mnet::cuda

STABLE_TORCH_LIBRARY_IMPL(mnet_kernels, CUDA, m) {
  m.impl("dwconv_bn_act_backward", TORCH_BOX(&mnet::cuda::dwconv_bn_act_backward));
}
