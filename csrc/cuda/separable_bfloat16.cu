#include "separable_launch.h"
#include "separable_variants.cuh"

void mnet::cuda::launch_separable_bfloat16(const Launcher& launcher, std::string_view variant,
                                           const SeparableCall& call) {
  SeparableVariants::launch<bfloat16>(launcher, variant, call);
}
