// Build and kernel facts for Python. The operators themselves go through the dispatcher (ops.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "cpu/active.h"

namespace py = pybind11;

namespace {

// A copy of some spans of memory, to tell later whether others hold the same.
class Bytes {
 public:
  using Spans = std::vector<std::pair<std::uintptr_t, std::size_t>>;  // (address, bytes)
  explicit Bytes(const Spans& spans) {
    for (const auto& [address, size] : spans)
      copies_.emplace_back(reinterpret_cast<const char*>(address), size);
  }
  bool equal(const Spans& spans) const {
    if (spans.size() != copies_.size()) return false;
    for (std::size_t i = 0; i < spans.size(); ++i)
      if (spans[i].second != copies_[i].size() ||
          std::memcmp(reinterpret_cast<const char*>(spans[i].first), copies_[i].data(),
                      copies_[i].size()) != 0)
        return false;
    return true;
  }

 private:
  std::vector<std::string> copies_;
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "mnet_kernels: build facts. Importing it registers the operators with torch.";
  m.def("build_info", [] {
    py::dict info;
    info["version"] = MNET_VERSION;
    info["compiler"] = __VERSION__;
    info["built_with_torch"] = MNET_TORCH_VERSION;
    info["backends"] = py::make_tuple("cpu");
    info["instruction_set"] = mnet::cpu::active_kernels().name;
    info["instruction_sets"] = mnet::cpu::instruction_sets();
    return info;
  });
  py::class_<Bytes>(m, "Bytes")
      .def(py::init<const Bytes::Spans&>(), py::arg("spans"))
      .def("equal", &Bytes::equal, py::arg("spans"));
  m.def("set_instruction_set", &mnet::cpu::set_instruction_set, py::arg("name"),
        "Use the CPU kernels of this instruction set from now on (tests and benchmarks).");
}
