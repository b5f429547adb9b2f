// The schedule: one parallel region for all layers of a call.
//
// A call is two phases of tasks. A shrink task computes H for a block of rows and a group of panels of v, over all or a
// part of K; an expand task computes y for a block of rows and a group of panels of u. Every body first claims its own
// share of a phase, then what others have not claimed. So when it comes to wait for a block of H, all of the block's
// tasks are held by running bodies, and the call ends even if the pool runs one body after another. Shares are fixed,
// so from call to call a core finds its part of the weights in its own cache.
#include <atomic>
#include <cstdlib>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu.h"
#include "cut.h"

namespace mk::cpu {
namespace {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kElementsPerThread = 32 << 10;  // of a normalisation: fewer are not worth another thread
constexpr int64_t kChunkRows = 2048;              // rows of one region: bounds the scratch that holds H

template <class T>
T least(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T most(T a, T b) {
  return a < b ? b : a;
}

// Scratch of the calling thread, kept from call to call.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // Null when there is no memory.
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = round_up(bytes + bytes / 4, 4096);
      data_ = static_cast<char*>(std::aligned_alloc(4096, static_cast<size_t>(size_)));
      if (data_ == nullptr) size_ = 0;
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0;
};

// Offsets into a block of memory that is allocated when its size is known.
class Layout {
 public:
  int64_t add(int64_t bytes) {
    const int64_t offset = size_;
    size_ += round_up(bytes, kCacheLine);
    return offset;
  }
  int64_t size() const { return size_; }

 private:
  int64_t size_ = 0;
};

// Rows of one layer, cut into tasks.
struct Work : Cut {
  Layer layer;  // x, y, h moved to the first row of the chunk, M to its rows
  int64_t rank;
  const char* v_panels;  // or null
  const char* u_panels;
  int64_t first_shrink, first_expand;  // numbers of the first tasks
  int64_t hidden, stride_hidden, partial, ready, arrived;

  Size size() const { return {layer.M, layer.N, layer.K, rank}; }
};

using Counter = std::atomic<int32_t>;

struct Call {
  const Kernel* kernel;
  DType dtype;
  Work* work;
  int64_t layers, threads, tasks[2];
  char* scratch;
  int64_t claimed[2];  // offsets of the claims of both phases: one counter per share
  int64_t own, own_bytes;

  Counter* counters(int64_t offset) const { return reinterpret_cast<Counter*>(scratch + offset); }
};

const char* at(const void* p, int64_t bytes) { return static_cast<const char*>(p) + bytes; }
char* at(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb" ::: "memory");  // yield is a no-op on the cores without SMT, which is nearly all of them
#endif
}

Product block_of(const Work& w, int64_t block) {
  Product p{};
  p.rows = least(w.block_rows, w.layer.M - block * w.block_rows);
  p.far = w.far;
  return p;
}

// The rows of a block, by the task that wrote the last of them.
void normalise(const Call& call, const Work& w, int64_t block) {
  const Layer& l = w.layer;
  Normalisation n{};
  n.rows = block_of(w, block).rows;
  n.n = w.rank;
  n.from = n.to = call.scratch + w.hidden + block * w.block_rows * w.stride_hidden;
  n.stride_from = n.stride_to = w.stride_hidden;
  n.weight = static_cast<const char*>(l.norm);
  n.eps = l.norm_eps;
  n.scale = l.scale;
  call.kernel->normalise_prepared(n);
}

void run_shrink(const Call& call, const Work& w, int64_t task, char* scratch) {
  const Layer& l = w.layer;
  const int64_t part = task % w.parts, group = task / w.parts % w.shrink_groups;
  const int64_t block = task / w.parts / w.shrink_groups;
  const int64_t row = block * w.block_rows, column = group * w.shrink_panels * kPanel, k0 = part * w.part_k;
  const int64_t bytes = element_bytes(call.dtype), width = round_up(w.rank, kPanel);
  Product p = block_of(w, block);
  p.n = least(w.shrink_panels * kPanel, w.rank - column);
  p.k = least(w.part_k, l.K - k0);
  p.a = at(l.x, (row * l.stride_xm + k0) * bytes);
  p.stride_a = l.stride_xm * bytes;
  if (w.v_panels) {
    p.stride_panel = panel_bytes(l.K, call.dtype);
    p.panels = w.v_panels + column / kPanel * p.stride_panel + k0 / unit_length(call.dtype) * kUnitBytes;
  }
  p.w = at(l.v, (column * l.stride_vr + k0) * bytes);
  p.stride_w = l.stride_vr * bytes;
  p.hidden = call.scratch + w.hidden + row * w.stride_hidden + column * call.kernel->a_bytes;
  p.stride_hidden = w.stride_hidden;
  p.out = l.h ? at(l.h, (row * l.stride_hm + column) * bytes) : nullptr;
  p.stride_out = l.stride_hm * bytes;
  p.scale = l.norm ? 1 : l.scale;
  p.target = Target::hidden;
  if (w.parts > 1) {
    float* const first_part = reinterpret_cast<float*>(call.scratch + w.partial) + row * width + column;
    const int64_t stride_part = l.M * width;
    p.target = Target::partial;
    p.partial = first_part + part * stride_part;
    p.stride_partial = width;
    call.kernel->product(p, scratch);
    Counter& arrived = call.counters(w.arrived)[block * w.shrink_groups + group];
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < w.parts) return;
    p.partial = first_part;
    call.kernel->reduce(p, w.parts, stride_part);
  } else {
    call.kernel->product(p, scratch);
  }
  Counter& ready = call.counters(w.ready)[block];
  const int32_t before = ready.fetch_add(1, std::memory_order_acq_rel);
  if (l.norm == nullptr || before + 1 < w.shrink_groups) return;
  normalise(call, w, block);
  ready.fetch_add(1, std::memory_order_release);
}

void run_expand(const Call& call, const Work& w, int64_t task, char* scratch) {
  const Layer& l = w.layer;
  const int64_t group = task % w.expand_groups, block = task / w.expand_groups;
  const int64_t row = block * w.block_rows, column = group * w.expand_panels * kPanel;
  const int64_t bytes = element_bytes(call.dtype);
  const int64_t needed = w.rank ? w.shrink_groups + (l.norm != nullptr) : 0;
  while (call.counters(w.ready)[block].load(std::memory_order_acquire) < needed) pause();
  Product p = block_of(w, block);
  p.n = least(w.expand_panels * kPanel, l.N - column);
  p.k = w.rank;
  p.a = call.scratch + w.hidden + row * w.stride_hidden;
  p.stride_a = w.stride_hidden;
  p.prepared = true;
  if (w.u_panels) {
    p.stride_panel = panel_bytes(l.R, call.dtype);
    p.panels = w.u_panels + column / kPanel * p.stride_panel;
  }
  p.w = at(l.u, column * l.stride_un * bytes);
  p.stride_w = l.stride_un * bytes;
  p.target = Target::output;
  p.out = at(l.y, (row * l.stride_ym + column) * bytes);
  p.stride_out = l.stride_ym * bytes;
  p.bias = l.bias ? at(l.bias, column * bytes) : nullptr;
  p.residual = l.residual ? at(l.residual, (row * l.stride_resm + column) * bytes) : nullptr;
  p.stride_residual = l.stride_resm * bytes;
  p.activation = l.activation;
  call.kernel->product(p, scratch);
}

void run_task(const Call& call, int phase, int64_t task, char* scratch) {
  int64_t i = 0;
  const auto first = [&](int64_t layer) {
    return phase == 0 ? call.work[layer].first_shrink : call.work[layer].first_expand;
  };
  while (i + 1 < call.layers && first(i + 1) <= task) ++i;
  const Work& w = call.work[i];
  phase == 0 ? run_shrink(call, w, task - first(i), scratch) : run_expand(call, w, task - first(i), scratch);
}

void body(void* context, int64_t index) {
  const Call& call = *static_cast<const Call*>(context);
  char* const scratch = call.scratch + call.own + index * call.own_bytes;
  for (int phase = 0; phase < 2; ++phase) {
    for (int64_t i = 0; i < call.threads; ++i) {
      const int64_t share = (index + i) % call.threads;
      const int64_t begin = call.tasks[phase] * share / call.threads;
      const int64_t size = call.tasks[phase] * (share + 1) / call.threads - begin;
      Counter& claimed = *call.counters(call.claimed[phase] + share * kCacheLine);
      while (claimed.load(std::memory_order_relaxed) < size) {
        const int64_t task = claimed.fetch_add(1, std::memory_order_relaxed);
        if (task < size) run_task(call, phase, begin + task, scratch);
      }
    }
  }
}

// The number of threads that should end first, by powers of two, and the cuts of all layers for it.
void choose_cuts(Call& call, int64_t pool_threads) {
  double best = 0;
  for (int64_t threads = 1;; threads = least(2 * threads, pool_threads)) {
    double cycles = region_cycles(threads);
    for (int64_t i = 0; i < call.layers; ++i)
      cycles += cut(call.work[i].size(), threads, *call.kernel, call.dtype).cycles;
    if (threads == 1 || cycles < best) {
      best = cycles;
      call.threads = threads;
    }
    if (threads >= pool_threads) break;
  }
  for (int64_t i = 0; i < call.layers; ++i) {
    Work& w = call.work[i];
    static_cast<Cut&>(w) = cut(w.size(), call.threads, *call.kernel, call.dtype);
  }
}

// Number the tasks and place everything in scratch. False when there is no memory.
bool place(Call& call, Scratch& memory) {
  Layout layout;
  int64_t rows = 0, columns = 0;
  call.tasks[0] = call.tasks[1] = 0;
  for (int64_t i = 0; i < call.layers; ++i) {
    Work& w = call.work[i];
    w.first_shrink = call.tasks[0];
    w.first_expand = call.tasks[1];
    call.tasks[0] += w.blocks * w.shrink_groups * w.parts;
    call.tasks[1] += w.blocks * w.expand_groups;
    rows = most(rows, w.block_rows);
    columns = most(columns, most(w.shrink_panels, w.expand_panels) * kPanel);
  }
  for (int phase = 0; phase < 2; ++phase) {
    call.claimed[phase] = layout.add(call.threads * kCacheLine);
  }
  for (int64_t i = 0; i < call.layers; ++i) {
    Work& w = call.work[i];
    w.ready = layout.add(w.blocks * static_cast<int64_t>(sizeof(Counter)));
    w.arrived = layout.add(w.blocks * w.shrink_groups * static_cast<int64_t>(sizeof(Counter)));
  }
  const int64_t counters = layout.size() / static_cast<int64_t>(sizeof(Counter));
  for (int64_t i = 0; i < call.layers; ++i) {
    Work& w = call.work[i];
    const int64_t width = round_up(w.rank, kPanel);
    w.stride_hidden = width * call.kernel->a_bytes + kCacheLine;
    w.hidden = layout.add(w.layer.M * w.stride_hidden);
    w.partial = layout.add(w.parts > 1 ? w.parts * w.layer.M * width * 4 : 0);
  }
  call.own_bytes = round_up(call.kernel->scratch_bytes(rows, columns), kCacheLine);
  call.own = layout.add(call.threads * call.own_bytes);
  call.scratch = memory.reserve(layout.size());
  if (call.scratch == nullptr) return false;
  for (int64_t i = 0; i < counters; ++i) new (call.counters(0) + i) Counter(0);
  return true;
}

// The rows of a layer from `row` on, at most `rows` of them.
Layer rows_of(Layer l, int64_t row, int64_t rows, DType dtype) {
  const int64_t bytes = element_bytes(dtype);
  l.M = most<int64_t>(0, least(rows, l.M - row));
  l.x = at(l.x, row * l.stride_xm * bytes);
  l.y = at(l.y, row * l.stride_ym * bytes);
  if (l.residual) l.residual = at(l.residual, row * l.stride_resm * bytes);
  if (l.h) l.h = at(l.h, row * l.stride_hm * bytes);
  return l;
}

int64_t rank_of(const Layer& l) {
  const int64_t rank = l.rank_ptr ? *l.rank_ptr : l.rank;
  return rank < 0 ? 0 : least(rank, l.R);
}

// H of a layer has columns beyond a rank that only the memory knows: they are zero.
void zero_beyond(const Layer& l, int64_t rank, DType dtype) {
  const int64_t bytes = element_bytes(dtype), width = l.rank_ptr ? l.R : l.rank;
  if (l.h == nullptr || rank >= width) return;
  for (int64_t i = 0; i < l.M; ++i) {
    char* const row = at(l.h, (i * l.stride_hm + rank) * bytes);
    for (int64_t j = 0; j < (width - rank) * bytes; ++j) row[j] = 0;
  }
}

}  // namespace

const char* isa(DType dtype) { return kernel_for(dtype).isa; }

size_t packed_bytes(int64_t N, int64_t K, int64_t R, DType dtype) {
  return static_cast<size_t>(ceil_div(R, kPanel) * panel_bytes(K, dtype) + ceil_div(N, kPanel) * panel_bytes(R, dtype));
}

void pack(const Layer& layer, DType dtype, void* packed, const Pool& pool) {
  struct Context {
    const Layer* layer;
    DType dtype;
    char* packed;
  } context{&layer, dtype, static_cast<char*>(packed)};
  const auto one = [](void* opaque, int64_t panel) {
    const Context& c = *static_cast<const Context*>(opaque);
    const Layer& l = *c.layer;
    const int64_t v_panels = ceil_div(l.R, kPanel), bytes = element_bytes(c.dtype);
    const int64_t v_bytes = panel_bytes(l.K, c.dtype), u_bytes = panel_bytes(l.R, c.dtype);
    const bool is_v = panel < v_panels;
    const int64_t row = (is_v ? panel : panel - v_panels) * kPanel;
    const int64_t stride = (is_v ? l.stride_vr : l.stride_un) * bytes;
    char* const target = c.packed + (is_v ? panel * v_bytes : v_panels * v_bytes + (panel - v_panels) * u_bytes);
    kernel_for(c.dtype).pack(at(is_v ? l.v : l.u, row * stride), stride, least(kPanel, (is_v ? l.R : l.N) - row),
                             is_v ? l.K : l.R, target);
  };
  pool.run(ceil_div(layer.R, kPanel) + ceil_div(layer.N, kPanel), one, &context);
}

void normalise(const Rows& h, void* out, const void* weight, float eps, float scale, DType dtype, const Pool& pool) {
  struct Context {
    Normalisation all;
    int64_t rows;
    DType dtype;
  } context{{h.M, h.N, static_cast<const char*>(h.data), h.stride * element_bytes(dtype), static_cast<char*>(out),
             h.N * element_bytes(dtype), static_cast<const char*>(weight), eps, scale},
            0,
            dtype};
  if (h.M == 0) return;
  const int64_t parts = least(pool.threads, ceil_div(most<int64_t>(h.M * h.N, 1), kElementsPerThread));
  context.rows = ceil_div(h.M, parts);
  const auto one = [](void* opaque, int64_t part) {
    const Context& c = *static_cast<const Context*>(opaque);
    Normalisation n = c.all;
    const int64_t first = part * c.rows;
    n.rows = least(c.rows, c.all.rows - first);
    n.from += first * n.stride_from;
    n.to += first * n.stride_to;
    if (n.rows > 0) kernel_for(c.dtype).normalise(n);
  };
  if (parts == 1) return one(&context, 0);
  pool.run(parts, one, &context);
}

const char* forward(const Layer* layers, const void* const* packed, int64_t n, DType dtype, const Pool& pool) {
  static thread_local Scratch work_memory, memory;
  constexpr const char* no_memory = "no memory for scratch";
  if (const char* error = isa_error()) return error;
  Work* const work = reinterpret_cast<Work*>(work_memory.reserve(n * static_cast<int64_t>(sizeof(Work))));
  if (work == nullptr) return no_memory;
  int64_t rows = 0;
  for (int64_t i = 0; i < n; ++i) rows = most(rows, layers[i].M);
  for (int64_t row = 0; row < rows; row += kChunkRows) {
    Call call{};
    call.kernel = &kernel_for(dtype);
    call.dtype = dtype;
    call.work = work;
    for (int64_t i = 0; i < n; ++i) {
      if (row >= layers[i].M) continue;
      Work* const w = new (work + call.layers++) Work{};
      w->layer = rows_of(layers[i], row, kChunkRows, dtype);
      w->rank = rank_of(layers[i]);
      if (packed[i]) {
        w->v_panels = static_cast<const char*>(packed[i]);
        w->u_panels = w->v_panels + ceil_div(w->layer.R, kPanel) * panel_bytes(w->layer.K, dtype);
      }
      zero_beyond(w->layer, w->rank, dtype);
    }
    choose_cuts(call, pool.threads);
    if (!place(call, memory)) return no_memory;
    if (call.threads == 1) {
      body(&call, 0);
    } else {
      pool.run(call.threads, body, &call);
    }
  }
  return nullptr;
}

}  // namespace mk::cpu
