// Threads that take turns by themselves, on stacks of their own within one thread of the machine:
// where many meet at barriers, a hundred times cheaper than real threads.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

#ifdef __SANITIZE_ADDRESS__  // which wants to know the stack in use
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
#endif

namespace emulation {

class Fibers {
 public:
  explicit Fibers(int count) : fibers_(count) {
    for (Fiber& fiber : fibers_) fiber.stack.reset(new char[kStack]);
  }

  // Runs body(i) as fiber i, each until it yields or ends, in turn, until all have ended. Before
  // fiber i goes on, enter(i) is called, and leave(i) when it has stopped.
  void run(const std::function<void(int)>& body, const std::function<void(int)>& enter,
           const std::function<void(int)>& leave) {
    running_ = this;
    body_ = &body;
    for (Fiber& fiber : fibers_) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler_;
      fiber.fake_stack = nullptr;
      fiber.ended = false;
      makecontext(&fiber.context, &Fibers::main_of_fiber, 0);
    }
    for (std::size_t alive = fibers_.size(); alive > 0;)
      for (current_ = 0; current_ < static_cast<int>(fibers_.size()); ++current_) {
        Fiber& fiber = fibers_[current_];
        if (fiber.ended) continue;
        enter(current_);
        void* fake_stack = nullptr;
        __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStack);
        swapcontext(&scheduler_, &fiber.context);
        __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
        leave(current_);
        if (fiber.ended) --alive;
      }
    running_ = nullptr;
  }

  // Whether the caller is a fiber.
  static bool here() { return running_ != nullptr; }

  // Lets the others go on.
  static void yield() {
    Fibers& all = *running_;
    Fiber& fiber = all.fibers_[all.current_];
    __sanitizer_start_switch_fiber(&fiber.fake_stack, all.stack_, all.stack_size_);
    swapcontext(&fiber.context, &all.scheduler_);
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &all.stack_, &all.stack_size_);
  }

 private:
  static constexpr std::size_t kStack = 256 << 10;

  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    void* fake_stack = nullptr;
    bool ended = false;
  };

  static void main_of_fiber() {
    Fibers& all = *running_;
    __sanitizer_finish_switch_fiber(nullptr, &all.stack_, &all.stack_size_);
    (*all.body_)(all.current_);
    all.fibers_[all.current_].ended = true;
    __sanitizer_start_switch_fiber(nullptr, all.stack_, all.stack_size_);
  }

  static inline thread_local Fibers* running_ = nullptr;
  std::vector<Fiber> fibers_;
  const std::function<void(int)>* body_ = nullptr;
  int current_ = 0;
  ucontext_t scheduler_;
  const void* stack_ = nullptr;  // the scheduler's
  std::size_t stack_size_ = 0;
};

}  // namespace emulation
