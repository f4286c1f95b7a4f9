// One depthwise call as kernels take it, and what every forward kernel does with its sums.
#pragma once

#include <type_traits>

#include "../problem.h"
#include "memory.cuh"

namespace mnet::cuda {

// Dense tensors: x (N, C, H, W) and y (N, K, OH, OW) both contiguous or both channels_last, weight
// (K, 1, KH, KW) contiguous; scale and shift (K,) or null for 1 and 0. Sizes are 64-bit here and
// cost nothing so: a kernel that casts one to int reads the low word of the constant bank.
struct DwconvCall {
  const void* x;
  const void* weight;
  const float* scale;
  const float* shift;
  void* y;
  int64_t N, C, H, W;
  int64_t K, OH, OW, multiplier;
  int64_t KH, KW, SH, SW, DH, DW, top, left;
  float slope;
  Activation activation;
  DType dtype;
  bool channels_last;
};

// All but the pointers.
inline DwconvCall call_of(const Problem& p, bool channels_last) {
  DwconvCall call{};
  call.N = p.N, call.C = p.C, call.H = p.H, call.W = p.W;
  call.K = p.K, call.OH = p.OH, call.OW = p.OW, call.multiplier = p.multiplier;
  call.KH = p.KH, call.KW = p.KW, call.SH = p.SH, call.SW = p.SW, call.DH = p.DH, call.DW = p.DW;
  call.top = p.top, call.left = p.left;
  call.slope = static_cast<float>(p.slope);
  call.activation = p.activation;
  call.dtype = p.dtype;
  call.channels_last = channels_last;
  return call;
}

// Whether all of `counts` can be 32-bit indices, with room for a block's threads past the end.
inline bool fit_int32(std::initializer_list<int64_t> counts) {
  for (int64_t count : counts)
    if (count > INT32_MAX - 65536) return false;
  return true;
}

inline bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

inline int64_t element_bytes(const DwconvCall& call) {
  return call.dtype == DType::float32 ? 4 : 2;
}

// Calls f(element) with a value of the type that x, weight and y hold.
template <typename F>
void with_element(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(float{});
    case DType::float16: return f(float16{});
    case DType::bfloat16: return f(bfloat16{});
    default: throw std::runtime_error("the CUDA kernels take float32, float16 and bfloat16");
  }
}

// NaN stays NaN.
__device__ __forceinline__ float clamp(float z, float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(z) : "f"(low));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(z) : "f"(high));
  return z;
#else
  z = z < low ? low : z;
  return z > high ? high : z;
#endif
}

// Activations that are a clamp need no switch.
MNET_HOST_DEVICE bool clamps(Activation activation) {
  return activation == Activation::identity || activation == Activation::relu ||
         activation == Activation::relu6;
}

// Which activations a kernel is compiled for.
enum class Activations { clamps, others, any };

// Calls f(constant Activations): of kernels that are Split, those for clamps apart from the others.
template <bool Split, typename F>
void with_activations(const DwconvCall& call, F&& f) {
  if constexpr (!Split)
    return f(std::integral_constant<Activations, Activations::any>{});
  else if (clamps(call.activation))
    return f(std::integral_constant<Activations, Activations::clamps>{});
  else
    return f(std::integral_constant<Activations, Activations::others>{});
}

// z[i] = act(z[i]): a switch is passed once for all of them.
template <Activations Known = Activations::any, int Count>
__device__ __forceinline__ void activate_all(Activation activation, float slope,
                                             float (&z)[Count]) {
  if (Known == Activations::clamps || (Known == Activations::any && clamps(activation))) {
    const float low = activation == Activation::identity ? -INFINITY : 0;
    const float high = activation == Activation::relu6 ? 6 : INFINITY;
#pragma unroll
    for (int i = 0; i < Count; ++i) z[i] = clamp(z[i], low, high);
    return;
  }
  switch (activation) {
#define MNET_CASE(name)                                      \
  case Activation::name:                                     \
    _Pragma("unroll") for (int i = 0; i < Count; ++i) z[i] = \
        activate(Activation::name, slope, z[i]);             \
    break;
    MNET_CASE(leaky_relu)
    MNET_CASE(hardswish)
    MNET_CASE(silu)
    MNET_CASE(hardsigmoid)
#undef MNET_CASE
    case Activation::identity:
    case Activation::relu:
    case Activation::relu6: break;  // clamps
  }
}

// scale[k], or 1 where there is none; likewise shift and 0.
__device__ __forceinline__ float per_channel(const float* values, int64_t k, float otherwise) {
  return values ? load<1>(values + k).lane[0] : otherwise;
}

}  // namespace mnet::cuda
