// What the bindings tell of the kernels; no CUDA or torch header.
#pragma once

#include <cstdint>
#include <string>
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

// Use the general kernels of backward and training for every call from now on, or those that the
// call would choose.
void force_general_backward(bool general);
bool is_general_backward_forced();

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
