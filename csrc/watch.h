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

#include "watched.h"

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

// Entries of dictionaries (the very objects; Ellipsis: none), sizes of dictionaries, addresses of a
// list of tensors (watched.h), and versions of some.
class Watch {
 public:
  Watch(const std::vector<std::tuple<py::dict, py::str, py::object>>& entries,
        const std::vector<std::pair<py::dict, Py_ssize_t>>& sizes, std::int64_t list,
        std::vector<std::uintptr_t> addresses,
        const std::vector<std::pair<py::object, std::int64_t>>& versions)
      : list_(list), addresses_(std::move(addresses)) {
    for (const auto& [dict, key, value] : entries) {
      own(dict), own(key), own(value);
      entries_.push_back({dict.ptr(), key.ptr(), value.is(py::ellipsis()) ? nullptr : value.ptr()});
    }
    for (const auto& [dict, size] : sizes) own(dict), sizes_.push_back({dict.ptr(), size});
    for (const auto& [tensor, version] : versions)
      own(tensor), versions_.push_back({tensor.ptr(), version});
    version_ = py::str("_version");
  }
  ~Watch() { forget(list_); }
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  bool unchanged() const {
    for (const auto& [dict, size] : sizes_)
      if (PyDict_Size(dict) != size) return false;
    for (const auto& [dict, key, value] : entries_) {
      PyObject* now = PyDict_GetItemWithError(dict, key);
      if (now == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
      if (now != value) return false;
    }
    for (const auto& [tensor, version] : versions_)
      if (number(PyObject_GetAttr(tensor, version_.ptr())) != version) return false;
    return lie_at(list_, addresses_);
  }

 private:
  struct Entry {
    PyObject *dict, *key, *value;
  };
  struct Size {
    PyObject* dict;
    Py_ssize_t size;
  };
  struct Version {
    PyObject* tensor;
    std::int64_t version;
  };

  void own(const py::object& object) { owned_.push_back(object); }
  static std::int64_t number(PyObject* result) {
    const auto held = py::reinterpret_steal<py::object>(result);
    if (!held) throw py::error_already_set();
    const std::int64_t value = PyLong_AsLongLong(held.ptr());
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
  }

  std::vector<Entry> entries_;
  std::vector<Size> sizes_;
  std::vector<Version> versions_;
  std::int64_t list_;
  std::vector<std::uintptr_t> addresses_;
  std::vector<py::object> owned_;
  py::str version_;
};

}  // namespace mnet
