// Memory between calls and past the caches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "../tensor.h"
#include "result_memory.h"

namespace mnet::cpu {

constexpr int64_t kLine = 64;  // bytes of a cache line

inline int64_t whole_lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }
inline void* align_line(char* p) {
  return reinterpret_cast<void*>(whole_lines(reinterpret_cast<std::intptr_t>(p)));
}

// Memory that a thread keeps between calls, so that no call pays for page faults, on whole cache
// lines. One for each use, since uses nest.
enum class Scratch { kernel, band, sequence, partials, panels };
template <Scratch Use>
void* scratch_bytes(std::size_t bytes) {
  thread_local std::unique_ptr<char[]> memory;
  thread_local std::size_t size = 0;
  if (size < bytes + kLine) {
    memory.reset();  // first: the old and the new one need not be there at once
    memory.reset(new char[bytes + kLine]);
    size = bytes + kLine;
  }
  return align_line(memory.get());
}

// Whether a result had better bypass the caches: `bytes`, input and output together, are beyond
// what a group of cores shares (typically 32 MB), and the result is made of whole cache lines. The
// reported cache size is no guide: a virtual machine may report its host's.
inline bool may_stream(const void* y, int64_t bytes, int64_t pixel_bytes) {
  constexpr int64_t kStreamFrom = int64_t{24} << 20;
  return bytes > kStreamFrom && pixel_bytes % kLine == 0 &&
         reinterpret_cast<std::intptr_t>(y) % kLine == 0;
}
inline bool may_stream(const void* y, const Problem& p, int64_t element_size) {
  const int64_t elements = p.N * (p.C * p.H * p.W + p.K * p.OH * p.OW);
  return may_stream(y, elements * element_size, p.K * element_size);
}

}  // namespace mnet::cpu
