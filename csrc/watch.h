// For Python (nn/snapshot.py): whether what a packed call was made from is still what it was. Every
// call asks this of some hundreds of objects, which the kernels have just driven out of the caches:
// they are prefetched all at once (lines.h), and looked at in one loop over plain pointers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "lines.h"
#include "watched_tensors.h"

namespace mnet {

namespace py = pybind11;

// A copy of some spans of memory, to tell later whether they still hold the same. Whoever makes it
// keeps the memory alive.
class Bytes {
 public:
  // Address, size and step: lines begin every `step` bytes; kLine where they follow one another.
  using Span = std::tuple<std::uintptr_t, std::size_t, std::size_t>;

  explicit Bytes(const std::vector<Span>& spans) {
    constexpr std::size_t kPiece = 16 * kLine;
    for (auto [address, size, step] : spans) {
      for (; size > 0; address += kPiece / kLine * step) {
        pieces_.push_back(
            {reinterpret_cast<const char*>(address), std::min(size, kPiece), step, copies_.size()});
        for (std::size_t at = 0; at < pieces_.back().size; at += kLine)
          copies_.append(reinterpret_cast<const char*>(address) + at / kLine * step,
                         std::min(kLine, pieces_.back().size - at));
        size -= pieces_.back().size;
      }
    }
  }
  bool unchanged() const { return same(pieces_, copies_.data()); }

 private:
  std::vector<Piece> pieces_;
  std::string copies_;  // one after the other
};

// Entries of dictionaries (the very objects; Ellipsis: none), sizes of dictionaries, where the
// tensors of a list lie (watched_tensors.h), and versions of some.
class Watch {
 public:
  Watch(const std::vector<std::tuple<py::dict, py::str, py::object>>& entries,
        const std::vector<std::pair<py::dict, Py_ssize_t>>& sizes, std::int64_t list,
        const std::vector<std::pair<py::object, std::int64_t>>& versions)
      : list_(list) {
    std::unordered_map<PyObject*, std::size_t> found;
    auto held = [&](const py::dict& dict) -> Dict& {
      const auto [at, is_new] = found.emplace(dict.ptr(), dicts_.size());
      if (is_new) own(dict), dicts_.push_back({dict.ptr(), 0, -1, {}});
      return dicts_[at->second];
    };
    for (const auto& [dict, key, value] : entries) {
      own(key), own(value);
      held(dict).entries.emplace_back(key.ptr(), value.is(py::ellipsis()) ? nullptr : value.ptr());
    }
    for (const auto& [dict, size] : sizes) held(dict).size = size;
    for (const Dict& dict : dicts_) add_lines(dict);
    for (const auto& [tensor, version] : versions) {
      own(tensor);
      versions_.emplace_back(tensor.ptr(), version);
      lines_.add(tensor.ptr(), kObject);
    }
    add_lines_of(list, lines_);
    version_ = py::str("_version");
  }
  ~Watch() { forget(list_); }
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  bool unchanged() const {
    lines_.fetch();
    for (const Dict& dict : dicts_)
      if (!holds(dict)) return false;
    for (const auto& [tensor, version] : versions_)
      if (number(PyObject_GetAttr(tensor, version_.ptr())) != version) return false;
    return lie_as_before(list_);
  }

 private:
  struct Dict {
    PyObject* dict;
    mutable std::uint64_t version;  // CPython's number of it when it was last found unchanged, or 0
    Py_ssize_t size;                // that it must have; -1: any
    std::vector<std::pair<PyObject*, PyObject*>> entries;
  };

// CPython numbers every change of a dictionary (PEP 509), until 3.13 (PEP 699).
#if !defined(PYPY_VERSION) && PY_VERSION_HEX < 0x030D0000
  static constexpr bool kNumbered = true;
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  static std::uint64_t version_of(PyObject* dict) {
    return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
  }
#pragma GCC diagnostic pop
#else
  static constexpr bool kNumbered = false;
  static std::uint64_t version_of(PyObject*) { return 0; }
#endif

  static bool holds(const Dict& held) {
    const std::uint64_t version = version_of(held.dict);
    if (kNumbered && version == held.version) return true;
    if (held.size >= 0 && PyDict_Size(held.dict) != held.size) return false;
    for (const auto& [key, value] : held.entries) {
      PyObject* now = PyDict_GetItemWithError(held.dict, key);
      if (now == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
      if (now != value) return false;
    }
    held.version = version;
    return true;
  }

  static constexpr std::size_t kObject = 48;
  void add_lines(const Dict& held) {
    lines_.add(held.dict, kObject);
#if !defined(PYPY_VERSION)
    if (kNumbered || held.entries.empty()) return;
    // The table of hashes and entries.
    const auto size = static_cast<std::size_t>(PyDict_Size(held.dict));
    std::size_t slots = 8;
    while (slots * 2 < size * 3) slots *= 2;
    lines_.add(reinterpret_cast<PyDictObject*>(held.dict)->ma_keys, 32 + slots + 24 * size);
    for (const auto& [key, value] : held.entries) lines_.add(key, kObject);
#endif
  }
  void own(const py::object& object) { owned_.push_back(object); }
  static std::int64_t number(PyObject* result) {
    const auto held = py::reinterpret_steal<py::object>(result);
    if (!held) throw py::error_already_set();
    const std::int64_t value = PyLong_AsLongLong(held.ptr());
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
  }

  Lines lines_;
  std::vector<Dict> dicts_;
  std::vector<std::pair<PyObject*, std::int64_t>> versions_;
  std::int64_t list_;
  std::vector<py::object> owned_;
  py::str version_;
};

}  // namespace mnet
