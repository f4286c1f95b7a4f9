// dwconv_bn_act_backward on a GPU: check the call, make its memory dense, allocate the results and
// the room for what lies between the steps, start the kernels on the current stream of x's device.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../tensor.h"
#include "dwconv_backward.cuh"
#include "dwconv_backward_launch.h"
#include "dwconv_launch.h"
#include "dwconv_variants.cuh"

namespace mnet::cuda {
namespace {

constexpr const char* kOp = "dwconv_bn_act_backward";

void check_dtype(const Problem& p) {
  if (p.dtype == DType::float64)
    check::fail(kOp, "x", "float32, float16 or bfloat16 on a GPU", "float64");
}

void check_gradient(const TensorFacts& dy, const Problem& p, const TensorFacts& x) {
  const int64_t shape[] = {p.N, p.K, p.OH, p.OW};
  if (dy.dim != 4 || !std::equal(shape, shape + 4, dy.sizes))
    check::fail(kOp, "dy", "the output's shape " + check::show(shape, 4), check::shape(dy));
  if (dy.dtype != x.dtype)
    check::fail(kOp, "dy", check::join("x's dtype ", x.dtype_name), dy.dtype_name);
  if (!dy.same_device(x))
    check::fail(kOp, "dy", "x's device " + check::device(x), check::device(dy));
}

Tensor empty_floats(const Tensor& like, int64_t count) {
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      1, &count, &stride, aoti_torch_dtype_float32(), device_type, device_index, &handle));
  return Tensor(handle);
}

void* current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

const float* values(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(dense_1d(*t)) : t;
}

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
  const TensorFacts facts = facts_of(x);
  const Problem p = checked_problem(
      kOp, facts, facts_of(weight), facts_of(scale), facts_of(shift),
      {std::move(stride), std::move(padding), std::move(dilation), std::move(activation), slope});
  check_dtype(p);
  check_gradient(facts_of(dy), p, facts);
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
    call.dscale = static_cast<float*>(dscale.mutable_data_ptr());
    call.dshift = static_cast<float*>(dshift.mutable_data_ptr());
  }

  const BackwardChoice choice = choose(call);
  std::optional<Tensor> dconv, partials, flipped;  // freed in the stream's order
  if (data || needs_dconv(choice)) {
    dconv = empty_4d(x, p.N, p.K, p.OH, p.OW, layout);
    call.dconv = dconv->mutable_data_ptr();
  }
  if (sums) {
    call.chunks = p.N == 0 ? 0 : share_of(call, choice).chunks;
    partials = empty_floats(x, call.chunks * (p.KH * p.KW + 2) * p.K);
    call.partials = static_cast<float*>(partials->mutable_data_ptr());
  }
  if (data) {
    flipped = empty_4d(x, p.K, 1, p.KH, p.KW, Layout::contiguous);
    call.flipped = flipped->mutable_data_ptr();
  }
  launch(Launcher::on(current_stream(facts.device_index)), choice, call);
  return {dx, dweight, dscale, dshift};
}

}  // namespace mnet::cuda

STABLE_TORCH_LIBRARY_IMPL(mnet_kernels, CUDA, m) {
  m.impl("dwconv_bn_act_backward", TORCH_BOX(&mnet::cuda::dwconv_bn_act_backward));
}
