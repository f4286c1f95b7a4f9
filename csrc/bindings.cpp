// Build and kernel facts for Python. The operators themselves go through the dispatcher (ops.cpp).
// No torch header is used here; some versions of torch forbid their pybind11 under this macro.
#undef TORCH_TARGET_VERSION
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

// A copy of some spans of memory, to tell later whether they still hold the same. Whoever makes it
// keeps the memory alive.
class Bytes {
 public:
  explicit Bytes(const std::vector<std::pair<std::uintptr_t, std::size_t>>& spans) {
    for (const auto& [address, size] : spans) {
      const auto* from = reinterpret_cast<const char*>(address);
      spans_.push_back({from, std::string(from, size)});
    }
  }
  bool unchanged() const {
    for (const auto& [from, copy] : spans_)
      if (std::memcmp(from, copy.data(), copy.size()) != 0) return false;
    return true;
  }

 private:
  std::vector<std::pair<const char*, std::string>> spans_;
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "mnet_kernels: build facts. Importing it registers the operators with torch.";
  m.def("build_info", [] {
    py::dict info;
    info["version"] = MNET_VERSION;
    info["compiler"] = __VERSION__;
    info["built_with_torch"] = MNET_TORCH_VERSION;
    const std::string why_no_cuda = MNET_WHY_NO_CUDA;  // empty: mnet_kernels._cuda is built too
    if (why_no_cuda.empty()) {
      info["backends"] = py::make_tuple("cpu", "cuda");
    } else {
      info["backends"] = py::make_tuple("cpu");
      info["why_no_cuda"] = why_no_cuda;
    }
    info["instruction_set"] = mnet::cpu::active_kernels().name;
    info["instruction_sets"] = mnet::cpu::instruction_sets();
    return info;
  });
  py::class_<Bytes>(m, "Bytes")
      .def(py::init<const std::vector<std::pair<std::uintptr_t, std::size_t>>&>(), py::arg("spans"))
      .def("unchanged", &Bytes::unchanged);
  m.def("set_instruction_set", &mnet::cpu::set_instruction_set, py::arg("name"),
        "Use the CPU kernels of this instruction set from now on (tests and benchmarks).");
}
