#include "separable_launch.h"
#include "separable_variants.cuh"

void mnet::cuda::launch_separable_float32(const Launcher& launcher, std::string_view variant,
                                          const SeparableCall& call) {
  SeparableVariants::launch<float>(launcher, variant, call);
}
