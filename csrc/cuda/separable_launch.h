// separable_conv's kernels, to be called by name. A dtype (tf32: float32's other products)
// is a source file, so that they compile
// side by side.
#pragma once

#include <string_view>

#include "launch.h"
#include "separable_call.cuh"

namespace mnet::cuda {

void launch_separable_float32(const Launcher& launcher, std::string_view variant,
                              const SeparableCall& call);
void launch_separable_tf32(const Launcher& launcher, std::string_view variant,
                           const SeparableCall& call);
void launch_separable_float16(const Launcher& launcher, std::string_view variant,
                              const SeparableCall& call);
void launch_separable_bfloat16(const Launcher& launcher, std::string_view variant,
                               const SeparableCall& call);

}  // namespace mnet::cuda
