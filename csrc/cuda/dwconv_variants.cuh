// The forward kernels of dwconv_bn_act and the choice between them.
#pragma once

#include "dwconv_general.cuh"
#include "variants.cuh"

namespace mnet::cuda {

using DwconvVariants = Variants<DwconvGeneral>;

inline const char* choose(const DwconvCall&) { return DwconvGeneral::kName; }

}  // namespace mnet::cuda
