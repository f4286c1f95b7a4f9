#include "dwconv_launch.h"
#include "dwconv_variants.cuh"

void mnet::cuda::launch_bfloat16(const Launcher& launcher, std::string_view variant,
                                 const DwconvCall& call) {
  DwconvVariants::launch<bfloat16>(launcher, variant, call);
}
