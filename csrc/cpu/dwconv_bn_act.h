// dwconv_bn_act on the CPU, for operators that are made of it.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "../tensor.h"

namespace mnet::cpu {

Tensor dwconv_bn_act(Tensor x, Tensor weight, std::optional<Tensor> scale,
                     std::optional<Tensor> shift, std::vector<int64_t> stride,
                     std::vector<int64_t> padding, std::vector<int64_t> dilation,
                     std::string activation, double slope);

}  // namespace mnet::cpu
