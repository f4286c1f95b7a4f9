// Build and kernel facts for Python. The operators themselves go through the dispatcher (ops.cpp).
// No torch header is used here; some versions of torch forbid their pybind11 under this macro.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/active.h"
#include "direct_call.h"
#include "watch.h"

namespace py = pybind11;

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
  py::class_<mnet::Bytes>(m, "Bytes")
      .def(py::init<const std::vector<mnet::Bytes::Span>&>(), py::arg("spans"))
      .def("unchanged", &mnet::Bytes::unchanged);
  py::class_<mnet::Watch>(m, "Watch")
      .def(py::init<const std::vector<std::tuple<py::dict, py::str, py::object>>&,
                    const std::vector<std::pair<py::dict, Py_ssize_t>>&, std::int64_t,
                    const std::vector<std::pair<py::object, std::int64_t>>&>(),
           py::arg("entries"), py::arg("sizes"), py::arg("list"), py::arg("versions"))
      .def("unchanged", &mnet::Watch::unchanged);
  m.def("set_instruction_set", &mnet::cpu::set_instruction_set, py::arg("name"),
        "Use the CPU kernels of this instruction set from now on (tests and benchmarks).");
  if (!mnet::add_direct_call(m.ptr())) throw py::error_already_set();
}
