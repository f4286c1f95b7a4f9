// Facts about the CUDA kernels for Python. Importing it registers them with torch
// (dwconv_bn_act.cu).
// No torch header is used here; some versions of torch forbid their pybind11 under this macro.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "facts.h"

namespace py = pybind11;
using mnet::cuda::CallFacts;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "mnet_kernels: CUDA kernels. Importing it registers them with torch.";
  m.def("build_info", [] {
    py::dict info;
    info["nvcc"] = MNET_NVCC_VERSION;
    info["architectures"] = MNET_CUDA_ARCHITECTURES;
    info["built_with_torch"] = MNET_TORCH_VERSION;
    return info;
  });
  m.def("variants", &mnet::cuda::variants, "The forward kernels by name.");
  m.def("force_variant", &mnet::cuda::force_variant, py::arg("name"),
        "Use this forward kernel from now on (tests and benchmarks); \"\" chooses again.");
  m.def("backward_variants", &mnet::cuda::backward_variants,
        "The kernels of backward and training by name: of one pass, of three, for any call.");
  m.def(
      "force_backward", &mnet::cuda::force_backward, py::arg("name"),
      "Use these kernels of backward and training from now on where they can run a call (tests and "
      "benchmarks); \"\" chooses again.");
  py::class_<CallFacts>(m, "CallFacts")
      .def_readonly("variant", &CallFacts::variant)
      .def_readonly("able", &CallFacts::able)
      .def_readonly("blocks", &CallFacts::blocks)
      .def_readonly("threads", &CallFacts::threads)
      .def_readonly("shared_bytes", &CallFacts::shared_bytes)
      .def_readonly("registers", &CallFacts::registers)
      .def_readonly("local_bytes", &CallFacts::local_bytes)
      .def_readonly("blocks_per_sm", &CallFacts::blocks_per_sm);
  m.def("facts_of_call", &mnet::cuda::facts_of_call, py::arg("x"), py::arg("dtype"),
        py::arg("channels_last"), py::arg("weight"), py::arg("stride") = std::vector<int64_t>{1},
        py::arg("padding") = std::vector<int64_t>{0}, py::arg("dilation") = std::vector<int64_t>{1},
        "What dwconv_bn_act on tensors of these shapes would start; nothing is run.");
  m.def("separable_variants", &mnet::cuda::separable_variants, "separable_conv's kernels by name.");
  m.def("force_separable_variant", &mnet::cuda::force_separable_variant, py::arg("name"),
        "Use this kernel of separable_conv from now on; \"\" chooses again.");
  m.def("facts_of_separable_call", &mnet::cuda::facts_of_separable_call, py::arg("x"),
        py::arg("dtype"), py::arg("dw_weight"), py::arg("outputs"),
        py::arg("stride") = std::vector<int64_t>{1}, py::arg("padding") = std::vector<int64_t>{0},
        py::arg("dilation") = std::vector<int64_t>{1}, py::arg("tf32") = false,
        "What separable_conv on channels_last tensors of these shapes would start.");
  m.def("conv_variants", &mnet::cuda::conv_variants, "conv_bn_act's kernels by name.");
  m.def("force_conv_variant", &mnet::cuda::force_conv_variant, py::arg("name"),
        "Use this kernel of conv_bn_act from now on; \"\" chooses again.");
  m.def("facts_of_conv_call", &mnet::cuda::facts_of_conv_call, py::arg("x"), py::arg("dtype"),
        py::arg("weight"), py::arg("stride") = std::vector<int64_t>{1},
        py::arg("padding") = std::vector<int64_t>{0}, py::arg("dilation") = std::vector<int64_t>{1},
        py::arg("tf32") = false,
        "What conv_bn_act on channels_last tensors of these shapes would start.");
}
