// Whether what a packed call was made from is still what it was. A call looks at some hundreds of
// objects that the kernels have just driven out of the caches: in one loop over plain pointers
// their cache misses overlap, and from Python they would take several times as long.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace mnet {

namespace py = pybind11;

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

// Entries of dictionaries (the very objects; Ellipsis: none), sizes of dictionaries, and where
// tensors' memory and versions (-1: not asked) are.
class Watch {
 public:
  Watch(const std::vector<std::tuple<py::dict, py::str, py::object>>& entries,
        const std::vector<std::pair<py::dict, Py_ssize_t>>& sizes,
        const std::vector<std::tuple<py::object, std::uintptr_t, std::int64_t>>& tensors) {
    for (const auto& [dict, key, value] : entries) {
      own(dict), own(key), own(value);
      entries_.push_back({dict.ptr(), key.ptr(), value.is(py::ellipsis()) ? nullptr : value.ptr()});
    }
    for (const auto& [dict, size] : sizes) own(dict), sizes_.push_back({dict.ptr(), size});
    for (const auto& [tensor, address, version] : tensors)
      own(tensor), tensors_.push_back({tensor.ptr(), address, version});
    data_ptr_ = py::str("data_ptr");
    version_ = py::str("_version");
  }

  bool unchanged() const {
    for (const auto& [dict, size] : sizes_)
      if (PyDict_Size(dict) != size) return false;
    for (const auto& [dict, key, value] : entries_) {
      PyObject* now = PyDict_GetItemWithError(dict, key);
      if (now == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
      if (now != value) return false;
    }
    for (const auto& [tensor, address, version] : tensors_) {
      if (number(PyObject_CallMethodNoArgs(tensor, data_ptr_.ptr())) != address) return false;
      if (version >= 0 && number(PyObject_GetAttr(tensor, version_.ptr())) !=
                              static_cast<unsigned long long>(version))
        return false;
    }
    return true;
  }

 private:
  struct Entry {
    PyObject *dict, *key, *value;
  };
  struct Size {
    PyObject* dict;
    Py_ssize_t size;
  };
  struct Tensor {
    PyObject* tensor;
    std::uintptr_t address;
    std::int64_t version;
  };

  void own(const py::object& object) { owned_.push_back(object); }
  static unsigned long long number(PyObject* result) {
    const auto held = py::reinterpret_steal<py::object>(result);
    if (!held) throw py::error_already_set();
    const unsigned long long value = PyLong_AsUnsignedLongLong(held.ptr());
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
  }

  std::vector<Entry> entries_;
  std::vector<Size> sizes_;
  std::vector<Tensor> tensors_;
  std::vector<py::object> owned_;
  py::str data_ptr_, version_;
};

}  // namespace mnet
