// What the bindings tell of the kernels; no CUDA or torch header.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mnet::cuda {

// What a call on such tensors would start.
struct CallFacts {
  std::string variant;            // the one that was chosen or is forced
  std::vector<std::string> able;  // all that can run it
  int64_t blocks;
  int threads, shared_bytes;
  int registers, local_bytes, blocks_per_sm;  // -1 where there is no GPU
};

std::vector<std::string> variants();

// Use this variant for every call from now on; the empty name chooses by the call again.
void force_variant(const std::string& name);

// The backward's kernels by the first of a call, and training's: "general" is the forward's too.
std::vector<std::string> backward_variants();

// Use this one from now on for every call that it can run; the empty name chooses by the call.
void force_backward(const std::string& name);
std::string_view forced_backward();

CallFacts facts_of_call(const std::vector<int64_t>& x, const std::string& dtype, bool channels_last,
                        const std::vector<int64_t>& weight, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation);

// The same of separable_conv; x is channels_last.
std::vector<std::string> separable_variants();
void force_separable_variant(const std::string& name);
CallFacts facts_of_separable_call(const std::vector<int64_t>& x, const std::string& dtype,
                                  const std::vector<int64_t>& dw_weight, int64_t outputs,
                                  const std::vector<int64_t>& stride,
                                  const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation, bool tf32);

// The same of conv_bn_act.
std::vector<std::string> conv_variants();
void force_conv_variant(const std::string& name);
CallFacts facts_of_conv_call(const std::vector<int64_t>& x, const std::string& dtype,
                             const std::vector<int64_t>& weight, const std::vector<int64_t>& stride,
                             const std::vector<int64_t>& padding,
                             const std::vector<int64_t>& dilation, bool tf32);

}  // namespace mnet::cuda
