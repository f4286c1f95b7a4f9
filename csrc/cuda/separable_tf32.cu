#include "separable_launch.h"
#include "separable_variants.cuh"

void mnet::cuda::launch_separable_tf32(const Launcher& launcher, std::string_view variant,
                                       const SeparableCall& call) {
  SeparableVariants::launch<tf32>(launcher, variant, call);
}
