// A call's weights and per-channel values as the kernels read them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "../tensor.h"
#include "launch.h"

namespace mnet::cpu {

// `t`'s values if they lie one after the other, else a copy of them; `fill` where t is None.
template <typename Acc>
inline const Acc* per_channel(const std::optional<Tensor>& t, int64_t K, Acc fill,
                              std::vector<Acc>& memory) {
  if (t && (K == 1 || t->stride(0) == 1)) return static_cast<const Acc*>(t->const_data_ptr());
  memory.assign(static_cast<std::size_t>(K), fill);
  if (t)
    for (int64_t k = 0; k < K; ++k)
      memory[static_cast<std::size_t>(k)] =
          static_cast<const Acc*>(t->const_data_ptr())[k * t->stride(0)];
  return memory.data();
}

// The weights as the kernels read them, [tap][channel], in the accumulator's type or their own: as
// they are where the caller laid them out so, else a copy.
template <typename Elem, typename Acc>
const Acc* by_tap_from(const Problem& p, const Tensor& weight, std::vector<Acc>& memory) {
  const auto* from = static_cast<const Elem*>(weight.const_data_ptr());
  const auto stride = weight.strides();
  if constexpr (std::is_same_v<Elem, Acc>)
    if ((p.K == 1 || stride[0] == 1) && (p.KH == 1 || stride[2] == p.KW * p.K) &&
        (p.KW == 1 || stride[3] == p.K))
      return from;
  memory.resize(static_cast<std::size_t>(p.KH * p.KW * p.K));
  // Tap by tap: channel by channel would write to every tap's row in turn, and rows of 1024
  // channels share their cache set.
  Acc* to = memory.data();
  for (int64_t h = 0; h < p.KH; ++h)
    for (int64_t w = 0; w < p.KW; ++w) {
      const Elem* tap = from + h * stride[2] + w * stride[3];
      const int64_t step = stride[0];
      for (int64_t k = 0; k < p.K; ++k) *to++ = static_cast<Acc>(tap[k * step]);
    }
  return memory.data();
}

template <typename Acc>
const void* by_tap(const Problem& p, const Tensor& weight, bool keep_type,
                   std::vector<Acc>& memory) {
  using torch::headeronly::BFloat16;
  thread_local std::vector<BFloat16> kept_memory;
  switch (p.dtype) {
    case DType::bfloat16:
      return keep_type ? static_cast<const void*>(by_tap_from<BFloat16>(p, weight, kept_memory))
                       : by_tap_from<BFloat16>(p, weight, memory);
    case DType::float16: return by_tap_from<torch::headeronly::Half>(p, weight, memory);
    default: return by_tap_from<Acc>(p, weight, memory);
  }
}

// `t`'s values, or `fill` where it is None, filled up to whole panels.
inline const float* per_panel(const std::optional<Tensor>& t, int64_t K, float fill,
                              std::vector<float>& memory) {
  memory.assign(static_cast<std::size_t>(panels_of(K) * kPanel), fill);
  if (t)
    for (int64_t k = 0; k < K; ++k)
      memory[static_cast<std::size_t>(k)] =
          static_cast<const float*>(t->const_data_ptr())[k * t->stride(0)];
  return memory.data();
}

// The weight of a dense convolution, float32 or bfloat16, as panels [panel][step][32 channels], the
// taps of a channel in the order kh, kw, C_in: a step is one tap in float32, a pair of taps side by
// side in bfloat16. packed_bytes of it.
void pack_panels(const Tensor& weight, void* to);

}  // namespace mnet::cpu
