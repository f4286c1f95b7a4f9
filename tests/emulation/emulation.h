// CUDA's words for the host compiler, so that csrc/cuda/*.cuh compiles and runs without a GPU.
// Blocks run one after another. The threads of a block take turns wherever they meet (in barriers
// or shuffles), else they too run one after another; under ThreadSanitizer they are real threads.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fibers.h"
#include "traffic.h"

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emulation {

struct Dim3 {
  unsigned x = 0, y = 0, z = 0;
};

// All members wait until all have come; whoever leaves is waited for no more, as on a GPU.
class Barrier {
 public:
  void reset(int members) { members_ = members, waiting_ = 0; }

  void wait() {
    std::unique_lock lock(mutex_);
    const uint64_t mine = generation_;
    ++waiting_;
    release_if_complete();
    if (Fibers::here()) {
      lock.unlock();
      while (generation_ == mine) Fibers::yield();
      return;
    }
    all_here_.wait(lock, [&] { return generation_ != mine; });
  }

  void leave() {
    std::lock_guard lock(mutex_);
    --members_;
    release_if_complete();
  }

 private:
  void release_if_complete() {
    if (waiting_ == 0 || waiting_ < members_) return;
    waiting_ = 0;
    ++generation_;
    all_here_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable all_here_;
  int members_ = 0, waiting_ = 0;
  uint64_t generation_ = 0;
};

inline constexpr int kWarp = 32;

// For instructions of a whole warp (mma.h).
struct WarpWords {
  static constexpr int kWords = 7;
  uint64_t of[kWarp][kWords];
};

struct Warp {
  Barrier barrier;
  uint64_t slot[kWarp];
  WarpWords words[2];
};

// What a thread has under way (mma.h): copies (to, from), and where each group of them ends.
struct Thread {
  uint64_t shown = 0;  // how often it showed others its words
  std::vector<std::pair<void*, const void*>> copies;
  std::vector<std::size_t> groups;
};

struct Block {
  int threads = 0;
  std::vector<Thread> state;
  Barrier barrier;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;  // exactly as large as the launch asked for
  bool meets = false;
};

inline thread_local Block* this_block = nullptr;
inline thread_local std::vector<Access>* this_log = nullptr;  // null: nobody counts
inline thread_local int this_phase = 0;                       // barriers passed

}  // namespace emulation

inline thread_local emulation::Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

inline unsigned char* shared_memory() { return this_block->shared; }

// Called before every load and store; true if it is to happen.
inline bool access(Space space, const void* pointer, std::size_t bytes, bool valid, int line) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (this_log)
    this_log->push_back({address, static_cast<uint32_t>(bytes), space, line, this_phase, valid});
  if (!valid) return false;
  if (address % bytes != 0)
    throw std::runtime_error("misaligned access: " + std::to_string(bytes) +
                             " bytes at an address that is " + std::to_string(address % bytes) +
                             " past a multiple of them");
  return true;
}

inline void require_meeting() {
  if (!this_block->meets)
    throw std::runtime_error("threads meet in a kernel that was launched as one where they do not");
}

template <typename T>
T shuffle(T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  require_meeting();
  Warp& warp = this_block->warps[threadIdx.x / kWarp];
  const int own = static_cast<int>(threadIdx.x) % kWarp;
  std::memcpy(&warp.slot[own], &value, sizeof value);
  warp.barrier.wait();
  if (lane >= 0 && lane < kWarp) std::memcpy(&value, &warp.slot[lane], sizeof value);
  warp.barrier.wait();
  return value;
}

inline void require_full(unsigned mask) {
  if (mask != 0xffffffffu) throw std::runtime_error("the emulation knows full warps only");
}

// Runs kernel() for every thread of every block. The first exception of any thread is thrown.
class Grid {
 public:
  Grid(int64_t blocks, int threads, int shared_bytes, bool meets, Traffic* traffic)
      : blocks_(blocks), last_(blocks), shared_bytes_(shared_bytes), traffic_(traffic) {
    block_.threads = threads;
    block_.meets = meets;
    block_.warps = std::vector<Warp>((threads + kWarp - 1) / kWarp);
    block_.state.resize(threads);
    logs_.resize(threads);
  }

  // Leaves out all but about `count` of the first `of` blocks, evenly spread.
  void sample(int64_t of, int64_t count) {
    last_ = std::max<int64_t>(1, std::min(of, blocks_));
    step_ = (last_ + count - 1) / count;
  }

  void run(const std::function<void()>& kernel, bool real_threads) {
    if (!real_threads && !block_.meets) {
      for (int64_t b = 0; b < last_; b += step_) {
        begin_block();
        for (int t = 0; t < block_.threads; ++t) run_thread(kernel, b, t);
        end_block();
      }
    } else if (!real_threads) {
      run_fibers(kernel);
    } else {
      run_threads(kernel);
    }
  }

 private:
  void run_fibers(const std::function<void()>& kernel) {
    Fibers fibers(block_.threads);
    std::vector<int> phases(block_.threads);
    std::exception_ptr failure;
    for (int64_t b = 0; b < last_ && !failure; b += step_) {
      begin_block();
      phases.assign(block_.threads, 0);
      fibers.run(
          [&](int t) {
            try {
              kernel();
            } catch (...) {
              failure = std::current_exception();
            }
            block_.barrier.leave();
            block_.warps[t / kWarp].barrier.leave();
          },
          [&](int t) { become(b, t), this_phase = phases[t]; },
          [&](int t) { phases[t] = this_phase; });
      end_block();
    }
    if (failure) std::rethrow_exception(failure);
  }

  void run_threads(const std::function<void()>& kernel) {
    std::vector<std::thread> threads;
    // Two: a thread that leaves the first one late must not be ordered, by its lock, after what an
    // early one did before it came to the second. ThreadSanitizer would not see their race.
    Barrier begun, ended;
    begun.reset(block_.threads);
    ended.reset(block_.threads);
    std::exception_ptr failure;
    std::mutex failure_lock;
    for (int t = 0; t < block_.threads; ++t)
      threads.emplace_back([&, t] {
        for (int64_t b = 0; b < last_; b += step_) {
          if (t == 0) begin_block();
          begun.wait();
          if (!failure) try {
              run_thread(kernel, b, t);
            } catch (...) {
              std::lock_guard lock(failure_lock);
              next_failure_ = std::current_exception();
            }
          block_.barrier.leave();
          block_.warps[t / kWarp].barrier.leave();
          ended.wait();
          if (t == 0) {
            failure = next_failure_;
            end_block();
          }
        }
      });
    for (auto& thread : threads) thread.join();
    if (failure) std::rethrow_exception(failure);
  }

  void begin_block() {
    shared_.reset();
    if (shared_bytes_ > 0) {
      shared_.reset(static_cast<unsigned char*>(
          ::operator new(static_cast<std::size_t>(shared_bytes_), std::align_val_t(128))));
      std::memset(shared_.get(), 0xff, static_cast<std::size_t>(shared_bytes_));  // NaN
    }
    block_.shared = shared_.get();
    for (Thread& thread : block_.state) thread.copies.clear(), thread.groups.clear();
    block_.barrier.reset(block_.threads);
    for (int w = 0; w < static_cast<int>(block_.warps.size()); ++w)
      block_.warps[w].barrier.reset(std::min(kWarp, block_.threads - w * kWarp));
  }

  void run_thread(const std::function<void()>& kernel, int64_t block, int thread) {
    become(block, thread);
    kernel();
  }

  void become(int64_t block, int thread) {
    this_block = &block_;
    this_log = traffic_ ? &logs_[thread] : nullptr;
    this_phase = 0;
    threadIdx = {static_cast<unsigned>(thread), 0, 0};
    blockIdx = {static_cast<unsigned>(block), 0, 0};
    blockDim = {static_cast<unsigned>(block_.threads), 1, 1};
    gridDim = {static_cast<unsigned>(blocks_), 1, 1};
  }

  void end_block() {
    if (traffic_) traffic_->count_block(logs_);
    for (auto& log : logs_) log.clear();
  }

  struct Free {
    void operator()(unsigned char* p) const { ::operator delete(p, std::align_val_t(128)); }
  };

  int64_t blocks_, last_, step_ = 1;
  int shared_bytes_;
  Traffic* traffic_;
  Block block_;
  std::unique_ptr<unsigned char, Free> shared_;
  std::vector<std::vector<Access>> logs_;
  std::exception_ptr next_failure_;
};

// The emulated counterpart of kernel<<<...>>>(arguments...).
struct Launcher {
  bool real_threads = false;
  Traffic* traffic = nullptr;
  // Run only so many blocks (0: all) of those that the first of so many images fill.
  int64_t sample = 0, images = 1;

  template <typename Kernel, typename Geometry, typename... Arguments>
  void operator()(Kernel kernel, const Geometry& g, const Arguments&... arguments) const {
    const int64_t blocks = g.blocks;
    const int threads = g.threads;
    if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > 1024)
      throw std::runtime_error("no such grid: " + std::to_string(blocks) + " blocks of " +
                               std::to_string(threads) + " threads");
    Grid grid(blocks, threads, g.shared_bytes, g.cooperates, traffic);
    if (sample) grid.sample(blocks / images, sample);
    grid.run([&] { kernel(arguments...); }, real_threads);
  }
};

}  // namespace emulation

inline void __syncthreads() {
  emulation::require_meeting();
  emulation::this_block->barrier.wait();
  ++emulation::this_phase;
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulation::require_meeting();
  emulation::require_full(mask);
  emulation::this_block->warps[threadIdx.x / emulation::kWarp].barrier.wait();
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  emulation::require_full(mask);
  return emulation::shuffle(value, lane % emulation::kWarp);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  emulation::require_full(mask);
  return emulation::shuffle(value, static_cast<int>(threadIdx.x % emulation::kWarp) ^ lanes);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int lanes) {
  emulation::require_full(mask);
  return emulation::shuffle(value, static_cast<int>(threadIdx.x % emulation::kWarp) + lanes);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int lanes) {
  emulation::require_full(mask);
  return emulation::shuffle(value, static_cast<int>(threadIdx.x % emulation::kWarp) - lanes);
}
