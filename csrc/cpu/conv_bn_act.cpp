// conv_bn_act on the CPU: a dense convolution with packed weights, one pass with its epilogue;
// float32 and bfloat16.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../tensor.h"
#include "constants.h"
#include "kernels.h"
#include "launch.h"
#include "result_memory.h"

namespace mnet::cpu {
namespace {

// Pieces of kBlock taps at a time, so that what is written stays in the first-level cache.
template <typename T, int64_t TapsInStep>
void pack(const Tensor& weight, int64_t steps, T* to) {
  constexpr int64_t kBlock = 16;
  const int64_t K = weight.size(0), C = weight.size(1), KH = weight.size(2), KW = weight.size(3);
  const int64_t taps = KH * KW * C, all = steps * TapsInStep;
  const auto* from = static_cast<const T*>(weight.const_data_ptr());
  const auto stride = weight.strides();
  std::vector<int64_t> offsets(static_cast<std::size_t>(taps));  // of a tap in its channel
  for (int64_t t = 0; t < taps; ++t)
    offsets[static_cast<std::size_t>(t)] =
        t % C * stride[1] + t / C / KW * stride[2] + t / C % KW * stride[3];
  torch::stable::parallel_for(0, panels_of(K), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t first = 0; first < all; first += kBlock)
        for (int64_t i = 0; i < kPanel; ++i) {
          const int64_t k = panel * kPanel + i;
          T* column = to + (panel * steps * kPanel + i) * TapsInStep;
          for (int64_t t = first; t < std::min(first + kBlock, all); ++t)
            column[t / TapsInStep * kPanel * TapsInStep + t % TapsInStep] =
                k >= K || t >= taps ? T(0)
                                    : from[k * stride[0] + offsets[static_cast<std::size_t>(t)]];
        }
  });
}

}  // namespace

void pack_panels(const Tensor& weight, void* to) {
  const int64_t taps = weight.size(1) * weight.size(2) * weight.size(3);
  if (facts_of(weight).dtype == DType::bfloat16)
    pack<std::uint16_t, 2>(weight, (taps + 1) / 2, static_cast<std::uint16_t*>(to));
  else
    pack<float, 1>(weight, taps, static_cast<float*>(to));
}

// The panels of pack_panels as a tensor (panels, 1, steps, 32 or 64).
Tensor pack_conv_weight(Tensor weight) {
  const TensorFacts facts = facts_of(weight);
  const bool pairs = facts.dtype == DType::bfloat16;
  if (facts.dim != 4 || !(pairs || facts.dtype == DType::float32) || !weight.is_cpu())
    check::fail("pack_conv_weight", "weight",
                "a float32 or bfloat16 CPU tensor of shape (C_out, C_in, Kh, Kw)",
                std::string(facts.dtype_name) + " of " + check::shape(facts) + " on " +
                    check::device(facts));
  const int64_t K = weight.size(0), C = weight.size(1), KH = weight.size(2), KW = weight.size(3);
  const int64_t taps = KH * KW * C, steps = pairs ? (taps + 1) / 2 : taps;
  Tensor packed =
      empty_4d(weight, panels_of(K), 1, steps, pairs ? 2 * kPanel : kPanel, Layout::contiguous);
  pack_panels(weight, packed.mutable_data_ptr());
  return packed;
}

Tensor conv_bn_act_packed(Tensor x, Tensor packed, std::optional<Tensor> scale,
                          std::optional<Tensor> shift, std::vector<int64_t> kernel,
                          std::vector<int64_t> stride, std::vector<int64_t> padding,
                          std::vector<int64_t> dilation, int64_t out_channels,
                          std::string activation, double slope) {
  const TensorFacts x_facts = facts_of(x);
  // The weight as it was before packing, for the checks.
  int64_t weight_sizes[4] = {out_channels, x_facts.dim == 4 ? x_facts.sizes[1] : 1, 0, 0};
  check::pair("conv_bn_act", "kernel", kernel, &weight_sizes[2], &weight_sizes[3]);
  TensorFacts weight = facts_of(packed);
  weight.sizes = weight_sizes;
  weight.dim = 4;
  const Problem p =
      checked_problem("conv_bn_act", x_facts, weight, facts_of(scale), facts_of(shift),
                      {std::move(stride), std::move(padding), std::move(dilation),
                       std::move(activation), slope, 1});
  const int64_t taps = p.KH * p.KW * p.C;
  if (p.dtype != DType::float32 && p.dtype != DType::bfloat16)
    check::fail("conv_bn_act", "x", "float32 or bfloat16", x_facts.dtype_name);
  const int64_t values = packed_bytes(p) / (p.dtype == DType::bfloat16 ? 2 : 4);
  if (packed.numel() != values || !packed.is_contiguous())
    check::fail("conv_bn_act", "packed",
                check::join(values, " contiguous values from pack_conv_weight for ", p.K,
                            " channels of ", taps, " taps"),
                check::join(packed.numel(), " values"));
  const Tensor input = dense(x, Layout::channels_last);
  Tensor y = empty_result(x, p.N, p.K, p.OH, p.OW, Layout::channels_last);
  if (p.N == 0) return y;

  thread_local std::vector<float> scale_memory, shift_memory;
  ConvCall call = conv_call(p);
  call.x = input.const_data_ptr();
  call.weight = packed.const_data_ptr();
  call.scale = per_panel(scale, p.K, 1.0f, scale_memory);
  call.shift = per_panel(shift, p.K, 0.0f, shift_memory);
  call.y = y.mutable_data_ptr();
  run_conv(call, p, torch::stable::get_num_threads());
  return y;
}

}  // namespace mnet::cpu

STABLE_TORCH_LIBRARY_IMPL(mnet_kernels, CPU, m) {
  m.impl("conv_bn_act_packed", TORCH_BOX(&mnet::cpu::conv_bn_act_packed));
  m.impl("pack_conv_weight", TORCH_BOX(&mnet::cpu::pack_conv_weight));
}
