// What an operator's own file does with its table of variants (variants.cuh): chooses, is told by
// tests and benchmarks which one to take, and tells what a call would start.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string_view>

#include "../problem.h"
#include "facts.h"
#include "launch.h"

namespace mnet::cuda {

// The variant that is forced for every call, if any.
template <typename Variants>
class Forced {
 public:
  // The empty name: none. `caller` is the function that an error names.
  void set(const char* caller, const std::string& name) {
    const char* found = nullptr;
    for (const char* known : Variants::names())
      if (name == known) found = known;
    if (found == nullptr && !name.empty())
      throw std::runtime_error(std::string(caller) + ": there is no variant '" + name + "'");
    name_.store(found);
  }

  // Empty: none is.
  std::string_view name() const {
    const char* name = name_.load();
    return name != nullptr ? name : "";
  }

  template <typename Call>
  const char* or_chosen(const Call& call) const {
    const char* name = name_.load();
    return name != nullptr ? name : choose(call);
  }

 private:
  std::atomic<const char*> name_{nullptr};
};

template <typename Variants>
std::vector<std::string> names_of() {
  const auto names = Variants::names();
  return {names.begin(), names.end()};
}

// launch(launcher, variant, call) starts the call's kernel.
template <typename Variants, typename Call, typename Launch>
CallFacts facts_of_variant(const char* variant, const Call& call, Launch&& launch) {
  KernelFacts kernel;
  launch(Launcher::looking(&kernel), variant, call);
  const auto able = Variants::able(call);
  return {variant,
          {able.begin(), able.end()},
          kernel.blocks,
          kernel.threads,
          kernel.shared_bytes,
          kernel.registers,
          kernel.local_bytes,
          kernel.blocks_per_sm};
}

// Of a tensor of this shape, for checks that read no more.
inline TensorFacts facts_of(const std::vector<int64_t>& sizes, const std::string& dtype) {
  TensorFacts facts;
  facts.present = true;
  facts.sizes = sizes.data(), facts.dim = static_cast<int64_t>(sizes.size());
  facts.dtype = dtype == "float32"    ? DType::float32
                : dtype == "float16"  ? DType::float16
                : dtype == "bfloat16" ? DType::bfloat16
                : dtype == "float64"  ? DType::float64
                                      : DType::other;
  facts.dtype_name = dtype.c_str();
  return facts;
}

}  // namespace mnet::cuda
