// Build and kernel facts for Python. The operators themselves go through the dispatcher (ops.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/active.h"

namespace py = pybind11;

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
  m.def("set_instruction_set", &mnet::cpu::set_instruction_set, py::arg("name"),
        "Use the CPU kernels of this instruction set from now on (tests and benchmarks).");
}
