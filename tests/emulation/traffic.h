// Counts what a GPU's memory system would see of a kernel's loads and stores. The lanes of a warp
// are taken to run in step: the n-th time that each comes to a line of source, between the same
// two barriers, is one request.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <sstream>
#include <string>
#include <tuple>
#include <unordered_set>
#include <vector>

namespace emulation {

enum class Space { global_load, global_store, shared_load, shared_store };

struct Access {
  uintptr_t address;
  uint32_t bytes;
  Space space;
  int line;
  int phase;   // barriers passed before it
  bool valid;  // false: predicated off; the lane takes part in the request and moves nothing
};

// A buffer in global memory, by the name of the kernel's argument.
struct Buffer {
  std::string name;
  uintptr_t begin, end;
};

class Traffic {
 public:
  explicit Traffic(std::vector<Buffer> buffers) : buffers_(std::move(buffers)) {}

  // One log a thread, in order of threads.
  void count_block(const std::vector<std::vector<Access>>& logs) {
    seen_.clear();
    for (std::size_t first = 0; first < logs.size(); first += 32) {
      requests_.clear();
      for (std::size_t t = first; t < std::min(first + 32, logs.size()); ++t) {
        std::map<std::tuple<int, int, Space, uint32_t>, int> times;
        for (const Access& a : logs[t]) {
          const auto kind = std::make_tuple(a.phase, a.line, a.space, a.bytes);
          const int time = times[kind]++;
          if (a.valid) requests_.push_back({kind, time, a.address});
        }
      }
      std::stable_sort(requests_.begin(), requests_.end(), [](const Lane& a, const Lane& b) {
        return std::tie(a.kind, a.time) < std::tie(b.kind, b.time);
      });
      for (std::size_t begin = 0, end; begin < requests_.size(); begin = end) {
        std::vector<uintptr_t> addresses;
        const Lane& lane = requests_[begin];
        for (end = begin; end < requests_.size() && requests_[end].kind == lane.kind &&
                          requests_[end].time == lane.time;
             ++end)
          addresses.push_back(requests_[end].address);
        const Space space = std::get<Space>(lane.kind);
        const uint32_t bytes = std::get<uint32_t>(lane.kind);
        if (space == Space::global_load || space == Space::global_store)
          count_global(space, addresses, bytes);
        else
          count_shared(addresses, bytes);
      }
    }
  }

  // {"x": {...}, ..., "shared": {...}}
  std::string json() const {
    std::ostringstream out;
    out << "{";
    for (const auto& [name, g] : global_)
      out << "\"" << name << "\": {\"requests\": " << g.requests << ", \"bytes\": " << g.bytes
          << ", \"sectors\": " << g.sectors << ", \"least_sectors\": " << g.least_sectors
          << ", \"block_sectors\": " << g.block_sectors << "}, ";
    out << "\"shared\": {\"requests\": " << shared_.requests
        << ", \"wavefronts\": " << shared_.wavefronts
        << ", \"least_wavefronts\": " << shared_.least_wavefronts
        << ", \"worst_conflict\": " << shared_.worst_conflict << "}}";
    return out.str();
  }

 private:
  static constexpr uintptr_t kSector = 32, kBanks = 32, kBank = 4, kWavefront = 128;

  struct Global {
    int64_t requests = 0;       // instructions of a warp
    int64_t bytes = 0;          // asked for by all lanes
    int64_t sectors = 0;        // of 32 bytes, that requests touch
    int64_t least_sectors = 0;  // that would hold the requests' distinct bytes
    int64_t block_sectors = 0;  // distinct within a block: what misses a perfect L1
  };
  struct Shared {
    int64_t requests = 0, wavefronts = 0, least_wavefronts = 0, worst_conflict = 0;
  };

  void count_global(Space space, std::vector<uintptr_t> addresses, uint32_t bytes) {
    Global& g = global_[name_of(addresses.front())];
    ++g.requests;
    g.bytes += static_cast<int64_t>(addresses.size()) * bytes;
    std::sort(addresses.begin(), addresses.end());
    addresses.erase(std::unique(addresses.begin(), addresses.end()), addresses.end());
    std::unordered_set<uintptr_t> sectors;
    for (uintptr_t address : addresses) sectors.insert(address / kSector);
    g.sectors += static_cast<int64_t>(sectors.size());
    g.least_sectors += static_cast<int64_t>((addresses.size() * bytes + kSector - 1) / kSector);
    for (uintptr_t sector : sectors)
      if (space == Space::global_store || seen_.insert(sector).second) ++g.block_sectors;
  }

  // A request is served 128 bytes at a time: all lanes, a half or a quarter warp. Each of these
  // takes as many wavefronts as the busiest bank has distinct words.
  void count_shared(const std::vector<uintptr_t>& addresses, uint32_t bytes) {
    ++shared_.requests;
    const std::size_t lanes = std::min<std::size_t>(32, kWavefront / bytes);
    for (std::size_t first = 0; first < addresses.size(); first += lanes) {
      std::map<uintptr_t, std::unordered_set<uintptr_t>> banks;
      for (std::size_t i = first; i < std::min(first + lanes, addresses.size()); ++i)
        for (uintptr_t word = addresses[i] / kBank; word <= (addresses[i] + bytes - 1) / kBank;
             ++word)
          banks[word % kBanks].insert(word);
      int64_t ways = 0;
      for (const auto& [bank, words] : banks)
        ways = std::max(ways, static_cast<int64_t>(words.size()));
      shared_.wavefronts += ways;
      ++shared_.least_wavefronts;
      shared_.worst_conflict = std::max(shared_.worst_conflict, ways);
    }
  }

  std::string name_of(uintptr_t address) const {
    for (const Buffer& buffer : buffers_)
      if (address >= buffer.begin && address < buffer.end) return buffer.name;
    return "outside";
  }

  struct Lane {
    std::tuple<int, int, Space, uint32_t> kind;
    int time;
    uintptr_t address;
  };

  std::vector<Buffer> buffers_;
  std::map<std::string, Global> global_;
  Shared shared_;
  std::vector<Lane> requests_;          // of one warp
  std::unordered_set<uintptr_t> seen_;  // sectors loaded by this block
};

}  // namespace emulation
