// Memory between calls and past the caches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../problem.h"

namespace mnet::cpu {

// Aligned memory that a thread keeps between calls, so that no call pays for page faults.
inline void* scratch_bytes(std::size_t bytes) {
  constexpr std::size_t kAlign = 64;
  thread_local std::vector<char> memory;
  if (memory.size() < bytes + kAlign) memory.resize(bytes + kAlign);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  return reinterpret_cast<void*>((address + kAlign - 1) / kAlign * kAlign);
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
