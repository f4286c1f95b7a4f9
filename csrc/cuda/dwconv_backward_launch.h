// The backward of dwconv_bn_act, to be called by dtype. A dtype is a source file, so that they
// compile side by side.
#pragma once

#include <functional>

#include "dwconv_backward_call.cuh"
#include "launch.h"

namespace mnet::cuda {

struct BackwardChoice;

// Starts a forward kernel: where dx is a forward call of its own.
using RunForward = std::function<void(const DwconvCall&)>;

void launch_backward_float32(const Launcher& launcher, const BackwardChoice& choice,
                             const DwconvBackwardCall& call, const RunForward& run_forward);
void launch_backward_float16(const Launcher& launcher, const BackwardChoice& choice,
                             const DwconvBackwardCall& call, const RunForward& run_forward);
void launch_backward_bfloat16(const Launcher& launcher, const BackwardChoice& choice,
                              const DwconvBackwardCall& call, const RunForward& run_forward);

}  // namespace mnet::cuda
