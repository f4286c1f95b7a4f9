// conv_bn_act's kernels, to be called by name. A dtype (tf32: float32's other products)
// is a source file, so that they compile side
// by side.
#pragma once

#include <string_view>

#include "conv_call.cuh"
#include "launch.h"

namespace mnet::cuda {

void launch_conv_float32(const Launcher& launcher, std::string_view variant, const ConvCall& call);
void launch_conv_tf32(const Launcher& launcher, std::string_view variant, const ConvCall& call);
void launch_conv_float16(const Launcher& launcher, std::string_view variant, const ConvCall& call);
void launch_conv_bfloat16(const Launcher& launcher, std::string_view variant, const ConvCall& call);

}  // namespace mnet::cuda
