// SPDX-License-Identifier: MIT
#include "aio/fiber.h"

#include <cxxabi.h>
#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <utility>
#include <vector>

#include "roost/base/check.h"

#if defined(__SANITIZE_ADDRESS__)
#define ROOST_ASAN_FIBERS 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ROOST_ASAN_FIBERS 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define ROOST_TSAN_FIBERS 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define ROOST_TSAN_FIBERS 1
#endif
#endif
#ifdef ROOST_ASAN_FIBERS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef ROOST_TSAN_FIBERS
#include <sanitizer/tsan_interface.h>
#endif

namespace roost {

namespace {

constexpr std::size_t kGuardBytes = 4096;
constexpr std::size_t kStackBytes = 512 << 10;

// Stacks of fibers that ended, for the next ones: a simulation has a handful, and a test program
// makes thousands of simulations, one after the other.
class Stacks {
 public:
  ~Stacks() {
    for (std::byte* stack : free_) ::munmap(stack, kStackBytes);
  }

  std::byte* take() {
    if (!free_.empty()) {
      std::byte* const stack = free_.back();
      free_.pop_back();
      return stack;
    }
    void* const memory = ::mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
    ::mprotect(memory, kGuardBytes, PROT_NONE);
    return static_cast<std::byte*>(memory);
  }

  void give_back(std::byte* stack) { free_.push_back(stack); }

 private:
  std::vector<std::byte*> free_;
};

Stacks& stacks() {
  static thread_local Stacks of_thread;
  return of_thread;
}

thread_local constinit Fiber* starting = nullptr;

}  // namespace

#if defined(__x86_64__)

// void roost_switch_stack(void** from, void* to): what the caller of a function may rely on goes to
// the stack, whose pointer goes to *from; then the same backwards from the stack at `to`. Nothing
// in a simulation changes how the FPU rounds.
asm(R"(
  .pushsection .text
  .p2align 4
  .hidden roost_switch_stack
  .globl roost_switch_stack
  .type roost_switch_stack, @function
roost_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size roost_switch_stack, .-roost_switch_stack
  .popsection
)");
extern "C" void roost_switch_stack(void** from, void* to) noexcept;

// As if start() had just been called, from nowhere.
void Fiber::prepare(Side& side, std::byte* stack, std::size_t size) {
  constexpr std::size_t kRegisters = 6;
  auto* word = reinterpret_cast<std::uintptr_t*>(stack + size);
  *--word = 0;  // where start() would return to; the stack is aligned as after a call
  *--word = reinterpret_cast<std::uintptr_t>(&Fiber::start);
  for (std::size_t i = 0; i < kRegisters; ++i) *--word = 0;
  side = word;
}

void Fiber::switch_sides(Side& from, Side& to) noexcept { roost_switch_stack(&from, to); }

#else

void Fiber::prepare(Side& side, std::byte* stack, std::size_t size) {
  ROOST_CHECK(::getcontext(&side) == 0, "getcontext: errno {}", errno);
  side.uc_stack.ss_sp = stack;
  side.uc_stack.ss_size = size;
  side.uc_link = nullptr;
  ::makecontext(&side, &Fiber::start, 0);
}

void Fiber::switch_sides(Side& from, Side& to) noexcept { ::swapcontext(&from, &to); }

#endif

Fiber::Fiber(std::function<void()> body) : body_(std::move(body)), stack_(stacks().take()) {
  prepare(own_, stack_ + kGuardBytes, kStackBytes - kGuardBytes);
#ifdef ROOST_TSAN_FIBERS
  tsan_fiber_ = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
  ROOST_CHECK(ended_, "a fiber is destroyed before it has ended");
#ifdef ROOST_TSAN_FIBERS
  __tsan_destroy_fiber(tsan_fiber_);
#endif
#ifdef ROOST_ASAN_FIBERS
  // run() never returned, so what surrounds its variables is still marked.
  __asan_unpoison_memory_region(stack_ + kGuardBytes, kStackBytes - kGuardBytes);
#endif
  stacks().give_back(stack_);
}

void Fiber::swap_thread_state() noexcept {
  std::swap(this_thread(), thread_state_);
  auto* const globals = reinterpret_cast<Exceptions*>(abi::__cxa_get_globals());
  std::swap(*globals, exceptions_);
}

void Fiber::resume() {
  starting = this;
  swap_thread_state();
#ifdef ROOST_ASAN_FIBERS
  void* caller_fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&caller_fake_stack, stack_ + kGuardBytes,
                                 kStackBytes - kGuardBytes);
#endif
#ifdef ROOST_TSAN_FIBERS
  tsan_caller_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_fiber_, 0);
#endif
  switch_sides(caller_, own_);
#ifdef ROOST_ASAN_FIBERS
  __sanitizer_finish_switch_fiber(caller_fake_stack, nullptr, nullptr);
#endif
  swap_thread_state();
}

void Fiber::pause() {
#ifdef ROOST_ASAN_FIBERS
  __sanitizer_start_switch_fiber(ended_ ? nullptr : &fake_stack_, caller_stack_,
                                 caller_stack_size_);
#endif
#ifdef ROOST_TSAN_FIBERS
  __tsan_switch_to_fiber(tsan_caller_, 0);
#endif
  switch_sides(own_, caller_);
#ifdef ROOST_ASAN_FIBERS
  __sanitizer_finish_switch_fiber(fake_stack_, &caller_stack_, &caller_stack_size_);
#endif
}

void Fiber::start() { starting->run(); }

void Fiber::run() noexcept {
#ifdef ROOST_ASAN_FIBERS
  __sanitizer_finish_switch_fiber(nullptr, &caller_stack_, &caller_stack_size_);
#endif
  body_();
  ended_ = true;
  pause();
  panic("a fiber that has ended was resumed");
}

}  // namespace roost
