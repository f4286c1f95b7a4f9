// Serves requests from stdin until it ends: a header line, then the input buffers' bytes; answers
// with a line, then the output buffers' bytes.
//
//   request  operation variant [name=number]... [KIND:name=bytes+offset]...
//   answer   ok TEXT TAB TRAFFIC
//   or       error TEXT
//
// KIND is in, out or scratch (memory of unknown content that is not sent back). Numbers with a
// meaning here: count (the traffic), sample and images (see Launcher).
#include <cstdio>
#include <iostream>
#include <optional>
#include <sstream>

#include "request.h"

namespace emulation {

std::map<std::string, Operation>& operations() {
  static std::map<std::string, Operation> all;
  return all;
}

namespace {

struct Header {
  Request request;
  std::vector<std::string> inputs, outputs;
};

Header parse(const std::string& line) {
  Header header;
  std::istringstream words(line);
  words >> header.request.operation >> header.request.variant;
  for (std::string word; words >> word;) {
    const std::size_t equals = word.find('=');
    const std::string name = word.substr(0, equals), value = word.substr(equals + 1);
    const std::size_t colon = name.find(':');
    if (colon == std::string::npos) {
      header.request.numbers[name] = std::stod(value);
      continue;
    }
    const std::string buffer = name.substr(colon + 1);
    header.request.buffers.try_emplace(
        buffer, std::stoull(value), std::stoull(value.substr(value.find('+') + 1)), name[0] == 's');
    if (name[0] == 'i') header.inputs.push_back(buffer);
    if (name[0] == 'o') header.outputs.push_back(buffer);
  }
  return header;
}

void serve(const std::string& line) {
  Header header = parse(line);
  Request& request = header.request;
  for (const auto& name : header.inputs)
    if (!std::cin.read(request.buffer<char>(name), request.buffers.at(name).size())) return;

  std::vector<Buffer> named;
  for (const auto& [name, memory] : request.buffers) {
    const auto begin = reinterpret_cast<uintptr_t>(memory.data());
    named.push_back({name, begin, begin + memory.size()});
  }
  Traffic traffic(std::move(named));
  if (request.numbers.count("count")) request.launcher.traffic = &traffic;
  if (request.numbers.count("sample")) {
    request.launcher.sample = request.integer("sample");
    request.launcher.images = request.integer("images");
  }
#ifdef __SANITIZE_THREAD__
  request.launcher.real_threads = true;
#endif
  std::string text;
  try {
    const auto operation = operations().find(request.operation);
    if (operation == operations().end())
      throw std::runtime_error("no operation is called " + request.operation);
    text = operation->second(request);
  } catch (const std::exception& error) {
    std::cout << "error " << error.what() << std::endl;
    return;
  }
  std::cout << "ok " << text << "\t" << traffic.json() << "\n";
  for (const auto& name : header.outputs)
    std::cout.write(request.buffer<char>(name),
                    static_cast<std::streamsize>(request.buffers.at(name).size()));
  std::cout.flush();
}

}  // namespace
}  // namespace emulation

int main() {
  std::ios::sync_with_stdio(false);
  for (std::string line; std::getline(std::cin, line);) emulation::serve(line);
}
