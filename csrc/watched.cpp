#include "watched.h"

#include <torch/csrc/stable/library.h>

#include <map>
#include <memory>
#include <mutex>

#include "tensor.h"

namespace mnet {
namespace {

std::mutex mutex;
std::int64_t newest = 0;
std::map<std::int64_t, std::vector<Tensor>>& lists() {
  static auto* all = new std::map<std::int64_t, std::vector<Tensor>>;  // outlives every user
  return *all;
}

// Adds x to a list; list 0 makes a new one.
std::int64_t watch(Tensor x, std::int64_t list) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (list == 0) list = ++newest;
  lists()[list].push_back(std::move(x));
  return list;
}

}  // namespace

bool lie_at(std::int64_t list, const std::vector<std::uintptr_t>& addresses) {
  const std::vector<Tensor>* tensors = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    tensors = &lists().at(list);  // stays where it is while others come and go
  }
  for (std::size_t i = 0; i < addresses.size(); ++i)
    if (reinterpret_cast<std::uintptr_t>((*tensors)[i].const_data_ptr()) != addresses[i])
      return false;
  return true;
}

void forget(std::int64_t list) {
  const std::lock_guard<std::mutex> lock(mutex);
  lists().erase(list);
}

}  // namespace mnet

STABLE_TORCH_LIBRARY_IMPL(mnet_kernels, CPU, m) { m.impl("watch", TORCH_BOX(&mnet::watch)); }
