// dwconv_bn_act from Python without torch's dispatcher, which takes longer than a small layer: for
// plain CPU tensors, where nothing that the dispatcher would serve is there. In any other case, and
// for every error, it answers None, and the caller goes through the dispatcher.
#include "direct_call.h"

#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/dwconv_bn_act.h"
#include "tensor.h"

// Of torch's stable ABI from 2.14 on; null before, where every call goes through the dispatcher.
extern "C" {
__attribute__((weak)) AOTITorchError torch_tensor_from_pyobject(void* tensor, AtenTensorHandle* to);
__attribute__((weak)) AOTITorchError torch_tensor_to_pyobject(AtenTensorHandle tensor, void* type,
                                                              void** to);
}

namespace mnet {
namespace {

// What is asked of torch at every call; nothing where this torch lacks some of it.
struct Torch {
  PyTypeObject *tensor, *parameter;
  // Functions: modes, transforms, autocast, tracing; true: somebody takes part in calls.
  std::array<PyObject*, 5> takes_part;
  PyObject *profiler, *forward_ad;                // modules' dictionaries,
  PyObject *is_profiler_enabled, *current_level;  // and names in them
  PyObject *requires_grad, *is_neg;

  static PyObject* member(const char* module, const char* name) {
    PyObject* m = PyImport_ImportModule(module);
    PyObject* found = m == nullptr ? nullptr : PyObject_GetAttrString(m, name);
    Py_XDECREF(m);
    if (found == nullptr) PyErr_Clear();
    return found;  // kept for as long as the process runs
  }

  static std::optional<Torch> find() {
    Torch t{};
    t.tensor = reinterpret_cast<PyTypeObject*>(member("torch", "Tensor"));
    t.parameter = reinterpret_cast<PyTypeObject*>(member("torch.nn", "Parameter"));
    t.takes_part = {member("torch._C", "_len_torch_function_stack"),
                    member("torch._C", "_len_torch_dispatch_stack"),
                    member("torch._C", "_are_functorch_transforms_active"),
                    member("torch._C", "_is_any_autocast_enabled"),
                    member("torch._C", "_get_tracing_state")};
    t.profiler = member("torch.autograd.profiler", "__dict__");
    t.forward_ad = member("torch.autograd.forward_ad", "__dict__");
    t.is_profiler_enabled = PyUnicode_InternFromString("_is_profiler_enabled");
    t.current_level = PyUnicode_InternFromString("_current_level");
    t.requires_grad = PyUnicode_InternFromString("requires_grad");
    t.is_neg = PyUnicode_InternFromString("is_neg");
    bool complete = t.tensor && t.parameter && t.profiler && t.forward_ad &&
                    PyDict_GetItem(t.profiler, t.is_profiler_enabled) &&
                    PyDict_GetItem(t.forward_ad, t.current_level);
    for (PyObject* f : t.takes_part) complete = complete && f != nullptr;
    return complete ? std::optional(t) : std::nullopt;
  }
};

std::optional<Torch> torch;

// Whatever is no plain false counts as true.
bool is_true(PyObject* owned) {
  if (owned == nullptr) {
    PyErr_Clear();
    return true;
  }
  const bool truth = PyObject_IsTrue(owned) != 0;
  Py_DECREF(owned);
  return truth;
}

bool somebody_takes_part() {
  for (PyObject* f : torch->takes_part)
    if (is_true(PyObject_CallNoArgs(f))) return true;
  if (PyDict_GetItem(torch->profiler, torch->is_profiler_enabled) != Py_False) return true;
  PyObject* level = PyDict_GetItem(torch->forward_ad, torch->current_level);
  return level == nullptr || !PyLong_Check(level) || PyLong_AsLong(level) >= 0;
}

// A CPU tensor of no class of its own that no gradient flows through, or nothing.
std::optional<Tensor> plain_tensor(PyObject* t, bool recording) {
  if (Py_TYPE(t) != torch->tensor && Py_TYPE(t) != torch->parameter) return {};
  if (recording && is_true(PyObject_GetAttr(t, torch->requires_grad))) return {};
  if (is_true(PyObject_CallMethodNoArgs(t, torch->is_neg))) return {};
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_tensor_from_pyobject(t, &handle));
  Tensor tensor(handle);
  if (!tensor.is_cpu() || (tensor.numel() > 0 && tensor.const_data_ptr() == nullptr)) return {};
  return tensor;
}

bool plain_int(PyObject* value, std::vector<int64_t>& to) {
  if (!PyLong_CheckExact(value)) return false;
  const long long number = PyLong_AsLongLong(value);
  if (number == -1 && PyErr_Occurred()) return false;
  to.push_back(number);
  return true;
}

// An int, or a tuple or list of at most `most`.
bool plain_ints(PyObject* value, Py_ssize_t most, std::vector<int64_t>& to) {
  if (PyLong_CheckExact(value)) return plain_int(value, to);
  if (!PyTuple_CheckExact(value) && !PyList_CheckExact(value)) return false;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(value);
  if (count > most) return false;
  for (Py_ssize_t i = 0; i < count; ++i)
    if (!plain_int(PySequence_Fast_GET_ITEM(value, i), to)) return false;
  return true;
}

// The call's result, or null: with a Python error or without one.
PyObject* call(PyObject* const* args) {
  Conv2dArguments constants;
  if (!plain_ints(args[4], 2, constants.stride) || !plain_ints(args[5], 4, constants.padding) ||
      !plain_ints(args[6], 2, constants.dilation) || !PyFloat_CheckExact(args[8]))
    return nullptr;
  constants.slope = PyFloat_AS_DOUBLE(args[8]);
  Py_ssize_t length = 0;
  const char* name =
      PyUnicode_CheckExact(args[7]) ? PyUnicode_AsUTF8AndSize(args[7], &length) : nullptr;
  if (name == nullptr || somebody_takes_part()) return nullptr;
  constants.activation.assign(name, static_cast<std::size_t>(length));

  const bool recording = aoti_torch_grad_mode_is_enabled();
  std::optional<Tensor> tensors[4];  // x, weight, scale, shift
  for (int i = 0; i < 4; ++i) {
    if (i >= 2 && args[i] == Py_None) continue;
    if (!(tensors[i] = plain_tensor(args[i], recording))) return nullptr;
  }
  std::optional<Tensor> y;
  {
    PyThreadState* state = PyEval_SaveThread();  // other Python threads run meanwhile
    try {
      y = cpu::run_dwconv_bn_act(*tensors[0], *tensors[1], tensors[2], tensors[3], constants);
    } catch (...) {  // told by the dispatcher's call
    }
    PyEval_RestoreThread(state);
  }
  void* result = nullptr;
  if (y) STABLE_TORCH_ERROR_CODE_CHECK(torch_tensor_to_pyobject(y->get(), nullptr, &result));
  return static_cast<PyObject*>(result);
}

PyObject* dwconv_bn_act_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  PyObject* result = nullptr;
  try {
    if (torch && count == 9) result = call(args);
  } catch (...) {  // out of memory, or a tensor that is not strided
  }
  if (result != nullptr) return result;
  PyErr_Clear();
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"dwconv_bn_act_direct",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(dwconv_bn_act_direct)),
     METH_FASTCALL, "The operator's arguments in order; None: ask torch's dispatcher instead."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_direct_call(PyObject* module) {
  if (torch_tensor_from_pyobject && torch_tensor_to_pyobject) torch = Torch::find();
  return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace mnet
