// Memory of large results. To the system's allocator every one of them is new, and each of its
// pages costs a fault and a clearing when it is first written: a tenth and more of a training step.
// So it is kept when PyTorch gives it back, for the next result of the same size.
#pragma once

#include "../tensor.h"

namespace mnet::cpu {

// A new dense tensor of `like`'s dtype; its values are not set. Its storage cannot be resized.
Tensor empty_result(const Tensor& like, int64_t N, int64_t C, int64_t H, int64_t W, Layout layout);

}  // namespace mnet::cpu
