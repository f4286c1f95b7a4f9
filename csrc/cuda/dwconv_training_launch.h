// The passes of training over x, to be called by dtype (each a source file, so that they compile
// side by side), and its steps a channel.
#pragma once

#include <string_view>

#include "dwconv_training_call.cuh"
#include "launch.h"

namespace mnet::cuda {

// variant: that of the pass that call.backward.pass names.
void launch_training_float32(const Launcher& launcher, std::string_view variant,
                             const DwconvTrainingCall& call);
void launch_training_float16(const Launcher& launcher, std::string_view variant,
                             const DwconvTrainingCall& call);
void launch_training_bfloat16(const Launcher& launcher, std::string_view variant,
                              const DwconvTrainingCall& call);

void launch_training_channels(const Launcher& launcher, ChannelStep step,
                              const DwconvTrainingCall& call);

}  // namespace mnet::cuda
