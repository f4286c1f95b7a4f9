#include "conv_launch.h"
#include "conv_variants.cuh"

void mnet::cuda::launch_conv_float16(const Launcher& launcher, std::string_view variant,
                                     const ConvCall& call) {
  ConvVariants::launch<float16>(launcher, variant, call);
}
