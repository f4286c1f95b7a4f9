// Tensors of the stable ABI, as the checks (problem.h) and the kernels want to see them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>

#include "problem.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // older headers have only the one without a message
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace mnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline TensorFacts facts_of(const Tensor& t) {
  TensorFacts facts;
  facts.present = true;
  const auto sizes = t.sizes();
  facts.sizes = sizes.data();
  facts.dim = static_cast<int64_t>(sizes.size());
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  switch (static_cast<ScalarType>(dtype)) {
    case ScalarType::Float: facts.dtype = DType::float32, facts.dtype_name = "float32"; break;
    case ScalarType::Double: facts.dtype = DType::float64, facts.dtype_name = "float64"; break;
    case ScalarType::Half: facts.dtype = DType::float16, facts.dtype_name = "float16"; break;
    case ScalarType::BFloat16: facts.dtype = DType::bfloat16, facts.dtype_name = "bfloat16"; break;
    default: facts.dtype_name = torch::headeronly::toString(static_cast<ScalarType>(dtype));
  }
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &facts.device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &facts.device_index));
  facts.device_name = t.is_cpu() ? "cpu" : t.is_cuda() ? "cuda" : "another device";
  if (t.is_cpu()) facts.device_index = -1;
  return facts;
}

inline TensorFacts facts_of(const std::optional<Tensor>& t) {
  return t ? facts_of(*t) : TensorFacts{};
}

enum class Layout { contiguous, channels_last };

inline bool is_channels_last(const Tensor& t) {
  const auto size = t.sizes();
  const auto stride = t.strides();
  int64_t expected = 1;
  for (int d : {1, 3, 2, 0}) {
    if (size[d] != 1 && stride[d] != expected) return false;
    expected *= size[d];
  }
  return true;
}

// The layout of a call's output: x's own; for other strides, the nearer of the two.
// mnet_kernels/registration.py says the same for fake tensors.
inline Layout layout_of(const Tensor& x) {
  if (x.is_contiguous()) return Layout::contiguous;
  if (is_channels_last(x) || x.stride(1) == 1) return Layout::channels_last;
  return Layout::contiguous;
}

// A plane of one pixel lies in memory as both layouts say: to the kernels it is channels_last.
inline bool is_one_pixel(const Tensor& t) { return t.size(2) == 1 && t.size(3) == 1; }

// A new tensor with `like`'s dtype and device; its values are not set.
inline Tensor empty_strided(const Tensor& like, std::initializer_list<int64_t> sizes,
                            std::initializer_list<int64_t> strides) {
  int32_t dtype = 0, device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                         sizes.begin(), strides.begin(), dtype,
                                                         device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty_4d(const Tensor& like, int64_t N, int64_t C, int64_t H, int64_t W,
                       Layout layout) {
  if (layout == Layout::contiguous)
    return empty_strided(like, {N, C, H, W}, {C * H * W, H * W, W, 1});
  return empty_strided(like, {N, C, H, W}, {H * W * C, 1, W * C, C});
}

// x itself if it is dense in this layout, else a copy that is.
inline Tensor dense(const Tensor& x, Layout layout) {
  if (layout == Layout::contiguous ? x.is_contiguous() : is_channels_last(x)) return x;
  Tensor copy = empty_4d(x, x.size(0), x.size(1), x.size(2), x.size(3), layout);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.get(), x.get(), 0));
  return copy;
}

// Likewise for one value a channel.
inline Tensor dense_1d(const Tensor& t) {
  if (t.is_contiguous()) return t;
  Tensor copy = empty_strided(t, {t.size(0)}, {1});
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.get(), t.get(), 0));
  return copy;
}

}  // namespace mnet
