// The elements that this program is compiled for.
#pragma once

#include <stdexcept>

#include "../../csrc/cuda/dwconv_call.cuh"
#include "../../csrc/cuda/mma.cuh"

namespace mnet::cuda {

// f(element) for a request's elements. Under a sanitizer float and bfloat16 only: the others have
// the accesses and barriers of these two, and take a third of all compiling.
template <typename F>
void with_compiled(DType dtype, F&& f) {
#ifdef EMULATION_SANITIZED
  if (dtype == DType::bfloat16) return f(bfloat16{});
  if (dtype == DType::float32) return f(float{});
  throw std::runtime_error("under a sanitizer elements are float32 or bfloat16");
#else
  with_element(dtype, f);
#endif
}

// The same for matrix products, which may be of float32 rounded to TF32.
template <typename F>
void with_compiled_product(DType dtype, bool rounded, F&& f) {
#ifdef EMULATION_SANITIZED
  if (rounded) throw std::runtime_error("under a sanitizer products are not TF32's");
#else
  if (rounded) return f(tf32{});
#endif
  with_compiled(dtype, f);
}

}  // namespace mnet::cuda
