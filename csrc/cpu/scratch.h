#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mnet::cpu {

// Aligned memory that a thread keeps between calls, so that no call pays for page faults.
inline void* scratch_bytes(std::size_t bytes) {
  constexpr std::size_t kAlign = 64;
  thread_local std::vector<char> memory;
  if (memory.size() < bytes + kAlign) memory.resize(bytes + kAlign);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  return reinterpret_cast<void*>((address + kAlign - 1) / kAlign * kAlign);
}

}  // namespace mnet::cpu
