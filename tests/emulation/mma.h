// The matrix instructions and asynchronous copies of csrc/cuda/mma.cuh, by the PTX ISA's
// definitions ("ldmatrix", "mma.m16n8k16", "mma.m16n8k8", "cvt.rna.tf32", "cp.async").
#pragma once

#include "emulation.h"

namespace emulation {

// What the lanes of a warp show each other in one instruction; words in turn, so that a lane may
// be one instruction ahead. All 32 have to be at the same one (the same line of source).
template <int Count>
const WarpWords& exchange(const uint64_t (&words)[Count], int line) {
  static_assert(Count < WarpWords::kWords);
  require_meeting();
  Warp& warp = this_block->warps[threadIdx.x / kWarp];
  const uint64_t shown = ++this_block->state[threadIdx.x].shown;
  WarpWords& all = warp.words[shown % 2];
  uint64_t (&own)[WarpWords::kWords] = all.of[threadIdx.x % kWarp];
  std::copy(words, words + Count, own);
  const uint64_t stamp = shown << 32 | static_cast<uint32_t>(line);
  own[WarpWords::kWords - 1] = stamp;
  warp.barrier.wait();
  for (const auto& lane : all.of)
    if (lane[WarpWords::kWords - 1] != stamp)
      throw std::runtime_error("a matrix instruction without all 32 lanes of a warp");
  return all;
}

inline void load_matrices(const void* row, uint32_t (&result)[4], int line) {
  access(Space::shared_load, row, 16, true, line);
  const uint64_t mine[] = {reinterpret_cast<uint64_t>(row)};
  const WarpWords& all = exchange(mine, line);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int matrix = 0; matrix < 4; ++matrix)
    std::memcpy(&result[matrix],
                reinterpret_cast<const char*>(all.of[8 * matrix + lane / 4][0]) + lane % 4 * 4, 4);
}

inline uint32_t round_to_tf32(uint32_t word) {
  if ((word & 0x7fffffffu) > 0x7f800000u) return 0x7fffe000u;  // NaN
  return (word + 0x1000u) & 0xffffe000u;  // on to infinity, where it is beyond the largest
}

inline float float_of_tf32(uint32_t word) {
  if (word & 0x1fffu) throw std::runtime_error("an operand that is not rounded to TF32");
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// Products are exact in float64; how a GPU rounds within the sum of 16, or of 8 where a word holds
// one element, is not documented.
template <int InWord, typename Widen>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Widen&& widen,
                  int line) {
  const uint64_t mine[] = {a[0], a[1], a[2], a[3], b0, b1};
  const WarpWords& all = exchange(mine, line);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    double total = sum[i];
    for (int k = 0; k < 8 * InWord; ++k) {
      const int lane_of = k % (4 * InWord) / InWord, half = k / (4 * InWord);
      const uint64_t of_a = all.of[4 * g + lane_of][i / 2 + 2 * half];
      const uint64_t of_b = all.of[4 * column + lane_of][4 + half];
      total += static_cast<double>(widen(static_cast<uint32_t>(of_a), k % InWord)) *
               widen(static_cast<uint32_t>(of_b), k % InWord);
    }
    sum[i] = static_cast<float>(total);
  }
}

// The data may land at any time from here on until the wait is over. So that neither is taken for
// granted, the place is made NaN now and the data lands in the wait.
inline void copy_async(void* to, const void* from, bool valid, int line) {
  access(Space::shared_store, to, 16, true, line);
  if (valid) access(Space::global_load, from, 16, true, line);
  if (from == nullptr) throw std::runtime_error("an asynchronous copy from no address");
  std::memset(to, 0xff, 16);
  this_block->state[threadIdx.x].copies.push_back({to, valid ? from : nullptr});
}

inline void commit_copies() {
  Thread& thread = this_block->state[threadIdx.x];
  thread.groups.push_back(thread.copies.size());
}

inline void wait_copies(int pending) {
  Thread& thread = this_block->state[threadIdx.x];
  const auto groups = static_cast<int>(thread.groups.size()) - pending;
  if (groups <= 0) return;
  const std::size_t landing = thread.groups[groups - 1];
  for (std::size_t i = 0; i < landing; ++i) {
    const auto& [to, from] = thread.copies[i];
    if (from != nullptr)
      std::memcpy(to, from, 16);
    else
      std::memset(to, 0, 16);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + landing);
  thread.groups.erase(thread.groups.begin(), thread.groups.begin() + groups);
  for (std::size_t& end : thread.groups) end -= landing;
}

}  // namespace emulation
