#include "dwconv_training.cuh"
#include "dwconv_training_launch.h"

void mnet::cuda::launch_training_float32(const Launcher& launcher, std::string_view variant,
                                         const DwconvTrainingCall& call) {
  launch_training<float>(launcher, variant, call);
}
