#include "conv_launch.h"
#include "conv_variants.cuh"

void mnet::cuda::launch_conv_float32(const Launcher& launcher, std::string_view variant,
                                     const ConvCall& call) {
  ConvVariants::launch<float>(launcher, variant, call);
}
