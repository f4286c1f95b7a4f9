// The forward kernels of dwconv_bn_act, to be called by name. A dtype is a source file, so that
// they compile side by side.
#pragma once

#include <string_view>

#include "dwconv_call.cuh"
#include "launch.h"

namespace mnet::cuda {

void launch_float32(const Launcher& launcher, std::string_view variant, const DwconvCall& call);
void launch_float16(const Launcher& launcher, std::string_view variant, const DwconvCall& call);
void launch_bfloat16(const Launcher& launcher, std::string_view variant, const DwconvCall& call);

}  // namespace mnet::cuda
