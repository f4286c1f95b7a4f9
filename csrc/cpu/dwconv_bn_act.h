// dwconv_bn_act on the CPU, for operators that are made of it and for calls from Python.
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

Tensor run_dwconv_bn_act(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& shift, const Conv2dArguments& constants);

}  // namespace mnet::cpu
