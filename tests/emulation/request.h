// What the Python side (emulator.py) asks this program to run: an operation, a variant of it,
// numbers by name and buffers by name.
#pragma once

#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation.h"

namespace emulation {

// Exactly `bytes` of memory (a sanitizer sees the first byte past either end), `offset` bytes past
// a multiple of 256. Outputs start as NaN; scratch is not touched, so it may be huge.
class Memory {
 public:
  Memory(std::size_t bytes, std::size_t offset, bool scratch)
      : bytes_(bytes),
        offset_(offset),
        base_(static_cast<unsigned char*>(::operator new(bytes + offset, std::align_val_t(256)))) {
    if (!scratch) std::memset(base_.get(), 0xff, bytes + offset);
  }
  unsigned char* data() const { return base_.get() + offset_; }
  std::size_t size() const { return bytes_; }

 private:
  struct Free {
    void operator()(unsigned char* p) const { ::operator delete(p, std::align_val_t(256)); }
  };
  std::size_t bytes_, offset_;
  std::unique_ptr<unsigned char, Free> base_;
};

struct Request {
  std::string operation, variant;
  std::map<std::string, double> numbers;
  std::map<std::string, Memory> buffers;
  Launcher launcher;

  int64_t integer(const std::string& name) const { return static_cast<int64_t>(real(name)); }
  double real(const std::string& name) const {
    const auto found = numbers.find(name);
    if (found == numbers.end()) throw std::runtime_error("no number is called " + name);
    return found->second;
  }
  // Null where the caller gave none.
  template <typename T = void>
  T* buffer(const std::string& name) const {
    const auto found = buffers.find(name);
    return found == buffers.end() ? nullptr : reinterpret_cast<T*>(found->second.data());
  }
};

// Runs the request's kernel and returns text for the caller, often empty.
using Operation = std::string (*)(const Request&);

std::map<std::string, Operation>& operations();

inline std::string joined(const std::vector<const char*>& names) {
  std::string all;
  for (const char* name : names) all += (all.empty() ? "" : " ") + std::string(name);
  return all;
}

// At namespace scope of an operation's file: `static Registration _("name", function);`.
struct Registration {
  Registration(const char* name, Operation operation) { operations()[name] = operation; }
};

}  // namespace emulation
