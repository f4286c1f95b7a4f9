#include "active.h"

#include <atomic>
#include <stdexcept>

#include <unistd.h>

namespace mnet::cpu {
namespace {

int widest() {
  int i = 0;
  while (!kInstructionSets[i].runs_here()) ++i;
  return i;
}

std::atomic<int>& active() {
  static std::atomic<int> index{widest()};
  return index;
}

}  // namespace

const Kernels& active_kernels() {
  return *kInstructionSets[active().load(std::memory_order_relaxed)].kernels;
}

const Kernels& narrowed_kernels(int64_t channels) {
  int i = active().load(std::memory_order_relaxed);
  while (i + 1 < kInstructionSetCount && kInstructionSets[i].kernels->width > channels) ++i;
  return *kInstructionSets[i].kernels;
}

bool stores_past_caches(const void* y, int64_t bytes, int64_t read, int64_t pixel_bytes) {
  static const int64_t cache = [] {
#if defined(_SC_LEVEL3_CACHE_SIZE)
    const long size = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (size > 0) return static_cast<int64_t>(size);
#endif
    return int64_t{32} << 20;
  }();
  return bytes + read > cache && bytes > cache / 2 && pixel_bytes % 64 == 0 &&
         reinterpret_cast<std::uintptr_t>(y) % 64 == 0;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (int i = 0; i < kInstructionSetCount; ++i)
    if (kInstructionSets[i].runs_here()) names.emplace_back(kInstructionSets[i].kernels->name);
  return names;
}

void set_instruction_set(const std::string& name) {
  std::string known;
  for (int i = 0; i < kInstructionSetCount; ++i) {
    if (!kInstructionSets[i].runs_here()) continue;
    if (name == kInstructionSets[i].kernels->name) return active().store(i);
    known += (known.empty() ? "" : ", ") + std::string(kInstructionSets[i].kernels->name);
  }
  throw std::runtime_error("set_instruction_set: name: expected one of " + known + ", got '" +
                           name + "'");
}

}  // namespace mnet::cpu
