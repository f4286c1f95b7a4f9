#include "conv_launch.h"
#include "conv_variants.cuh"

void mnet::cuda::launch_conv_tf32(const Launcher& launcher, std::string_view variant,
                                  const ConvCall& call) {
  ConvVariants::launch<tf32>(launcher, variant, call);
}
