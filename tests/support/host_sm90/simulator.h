// A model of the parts of a Hopper multiprocessor that the row kernel relies on: every CUDA thread is a fiber, and TMA
// boxes, wgmma and bulk stores are events that happen at any moment between issue and wait. It is the weakest machine
// that the PTX manual allows, as far as it is modelled:
//
// - the target of a TMA load is NaN from issue on, the accumulators of a wgmma until the wait for it;
// - operands of wgmma, in registers and in shared memory, are read when it happens, not when it is issued;
// - what a thread wrote to shared memory is seen by TMA and wgmma only after its proxy fence.
//
// Not modelled: memory order between threads other than by the schedule itself, bank conflicts, time.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace sim {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};
inline void require(bool condition, const char* what) {
  if (!condition) throw Failure(what);
}

// The defect of a copy of the kernel that test_cuda_sm90.py has broken on purpose.
inline int mutant = 0;

// Faults in the machine, to show that the tests notice them.
enum class Fault {
  none,
  early_empty,   // barriers with several arrivals complete one arrival early
  lost_arrival,  // arrivals at other blocks get lost
  parity,        // waits for parity 1 return at once
  short_expect,  // barriers expect 128 bytes less
  no_proxy_fence,
  no_named_barrier,
  no_store_wait,
  early_wgmma_wait,  // one more group may be pending
  no_first_cluster_sync,
  no_last_cluster_sync,
  own_multicast,  // a box arrives in the issuing block only
  count
};

enum class Order { random, events_last, events_first, slow_block, slow_group, slow_warp, slow_producer, count };

struct Fiber;
using Waiters = std::vector<Fiber*>;

struct Barrier {  // mbarrier
  int arrivals = 0, pending = 0, bytes = 0;
  uint32_t phase = 0;
  Waiters waiters;
};

struct Rendezvous {  // a barrier of a fixed number of threads
  int arrived = 0;
  uint32_t round = 0;
  Waiters waiters;
};

// One warp's quarter of a wgmma, its 16 rows. It happens when its lanes have issued it; a wait covers no other quarter.
struct Product {
  bool a_in_registers = false, fresh = false;
  int n = 0, issued = 0;
  uint64_t a = 0, b = 0;
  float* d[32] = {};
  const uint32_t* a_registers[32] = {};
};

struct Warp {
  std::deque<Product> products;  // issued and not executed
  uint64_t executed = 0;
  Waiters waiters;
  Rendezvous rendezvous;
  uint32_t addresses[32];
  uint32_t values[32][4];
  std::vector<uint32_t> unfenced;  // pieces of shared memory that lanes wrote and have not fenced
};

constexpr uint32_t kSharedBase = 1024, kSharedBytes = 228 * 1024;

struct Block {
  int index, cluster_rank, alive;
  std::vector<uint8_t> shared = std::vector<uint8_t>(kSharedBase + kSharedBytes, 0xFF);
  std::vector<uint32_t> writers = std::vector<uint32_t>((kSharedBase + kSharedBytes) / 16, 0);  // lanes without a fence
  std::map<uint32_t, Barrier> barriers;
  Rendezvous named[16];
  std::vector<Warp> warps;
  struct Cluster* cluster;
};

struct Cluster {
  int id;
  std::vector<Block*> blocks;
  Rendezvous sync;
};

// A matrix in global memory as TMA sees it. `fetches` counts boxes by (row, column), `writes` elements.
struct TensorMap {
  const uint16_t* data = nullptr;
  int64_t rows = 0, columns = 0, stride = 0;
  int box_rows = 0;
  std::map<std::pair<int32_t, int32_t>, int>* fetches = nullptr;
  std::vector<uint8_t>* writes = nullptr;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block = nullptr;
  int thread = 0, cluster_syncs = 0;
  bool slow = false, done = false, armed = false;
  // wgmma: products issued, last product of each committed group, sums in flight by accumulator
  uint64_t issued = 0;
  std::deque<uint64_t> groups;
  struct Sum {
    std::vector<float> values;
    uint64_t last;
  };
  std::map<float*, Sum> sums;
  // bulk stores
  int stores = 0, open_stores = 0;
  Waiters store_waiters;
};

class Machine {
 public:
  Fault fault = Fault::none;

  void run(int clusters, int cluster_size, int threads, Order order, uint32_t seed, std::function<void()> kernel) {
    random_.seed(seed);
    order_ = order;
    kernel_ = std::move(kernel);
    build(clusters, cluster_size, threads);
    try {
      loop();
    } catch (const Failure&) {
      events_.clear();
      throw;
    }
  }

  Fiber& self() { return *current_; }
  Block& block() { return *current_->block; }
  int num_clusters() const { return static_cast<int>(clusters_.size()); }
  std::mt19937& random() { return random_; }

  void post(std::function<void()> event) { events_.push_back(std::move(event)); }

  void wait_in(Waiters& waiters) {
    waiters.push_back(current_);
    swapcontext(&current_->context, &main_);
  }
  void wake(Waiters& waiters) {
    for (Fiber* fiber : waiters) ready_[fiber->slow].push_back(fiber);
    waiters.clear();
  }
  void yield() {
    ready_[current_->slow].push_back(current_);
    swapcontext(&current_->context, &main_);
  }
  void meet(Rendezvous& r, int threads) {
    const uint32_t round = r.round;
    if (++r.arrived == threads) {
      r.arrived = 0;
      ++r.round;
      wake(r.waiters);
    } else {
      while (r.round == round) wait_in(r.waiters);
    }
  }

  Barrier& barrier(Block& owner, uint32_t address) {
    require(owner.alive > 0, "a barrier of a block that has left is used");
    const auto found = owner.barriers.find(address);
    require(found != owner.barriers.end(), "a barrier is used before it is initialised");
    return found->second;
  }
  void update(Barrier& b, int arrivals, int bytes) {
    b.pending -= arrivals;
    b.bytes += bytes;
    require(b.pending >= 0, "more arrivals at a barrier than it expects");
    if (b.pending > 0 || b.bytes != 0) return;
    ++b.phase;
    b.pending = b.arrivals;
    wake(b.waiters);
  }

 private:
  void build(int clusters, int cluster_size, int threads) {
    ready_[0].clear(), ready_[1].clear(), events_.clear();
    blocks_.clear(), clusters_.clear();
    const int slow_block = static_cast<int>(random_() % (clusters * cluster_size));
    size_t next = 0;
    for (int i_cluster = 0; i_cluster < clusters; ++i_cluster) {
      clusters_.push_back(std::make_unique<Cluster>());
      clusters_.back()->id = i_cluster;
      for (int rank = 0; rank < cluster_size; ++rank) {
        blocks_.push_back(std::make_unique<Block>());
        Block& b = *blocks_.back();
        b.index = i_cluster * cluster_size + rank;
        b.cluster_rank = rank;
        b.alive = threads;
        b.cluster = clusters_.back().get();
        b.warps.resize(threads / 32);
        clusters_.back()->blocks.push_back(&b);
        for (int thread = 0; thread < threads; ++thread) start(next++, b, thread, slow_block);
      }
    }
    alive_ = next;
  }

  void start(size_t index, Block& b, int thread, int slow_block) {
    if (fibers_.size() <= index) {
      fibers_.push_back(std::make_unique<Fiber>());
      fibers_.back()->stack.reset(new char[kStackBytes]);
    }
    auto stack = std::move(fibers_[index]->stack);
    *fibers_[index] = Fiber();
    Fiber& f = *fibers_[index];
    f.stack = std::move(stack);
    f.block = &b;
    f.thread = thread;
    const bool here = b.index == slow_block;
    f.slow = (order_ == Order::slow_block && here) || (order_ == Order::slow_group && here && thread / 128 == 1) ||
             (order_ == Order::slow_warp && here && thread / 32 == 6) ||
             (order_ == Order::slow_producer && here && thread == 0);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = &main_;
    makecontext(&f.context, reinterpret_cast<void (*)()>(&Machine::enter), 0);
    ready_[f.slow].push_back(&f);
  }

  static void enter();

  void loop() {
    while (alive_ > 0 || !events_.empty()) {
      const bool can_run = !ready_[0].empty() || !ready_[1].empty();
      bool event = !events_.empty();
      if (event && can_run) {
        if (order_ == Order::events_last)
          event = false;
        else if (order_ != Order::events_first)
          event = random_() % 64 < (ready_[0].empty() ? 48 : 1);
      }
      if (event) {
        std::swap(events_[random_() % events_.size()], events_.back());
        const auto happens = std::move(events_.back());
        events_.pop_back();
        happens();
      } else if (can_run) {
        auto& ready = ready_[0].empty() ? ready_[1] : ready_[0];
        // The last to become ready as often as any: a thread that runs on is as likely as a switch.
        std::swap(ready[random_() % 2 ? ready.size() - 1 : random_() % ready.size()], ready.back());
        current_ = ready.back();
        ready.pop_back();
        swapcontext(&main_, &current_->context);
        if (!error_.empty()) throw Failure(std::exchange(error_, {}));
        if (current_->done) leave(*current_);
      } else {
        throw Failure("deadlock");
      }
    }
  }

  void leave(Fiber& f) {
    --alive_;
    require(f.stores == 0, "a thread leaves before its stores have read shared memory");
    if (--f.block->alive == 0)
      for (const Warp& warp : f.block->warps) require(warp.products.empty(), "a block leaves wgmma in flight");
  }

  static constexpr size_t kStackBytes = 64 * 1024;
  std::mt19937 random_;
  Order order_ = Order::random;
  std::function<void()> kernel_;
  ucontext_t main_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<std::unique_ptr<Cluster>> clusters_;
  std::vector<Fiber*> ready_[2];  // others, slow ones
  std::vector<std::function<void()>> events_;
  Fiber* current_ = nullptr;
  size_t alive_ = 0;
  std::string error_;
};

inline Machine machine;

inline void Machine::enter() {
  try {
    machine.kernel_();
    machine.current_->done = true;
  } catch (const Failure& failure) {  // may not leave the fiber
    machine.error_ = "block " + std::to_string(machine.current_->block->index) + " thread " +
                     std::to_string(machine.current_->thread) + ": " + failure.what();
  }
}

}  // namespace sim
