// Runs grids on one operating system thread: every CUDA thread is a fiber.
//
// Why not std::thread: ThreadSanitizer needs a clock for each CUDA thread, not real concurrency; its fibers have one,
// and a switch marked "no sync" adds no happens-before edge. In return the order is ours: a thread runs until it must
// wait, then the first by priority that can run does. Some race ahead as far as the barriers let them, so a missing
// barrier reads poison even without a sanitizer; failures repeat; a deadlock is reported. Blocks start in the order of
// their index, no more than `resident` at a time, which stands for a device that is busy with something else.
#pragma once

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace mk::host {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr auto relaxed = std::memory_order_relaxed;
using Word = std::atomic<unsigned>;

enum Status {
  kPass = 0,
  kWrongResult = 1,
  kBadInput = 2,
  kDeadlock = 3,
  kMisaligned = 4,
  kThreadSanitizer = 66,
  kAddressSanitizer = 67
};

// Faults that the tests of the tests inject. `ordinal` counts the block barriers of the first block.
enum class Fault { kNone, kBlockBarrier, kAsyncWait, kRelease, kWaitForH, kWaitForKernelInFront };
struct Injection {
  Fault fault = Fault::kNone;
  int ordinal = -1;
};
inline Injection injection;

enum class Order { kAscending, kDescending, kShuffled };

// A shuffle or an mma does not order memory: an edge there would hide a missing barrier.
enum class Edges { kNone, kMemory };

struct Barrier {
  template <Edges edges>
  void wait(unsigned threads);
  Word arrived{0}, phase{0};
};

struct Warp {
  Barrier exchange_barrier;
  // Two banks: a lane can be one collective ahead of another, never two.
  std::atomic<uint32_t> slots[2][kWarpSize][6];
};

struct Grid {
  int blocks, threads;
  size_t shared_bytes;
  std::function<void()> kernel;
};

struct Block {
  Block(const Grid& grid_, int index_, int start_)
      : grid(grid_),
        index(index_),
        start(start_),
        shared(static_cast<unsigned char*>(operator new(grid.shared_bytes, kAlignment))),
        warps(static_cast<size_t>(grid.threads / kWarpSize)) {
    memset(shared, 0xFF, grid.shared_bytes);  // NaN in every dtype
  }
  ~Block() {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(shared, grid.shared_bytes);
#endif
    operator delete(shared, kAlignment);
  }
  Block(const Block&) = delete;

  static constexpr std::align_val_t kAlignment{128};
  const Grid& grid;
  const int index, start;  // in its grid; among all blocks
  unsigned char* const shared;
  Barrier barrier;
  Word running{0};  // threads of it
  std::vector<Warp> warps;
};

struct AsyncCopy {
  void* target;
  unsigned char data[16];
};

struct Context {
  void *stack_pointer = nullptr, *tsan = nullptr, *fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
};

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Block* block = nullptr;
  int thread = 0, barriers_passed = 0, exchanges = 0;
  std::vector<AsyncCopy> open_copies;
  std::vector<std::vector<AsyncCopy>> copy_groups;
  // It can run unless the watched word still has this value.
  std::atomic<const Word*> watched{nullptr};
  Word watched_value{0};
};

// What fibers write here is relaxed: no races, and no edges.
struct Scheduler {
  Context main;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> priority;
  int resident = 0;
  std::atomic<Fiber*> current{nullptr};
  Word alive{0}, launches{0}, finished_blocks{0}, counter_writes{0};
  Word never{0};  // watched by fibers that have finished
  // A kernel in front that still runs, and what its end leaves in memory. It ends as late as it may: when every thread
  // that has started waits for it.
  std::function<void()> end_in_front;
  Word ended_in_front{1};
};
inline Scheduler& scheduler = *new Scheduler;  // never destroyed: its fibers never return

inline Fiber& self() { return *scheduler.current.load(relaxed); }

// For x86-64. Under ASan swapcontext would clear the target stack's red zones, and with them the sight of overruns.
extern "C" void mk_switch_stack(void** save, void* load);
asm(R"(
.pushsection .text.mk_switch_stack,"axG",@progbits,mk_switch_stack,comdat
.weak mk_switch_stack
.type mk_switch_stack,@function
mk_switch_stack:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.popsection
)");

inline void switch_to(Context& from, Context& to) {
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#elif defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
  mk_switch_stack(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

inline void resume(Fiber* fiber, Context& from) {
  scheduler.current.store(fiber, relaxed);
  switch_to(from, fiber->context);
}

// Not instrumented, for speed.
__attribute__((no_sanitize("thread"))) inline Fiber* first_runnable(Fiber* const* begin, Fiber* const* end) {
  for (; begin != end; ++begin) {
    const Word* watched = (*begin)->watched.load(relaxed);
    if (watched == nullptr || watched->load(relaxed) != (*begin)->watched_value.load(relaxed)) return *begin;
  }
  return nullptr;
}

inline Fiber* sleep_on(const Word& word, unsigned value) {
  Fiber& me = self();
  me.watched_value.store(value, relaxed);
  me.watched.store(&word, relaxed);
  Fiber* const* const begin = scheduler.priority.data();
  Fiber* const* const end = begin + scheduler.priority.size();
  Fiber* const next = first_runnable(begin, end);
  if (next != nullptr || scheduler.ended_in_front.load(relaxed) != 0) return next;
  scheduler.end_in_front();
  scheduler.ended_in_front.store(1, std::memory_order_release);
  return first_runnable(begin, end);
}

[[noreturn]] inline void fail(Status status, const char* what) {
  std::fprintf(stderr, "block %d thread %d: %s\n", self().block->start, self().thread, what);
  for (const Fiber* fiber : scheduler.priority)
    if (const Word* word = fiber->watched.load(relaxed); word && word != &scheduler.never)
      std::fprintf(stderr, "  block %d thread %d waits for %s\n", fiber->block->start, fiber->thread,
                   word == &fiber->block->barrier.phase ? "its block"
                   : word == &scheduler.counter_writes  ? "a counter"
                   : word == &scheduler.finished_blocks ? "an SM"
                   : word == &scheduler.ended_in_front  ? "the kernel in front"
                                                        : "its warp");
  std::_Exit(status);
}

inline void wait_for_change(const Word& word, unsigned value) {
  Fiber& me = self();
  Fiber* const next = sleep_on(word, value);
  if (next == nullptr) fail(kDeadlock, "no thread can continue");
  if (next != &me) resume(next, me.context);
  me.watched.store(nullptr, relaxed);
}

template <Edges edges>
void Barrier::wait(unsigned threads) {
  constexpr bool ordered = edges == Edges::kMemory;
  const unsigned old = phase.load(relaxed);
  if (arrived.fetch_add(1, ordered ? std::memory_order_acq_rel : relaxed) + 1 == threads) {
    arrived.store(0, relaxed);
    phase.store(old + 1, ordered ? std::memory_order_release : relaxed);
  } else {
    while (phase.load(ordered ? std::memory_order_acquire : relaxed) == old) wait_for_change(phase, old);
  }
}

inline void wait_for_kernel_in_front() {
  const Word& ended = scheduler.ended_in_front;
  while (ended.load(std::memory_order_acquire) == 0) wait_for_change(ended, 0);
}

inline void wait_for_residency(const Block& block) {
  const Word& finished = scheduler.finished_blocks;
  for (unsigned now = finished.load(relaxed); block.start >= static_cast<int>(now) + scheduler.resident;
       now = finished.load(relaxed))
    wait_for_change(finished, now);
}

[[noreturn]] inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  // The first fiber ever started came from the host's stack.
  Context from;
  __sanitizer_finish_switch_fiber(nullptr, &from.stack_bottom, &from.stack_bytes);
  if (scheduler.main.stack_bottom == nullptr) {
    scheduler.main.stack_bottom = from.stack_bottom;
    scheduler.main.stack_bytes = from.stack_bytes;
  }
#endif
  for (;;) {
    (void)scheduler.launches.load(std::memory_order_acquire);
    wait_for_residency(*self().block);
    self().block->grid.kernel();
    Fiber& me = self();
    if (me.block->running.fetch_sub(1, relaxed) == 1) scheduler.finished_blocks.fetch_add(1, relaxed);
    Fiber* const next = sleep_on(scheduler.never, 0);
    if (scheduler.alive.fetch_sub(1, std::memory_order_release) == 1)
      switch_to(me.context, scheduler.main);
    else if (next == nullptr)
      fail(kDeadlock, "no thread can continue");
    else
      resume(next, me.context);
  }
}

inline std::unique_ptr<Fiber> make_fiber() {
  auto fiber = std::make_unique<Fiber>();
  Context& context = fiber->context;
  context.stack_bottom = fiber->stack.get();
  context.stack_bytes = kStackBytes;
  // Six registers, the address for `ret`, and a null return address that keeps the ABI's alignment.
  auto* frame =
      reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(fiber->stack.get() + kStackBytes) & ~uintptr_t{15}) - 8;
  std::fill(frame, frame + 8, nullptr);
  frame[6] = reinterpret_cast<void*>(&fiber_main);
  context.stack_pointer = frame;
#if defined(__SANITIZE_THREAD__)
  context.tsan = __tsan_create_fiber(0);
#endif
  return fiber;
}

// Grids that start together, as on streams of their own; their blocks take turns. `end_in_front`, where there is one,
// is what the kernel does that all of them overlap.
inline void run_grids(const std::vector<Grid>& grids, int resident, Order order, unsigned seed,
                      std::function<void()> end_in_front = {}) {
  Scheduler& s = scheduler;
  s.ended_in_front.store(end_in_front ? 0 : 1, relaxed);
  s.end_in_front = std::move(end_in_front);
#if defined(__SANITIZE_THREAD__)
  if (s.main.tsan == nullptr) s.main.tsan = __tsan_get_current_fiber();
#endif
  std::vector<std::unique_ptr<Block>> live;
  int most = 0;
  for (const Grid& grid : grids) most = std::max(most, grid.blocks);
  for (int i = 0; i < most; ++i)
    for (const Grid& grid : grids)
      if (i < grid.blocks) live.push_back(std::make_unique<Block>(grid, i, static_cast<int>(live.size())));
  s.priority.clear();
  for (const auto& block : live) {
    block->running.store(static_cast<unsigned>(block->grid.threads), relaxed);
    for (int thread = 0; thread < block->grid.threads; ++thread) {
      const size_t i = s.priority.size();
      if (s.fibers.size() <= i) s.fibers.push_back(make_fiber());
      Fiber& fiber = *s.fibers[i];
      fiber.block = block.get();
      fiber.thread = thread;
      fiber.barriers_passed = fiber.exchanges = 0;
      fiber.open_copies.clear(), fiber.copy_groups.clear();
      fiber.watched.store(nullptr, relaxed);
      s.priority.push_back(&fiber);
    }
  }
  if (order == Order::kDescending) std::reverse(s.priority.begin(), s.priority.end());
  if (order == Order::kShuffled) std::shuffle(s.priority.begin(), s.priority.end(), std::mt19937(seed));
  s.resident = resident;
  s.finished_blocks.store(0, relaxed);
  s.alive.store(static_cast<unsigned>(s.priority.size()), relaxed);
  s.launches.fetch_add(1, std::memory_order_release);
  resume(s.priority.front(), s.main);
  (void)s.alive.load(std::memory_order_acquire);
}

}  // namespace mk::host
