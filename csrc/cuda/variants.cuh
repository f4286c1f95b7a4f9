// A table of kernels for one operation, used alike by the launcher and by the emulation. A row is
// a struct with
//   kName                                     by which tests and benchmarks force it
//   can_run(call)                             whether it can compute this call
//   launch<Element>(launcher, call)           launcher(kernel, geometry, arguments...)
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace mnet::cuda {

template <typename... Rows>
struct Variants {
  static std::vector<const char*> names() { return {Rows::kName...}; }

  // The names of those that can run this call.
  template <typename Call>
  static std::vector<const char*> able(const Call& call) {
    std::vector<const char*> result;
    ((Rows::can_run(call) ? result.push_back(Rows::kName) : void()), ...);
    return result;
  }

  template <typename Element, typename Launcher, typename Call>
  static void launch(Launcher&& launcher, std::string_view name, const Call& call) {
    bool launched = false;
    auto row = [&](auto variant) {
      using Row = decltype(variant);
      if (name != Row::kName) return;
      if (!Row::can_run(call))
        throw std::runtime_error("variant " + std::string(name) + " cannot run this call");
      Row::template launch<Element>(launcher, call);
      launched = true;
    };
    (row(Rows{}), ...);
    if (!launched) throw std::runtime_error("no variant is called " + std::string(name));
  }
};

}  // namespace mnet::cuda
