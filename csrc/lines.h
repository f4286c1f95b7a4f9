// Prefetches cache lines that are about to be read one after the other and have left the caches:
// asked for all at once, their misses overlap instead of adding up.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_set>
#include <vector>

namespace mnet {

constexpr std::size_t kLine = 64;  // bytes of a cache line

class Lines {
 public:
  void add(const void* from, std::size_t bytes) {
    const auto begin = reinterpret_cast<std::uintptr_t>(from) / kLine * kLine;
    for (auto line = begin; line < reinterpret_cast<std::uintptr_t>(from) + bytes; line += kLine)
      if (seen_.insert(line).second) lines_.push_back(reinterpret_cast<const char*>(line));
  }
  // Safe whatever lies there by now: a prefetch reads nothing.
  void fetch() const {
    for (const char* line : lines_) __builtin_prefetch(line, 0, 2);
  }

 private:
  std::vector<const char*> lines_;
  std::unordered_set<std::uintptr_t> seen_;
};

}  // namespace mnet
