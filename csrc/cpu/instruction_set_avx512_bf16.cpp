// AVX-512 (F, BW, DQ, VL) with its bfloat16 conversions and products, x86-64 only: bfloat16's
// forward kernels. Everything else is avx512's.
#if defined(__x86_64__)
#include <cstdint>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#include <immintrin.h>

#define MNET_AVX512
#define MNET_AVX512_BF16
#define MNET_VECTOR_BYTES 64
#define MNET_REGISTERS 32

namespace mnet::cpu {
namespace avx512 {
extern const Kernels kKernels;
extern const TrainingKernels kTraining;
}  // namespace avx512
namespace avx512_bf16 {
namespace {

#include "forward_kernels.inc"

// Own where the call is in bfloat16, else avx512's kernel.
template <auto Kernel, auto Own, typename Call, typename... Rest>
auto either(const Call& call, Rest... rest) {
  if (call.element == Element::bf16) return Own(call, rest...);
  return (avx512::kKernels.*Kernel)(call, rest...);
}

}  // namespace

extern const Kernels kKernels = {
    "avx512_bf16",
    kWidth<float>,
    either<&Kernels::dwconv_channels_last, dw_channels_last<bf16>>,
    either<&Kernels::dwconv_contiguous, dw_contiguous<bf16>>,
    dwconv_keeps_weight,
    dwconv_contiguous_is_direct,
    dw_contiguous_scratch,
    either<&Kernels::conv_channels_last, convolve<bf16>>,
    either<&Kernels::conv_channels_last_scratch, convolve_scratch<bf16>>,
    either<&Kernels::pool_channels_last, pool<bf16>>,
    either<&Kernels::sigmoid_channels_last, sigmoid_map<bf16>>,
    either<&Kernels::scale_channels_last, scale_map<bf16>>,
    interleave,
    &avx512::kTraining,
};

}  // namespace avx512_bf16
}  // namespace mnet::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
