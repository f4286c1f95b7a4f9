// separable_conv on the CPU, float32 and bfloat16: channels_last inside, x's layout outside.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../separable.h"
#include "../tensor.h"
#include "active.h"
#include "constants.h"
#include "launch.h"
#include "memory.h"
#include "pair.h"
#include "result_memory.h"
#include "strip.h"

namespace mnet::cpu {

Tensor separable_conv(Tensor x, Tensor dw_weight, std::optional<Tensor> dw_scale,
                      std::optional<Tensor> dw_shift, Tensor pw_weight,
                      std::optional<Tensor> pw_scale, std::optional<Tensor> pw_shift,
                      std::optional<Tensor> residual, std::vector<int64_t> stride,
                      std::vector<int64_t> padding, std::vector<int64_t> dilation,
                      std::string dw_activation, std::string pw_activation, double slope,
                      bool /*tf32*/) {
  constexpr const char* kOp = "separable_conv";
  const TensorFacts facts = facts_of(x);
  const auto [p, q] = checked_separable(
      kOp,
      {facts, facts_of(dw_weight), facts_of(dw_scale), facts_of(dw_shift), facts_of(pw_weight),
       facts_of(pw_scale), facts_of(pw_shift), facts_of(residual)},
      std::move(stride), std::move(padding), std::move(dilation), std::move(dw_activation),
      std::move(pw_activation), slope);
  if (p.dtype != DType::float32 && p.dtype != DType::bfloat16)
    check::fail(kOp, "x", "float32 or bfloat16", facts.dtype_name);
  const Layout layout = layout_of(x);
  Tensor y = empty_result(x, q.N, q.K, q.OH, q.OW, Layout::channels_last);
  if (p.N > 0) {
    const Tensor input = dense(x, Layout::channels_last);
    if (residual) residual = dense(*residual, Layout::channels_last);
    thread_local std::vector<float> dw_memory, dw_scale_memory, dw_shift_memory, pw_memory,
        pw_scale_memory, pw_shift_memory;
    DwconvCall first = dwconv_call(p);
    const bool keep_type = narrowed_kernels(p.K).dwconv_keeps_weight(first);
    first.x = input.const_data_ptr();
    first.weight = by_tap<float>(p, dw_weight, keep_type, dw_memory);
    first.scale = per_channel<float>(dw_scale, p.K, 1.0f, dw_scale_memory);
    first.shift = per_channel<float>(dw_shift, p.K, 0.0f, dw_shift_memory);
    pw_memory.resize(static_cast<std::size_t>(packed_bytes(q) / 4));
    pack_panels(pw_weight, pw_memory.data());
    ConvCall second = conv_call(q);
    second.weight = pw_memory.data();
    second.scale = per_panel(pw_scale, q.K, 1.0f, pw_scale_memory);
    second.shift = per_panel(pw_shift, q.K, 0.0f, pw_shift_memory);
    second.residual = residual ? residual->const_data_ptr() : nullptr;
    second.y = y.mutable_data_ptr();

    const int64_t threads = torch::stable::get_num_threads();
    if (const PairCost cost = pair_cost(first, second, threads);
        in_one_go(cost, Pairing::by_cost)) {
      run_strips({{first}, {second}}, pair_rows(first, second, threads), threads);
    } else {  // what is between them is small then
      const int64_t bytes = p.N * p.K * p.OH * p.OW * (p.dtype == DType::bfloat16 ? 2 : 4);
      first.y = scratch_bytes<Scratch::sequence>(static_cast<std::size_t>(bytes));
      second.x = first.y;
      run_dwconv_channels_last(first, p, threads);
      run_conv(second, q, threads);
    }
  }
  return dense(y, layout);
}

}  // namespace mnet::cpu

STABLE_TORCH_LIBRARY_IMPL(mnet_kernels, CPU, m) {
  m.impl("separable_conv", TORCH_BOX(&mnet::cpu::separable_conv));
}
