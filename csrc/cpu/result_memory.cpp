#include "result_memory.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

// torch has it from 2.11 on; before that it is null here.
extern "C" __attribute__((weak)) AOTITorchError
torch_from_blob(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                AtenTensorHandle* result, int32_t layout, const uint8_t* metadata,
                int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace mnet::cpu {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Where results begin, by turns: all on the same line of a page would share the caches' sets.
constexpr std::size_t kStagger = 4096 + 5 * 64, kStaggers = 16;

struct Block {
  void* data;
  std::size_t bytes;

  void free() const {
    std::free(
        reinterpret_cast<void*>(reinterpret_cast<std::uintptr_t>(data) / kHugePage * kHugePage));
  }
};

// A sixteenth of the machine's memory, 2 GB at most.
std::size_t most_kept() {
  std::size_t bytes = std::size_t{256} << 20;
#if defined(__linux__)
  const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGE_SIZE);
  if (pages > 0 && size > 0)
    bytes = static_cast<std::size_t>(pages) / 16 * static_cast<std::size_t>(size);
#endif
  return std::min(bytes, std::size_t{2} << 30);
}

class Pool {
 public:
  // Null: there is none of this size.
  void* take(std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // The last that was freed is the likeliest to lie in the caches.
    const auto found = std::find_if(blocks_.rbegin(), blocks_.rend(),
                                    [&](const Block& block) { return block.bytes == bytes; });
    if (found == blocks_.rend()) return nullptr;
    void* data = found->data;
    bytes_ -= bytes;
    blocks_.erase(std::next(found).base());
    return data;
  }

  // The oldest go where there are too many.
  void give(Block block) {
    std::vector<Block> surplus;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      blocks_.push_back(block);
      bytes_ += block.bytes;
      auto kept = blocks_.begin();
      for (; bytes_ > most_; ++kept) bytes_ -= kept->bytes;
      surplus.assign(blocks_.begin(), kept);
      blocks_.erase(blocks_.begin(), kept);
    }
    for (const Block& old : surplus) old.free();
  }

 private:
  std::mutex mutex_;
  std::vector<Block> blocks_;  // by the time at which they were freed
  std::size_t bytes_ = 0;
  const std::size_t most_ = most_kept();
};

// Never destroyed: results may outlive whatever is.
Pool& pool() {
  static Pool& only = *new Pool;
  return only;
}

void give_back(void* data, void* bytes) {
  pool().give({data, reinterpret_cast<std::uintptr_t>(bytes)});
}

void* memory_of(std::size_t bytes) {
  if (void* kept = pool().take(bytes)) return kept;
  static std::atomic<std::size_t> turn{0};
  const std::size_t offset = turn++ % kStaggers * kStagger;
  const std::size_t whole = (bytes + offset + kHugePage - 1) / kHugePage * kHugePage;
  auto* data = static_cast<char*>(std::aligned_alloc(kHugePage, whole));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (data != nullptr) madvise(data, whole, MADV_HUGEPAGE);  // a hint: it may fail
#endif
  return data == nullptr ? nullptr : data + offset;
}

}  // namespace

Tensor empty_result(const Tensor& like, int64_t N, int64_t C, int64_t H, int64_t W, Layout layout) {
  constexpr std::size_t kFrom = std::size_t{1} << 20;  // smaller ones come from a heap that is kept
  const std::size_t bytes = static_cast<std::size_t>(N * C * H * W) * like.element_size();
  void* data = bytes >= kFrom && torch_from_blob != nullptr ? memory_of(bytes) : nullptr;
  if (data == nullptr) return empty_4d(like, N, C, H, W, layout);
  const int64_t sizes[] = {N, C, H, W};
  const int64_t by_channel[] = {C * H * W, H * W, W, 1}, by_pixel[] = {H * W * C, 1, W * C, C};
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_from_blob(data, 4, sizes, layout == Layout::contiguous ? by_channel : by_pixel, 0,
                      dtype, aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(),
                      nullptr, 0, give_back, reinterpret_cast<void*>(bytes)));
  return Tensor(handle);
}

}  // namespace mnet::cpu
