#include "dwconv_launch.h"
#include "dwconv_variants.cuh"

void mnet::cuda::launch_float16(const Launcher& launcher, std::string_view variant,
                                const DwconvCall& call) {
  DwconvVariants::launch<float16>(launcher, variant, call);
}
