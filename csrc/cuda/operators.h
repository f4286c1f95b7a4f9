// What the operators' own files share: checks and conversions of tensors for a GPU.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../tensor.h"

namespace mnet::cuda {

inline void check_dtype(const char* op, const Problem& p) {
  if (p.dtype == DType::float64)
    check::fail(op, "x", "float32, float16 or bfloat16 on a GPU", "float64");
}

inline void* current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// float32, (count,), on like's device.
inline Tensor empty_floats(const Tensor& like, int64_t count) {
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      1, &count, &stride, aoti_torch_dtype_float32(), device_type, device_index, &handle));
  return Tensor(handle);
}

// One value a channel, or null.
inline const float* values(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

inline float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

inline std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(dense_1d(*t)) : t;
}

}  // namespace mnet::cuda
