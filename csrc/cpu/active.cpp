#include "active.h"

#include <atomic>
#include <stdexcept>

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
