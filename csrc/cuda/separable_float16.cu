#include "separable_launch.h"
#include "separable_variants.cuh"

void mnet::cuda::launch_separable_float16(const Launcher& launcher, std::string_view variant,
                                          const SeparableCall& call) {
  SeparableVariants::launch<float16>(launcher, variant, call);
}
