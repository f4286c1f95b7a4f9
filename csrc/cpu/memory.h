// Memory between calls and past the caches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "../tensor.h"
#include "result_memory.h"

namespace mnet::cpu {

inline void* align_line(char* p) {
  constexpr std::uintptr_t kLine = 64;
  return reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(p) + kLine - 1) / kLine * kLine);
}

// Memory that a thread keeps between calls, so that no call pays for page faults, on whole cache
// lines. One for each use, since uses nest.
enum class Scratch { kernel, band, sequence, partials, panels };
template <Scratch Use>
void* scratch_bytes(std::size_t bytes) {
  thread_local std::unique_ptr<char[]> memory;
  thread_local std::size_t size = 0;
  if (size < bytes + 64) {
    memory.reset();
    memory.reset(new char[bytes + 64]);
    size = bytes + 64;
  }
  return align_line(memory.get());
}

// Whether a call's result had better bypass the caches: input and output together are beyond what a
// group of cores shares (typically 32 MB), and the result is made of whole cache lines. The
// reported cache size is no guide: a virtual machine may report its host's.
inline bool may_stream(const void* y, const Problem& p, int64_t element_size) {
  constexpr int64_t kStreamFrom = int64_t{24} << 20, kLine = 64;
  const int64_t elements = p.N * (p.C * p.H * p.W + p.K * p.OH * p.OW);
  return elements * element_size > kStreamFrom && p.K * element_size % kLine == 0 &&
         reinterpret_cast<std::uintptr_t>(y) % kLine == 0;
}

}  // namespace mnet::cpu
