// Starting kernels, or only looking at what would be started. Both go through one class, so that
// each kernel is instantiated once.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>

#include "machine.cuh"

namespace mnet::cuda {

// What a call would start.
struct KernelFacts {
  int64_t blocks = 0;
  int threads = 0, shared_bytes = 0;
  // Of the running GPU's machine code; -1 where there is no GPU.
  int registers = -1, local_bytes = -1, blocks_per_sm = -1;
};

// What a device offers; an H100's where there is no GPU.
struct DeviceLimits {
  int multiprocessors = 132;
  int shared_bytes = 227 << 10;  // that a block may have
};

DeviceLimits limits_of(int device);

class Launcher {
 public:
  // Starts kernels on this stream (a cudaStream_t) of the current device.
  static Launcher on(void* stream) { return Launcher(stream, nullptr); }
  // Starts nothing and fills `facts`.
  static Launcher looking(KernelFacts* facts) { return Launcher(nullptr, facts); }

  // Throws std::runtime_error with CUDA's own words if the kernel cannot be started.
  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), const Geometry& geometry,
                  const Arguments&... arguments) const {
    std::tuple<Parameters...> parameters{arguments...};
    std::apply(
        [&](auto&... each) {
          void* pointers[] = {const_cast<void*>(static_cast<const void*>(&each))...};
          start(reinterpret_cast<const void*>(kernel), geometry, pointers);
        },
        parameters);
  }

 private:
  Launcher(void* stream, KernelFacts* facts) : stream_(stream), facts_(facts) {}
  void start(const void* kernel, const Geometry& geometry, void** arguments) const;

  void* stream_;
  KernelFacts* facts_;
};

}  // namespace mnet::cuda
