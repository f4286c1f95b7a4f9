#include "dwconv_backward.cuh"
#include "dwconv_backward_launch.h"

void mnet::cuda::launch_backward_float16(const Launcher& launcher, const BackwardChoice& choice,
                                         const DwconvBackwardCall& call,
                                         const RunForward& run_forward) {
  launch_backward<float16>(launcher, choice, call, run_forward);
}
