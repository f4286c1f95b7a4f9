// dwconv_bn_act on the CPU: check the call, make its memory dense, cut it into tasks for torch's
// threads, and hand these to the kernels of the instruction set in use.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../tensor.h"
#include "active.h"
#include "constants.h"
#include "dwconv_bn_act.h"
#include "kernels.h"
#include "launch.h"
#include "memory.h"

namespace mnet::cpu {
namespace {

// contiguous: a unit is a block of rows of one plane; where planes are staged, small enough for the
// copy and the result to stay in the first-level cache.
int64_t plan_contiguous(DwconvCall& call, bool direct, int64_t threads) {
  constexpr int64_t kCacheElements = 6144;
  const int64_t planes = call.N * call.K;
  int64_t rows =
      direct ? call.OH : std::max<int64_t>(4, kCacheElements / (2 * (call.OW + call.KW)) / 4 * 4);
  if (threads > 1 && planes < 2 * threads)
    rows = std::min(rows, std::max<int64_t>(4, call.OH / (2 * threads)));
  call.rows_per_task = std::min(rows, call.OH);
  call.row_tasks = (call.OH + call.rows_per_task - 1) / call.rows_per_task;
  return planes * call.row_tasks;
}

// Below so many bytes in and out a call is done before a second thread would have begun.
int64_t threads_for(const Problem& p, int64_t element_size) {
  constexpr int64_t kWorthSharing = 128 << 10;
  const int64_t elements = p.N * (p.C * p.H * p.W + p.K * p.OH * p.OW);
  return elements * element_size < kWorthSharing ? 1 : torch::stable::get_num_threads();
}

template <typename Acc>
void run(DwconvCall& call, const Problem& p, const Tensor& weight,
         const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, Layout layout) {
  thread_local std::vector<Acc> weight_memory, scale_memory, shift_memory;
  const bool contiguous = layout == Layout::contiguous;
  // Vectors must not be wider than a pixel's channels.
  const Kernels& kernels = contiguous ? active_kernels() : narrowed_kernels(p.K);
  const bool direct = contiguous && kernels.dwconv_contiguous_is_direct(call);
  if (direct) {
    const auto stride = weight.strides();
    call.weight = weight.const_data_ptr();
    call.weight_channel = stride[0], call.weight_row = stride[2], call.weight_column = stride[3];
  } else {
    const bool keep_type = !contiguous && kernels.dwconv_keeps_weight(call);
    call.weight = by_tap<Acc>(p, weight, keep_type, weight_memory);
  }
  call.scale = per_channel<Acc>(scale, p.K, Acc(1), scale_memory);
  call.shift = per_channel<Acc>(shift, p.K, Acc(0), shift_memory);

  const int64_t threads = threads_for(p, weight.element_size());
  if (!contiguous) return run_dwconv_channels_last(call, p, threads);
  const int64_t tasks = plan_contiguous(call, direct, threads);
  const int64_t scratch = direct ? 0 : kernels.dwconv_contiguous_scratch(call);
  const auto bytes = static_cast<std::size_t>(scratch) * sizeof(Acc);
  share(tasks, threads, [&](int64_t begin, int64_t end) {
    kernels.dwconv_contiguous(call, begin, end, scratch_bytes<Scratch::kernel>(bytes));
  });
}

}  // namespace

Tensor run_dwconv_bn_act(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& shift, const Conv2dArguments& constants) {
  const Problem p = checked_problem("dwconv_bn_act", facts_of(x), facts_of(weight), facts_of(scale),
                                    facts_of(shift), constants);
  const Layout layout = layout_of(x);
  const Tensor input = dense(x, layout);
  Tensor y = empty_result(x, p.N, p.K, p.OH, p.OW, layout);
  if (p.N == 0) return y;

  const bool one_pixel = is_one_pixel(input) && is_one_pixel(y) && is_channels_last(input);
  const Layout order = one_pixel ? Layout::channels_last : layout;
  DwconvCall call = dwconv_call(p);
  call.x = input.const_data_ptr();
  call.y = y.mutable_data_ptr();
  if (p.dtype == DType::float64)
    run<double>(call, p, weight, scale, shift, order);
  else
    run<float>(call, p, weight, scale, shift, order);
  return y;
}

Tensor dwconv_bn_act(Tensor x, Tensor weight, std::optional<Tensor> scale,
                     std::optional<Tensor> shift, std::vector<int64_t> stride,
                     std::vector<int64_t> padding, std::vector<int64_t> dilation,
                     std::string activation, double slope) {
  return run_dwconv_bn_act(
      x, weight, scale, shift,
      {std::move(stride), std::move(padding), std::move(dilation), std::move(activation), slope});
}

}  // namespace mnet::cpu

STABLE_TORCH_LIBRARY_IMPL(mnet_kernels, CPU, m) {
  m.impl("dwconv_bn_act", TORCH_BOX(&mnet::cpu::dwconv_bn_act));
}
