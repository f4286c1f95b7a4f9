#include "dwconv_training.cuh"
#include "dwconv_training_launch.h"

void mnet::cuda::launch_training_bfloat16(const Launcher& launcher, std::string_view variant,
                                          const DwconvTrainingCall& call) {
  launch_training<bfloat16>(launcher, variant, call);
}
