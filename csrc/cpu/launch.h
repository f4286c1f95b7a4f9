// From a checked problem to the kernels of the instruction set in use: how a call is cut into tasks
// for torch's threads.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "kernels.h"

namespace mnet::cpu {

inline int64_t panels_of(int64_t channels) { return (channels + kPanel - 1) / kPanel; }

// A call with all but its pointers.
DwconvCall dwconv_call(const Problem& p);
ConvCall conv_call(const Problem& p);

// Runs a call whose pointers are set, channels_last, on `threads` of torch's threads; on the
// calling one alone where that is 1.
void run_dwconv_channels_last(DwconvCall& call, const Problem& p, int64_t threads);
void run_conv(ConvCall& call, const Problem& p, int64_t threads);

}  // namespace mnet::cpu
