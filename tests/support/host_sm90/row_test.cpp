// Runs the row kernel of csrc/cuda/sm90 on the machine of simulator.h and checks results, fetches and stores.
//
//   row_test layout           index arithmetic against the formulas of the manuals, budgets, refusals
//   row_test cases            shapes x ranks x clusters x schedules
//   row_test faults           every fault of the machine must be noticed
//   row_test mutant N         a few cases with defect N, where the sources have been given one
//   row_test table            the budget of every configuration, as docs/dev/cuda-sm90.md shows it
#define MK_HOST_DEVICE
#include "../../../csrc/cuda/sm90/row_kernel.cuh"

#include <numeric>

namespace mk::cuda::sm90 {
namespace {

using sim::Fault;
using sim::Order;

struct Case {
  DType dtype = DType::bf16;
  int64_t M, N, K, R, rank;
  Config config{};
  bool device_rank = false, bias = true, stores_h = false, real = false;
  Activation activation = Activation::none;
  Order order = Order::random;
  uint32_t seed = 0;
};

std::string name(const Case& c) {
  char text[320];
  std::snprintf(
      text, sizeof text,
      "%s M=%d N=%d K=%d R=%d rank=%d%s width=%d groups=%d cluster=%d clusters=%d%s%s%s act=%d order=%d seed=%u",
      c.dtype == DType::bf16 ? "bf16" : "f16", int(c.M), int(c.N), int(c.K), int(c.R), int(c.rank),
      c.device_rank ? "(device)" : "", c.config.width, c.config.groups, c.config.cluster, c.config.clusters,
      c.bias ? " bias" : "", c.stores_h ? " h" : "", c.real ? " real" : "", int(c.activation), int(c.order), c.seed);
  return text;
}

float widen(DType dtype, uint16_t bits) {
  return dtype == DType::bf16 ? ptx::unpack<true>(bits) : ptx::unpack<false>(bits);
}
uint16_t narrow(DType dtype, double value) {
  const auto once = static_cast<float>(value);
  return dtype == DType::bf16 ? ptx::round16<true>(once) : ptx::round16<false>(once);
}

using Kernel = void (*)(const RowMaps&, const RowParams&, int32_t);
Kernel find(DType dtype, const Config& c) {
  const int key = c.width * 10 + c.groups;
#ifdef MK_ONE_INSTANCE
  return dtype == DType::bf16 && key == 1282 ? Kernel{run_row_kernel<true, 128, 2>} : nullptr;
#else
  if (dtype == DType::f16) {
    if (key == 642) return run_row_kernel<false, 64, 2>;
    return key == 1921 ? Kernel{run_row_kernel<false, 192, 1>} : nullptr;
  }
  switch (key) {
    case 641:
      return run_row_kernel<true, 64, 1>;
    case 642:
      return run_row_kernel<true, 64, 2>;
    case 1281:
      return run_row_kernel<true, 128, 1>;
    case 1282:
      return run_row_kernel<true, 128, 2>;
    case 1921:
      return run_row_kernel<true, 192, 1>;
    case 1922:
      return run_row_kernel<true, 192, 2>;
    case 2561:
      return run_row_kernel<true, 256, 1>;
    case 2562:
      return run_row_kernel<true, 256, 2>;
    default:
      return nullptr;
  }
#endif
}

// Rows `stride` apart; what is not filled stays NaN.
struct Buffer {
  int64_t rows, columns, stride;
  std::vector<uint16_t> bits;
  Buffer(int64_t rows_, int64_t columns_, int64_t stride_)
      : rows(rows_), columns(columns_), stride(stride_), bits(static_cast<size_t>(rows_ * stride_), 0xFFFF) {}
  uint16_t& at(int64_t i, int64_t j) { return bits[static_cast<size_t>(i * stride + j)]; }
};

double activated(Activation a, double z) {
  switch (a) {
    case Activation::relu:
      return z < 0 ? 0 : z;
    case Activation::gelu:
      return 0.5 * z * (1 + std::erf(z / std::sqrt(2.0)));
    case Activation::gelu_tanh:
      return 0.5 * z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
    case Activation::silu:
      return z / (1 + std::exp(-z));
    default:
      return z;
  }
}

class Run {
 public:
  explicit Run(const Case& c)
      : c_(c),
        x_(c.M, c.K, round8(c.K) + 8),
        v_(c.R, c.K, round8(c.K) + 16),
        u_(c.N, c.R, round8(c.R)),
        y_(c.M, c.N, round8(c.N) + 8),
        h_(c.M, bound(), bound() + c.seed % 3),
        bias_(2, c.N, c.N + c.seed % 2) {
    std::mt19937 random(c.seed * 7919 + 17);
    fill(x_, c.M, c.K, 2, random);
    fill(v_, c.rank, c.K, 1, random);
    fill(u_, c.N, c.rank, 1, random);
    fill(bias_, 2, c.N, 3, random);
  }

  // Throws sim::Failure where anything is wrong.
  void operator()() {
    const Kernel kernel = find(c_.dtype, c_.config);
    if (!kernel) throw std::logic_error("no such instance: " + name(c_));
    // The kernel clamps what it finds there to 0..R.
    const auto beyond = static_cast<int32_t>(c_.seed % 3) * 9;
    const int32_t device_rank = static_cast<int32_t>(c_.rank) + (c_.rank == c_.R ? beyond : c_.rank == 0 ? -beyond : 0);
    const Layer layer{c_.M,
                      c_.N,
                      c_.K,
                      c_.R,
                      bound(),
                      c_.device_rank ? &device_rank : nullptr,
                      ptr(x_),
                      x_.stride,
                      ptr(u_),
                      u_.stride,
                      ptr(v_),
                      v_.stride,
                      c_.bias ? &bias_.at(1, 0) : nullptr,
                      ptr(y_),
                      y_.stride,
                      c_.stores_h ? ptr(h_) : nullptr,
                      h_.stride,
                      c_.activation};
    const Device hopper{90, 132, kSharedPerBlock, 228 * 1024};
    if (const char* why = unsupported(layer, c_.dtype, hopper)) throw std::logic_error(name(c_) + ": " + why);
    if (const char* why = invalid(c_.config, layer)) throw std::logic_error(name(c_) + ": " + why);
    const Matrices m = make_matrices(layer, c_.config);
    const RowMaps maps{map(m.x, &fetches_[0], nullptr), map(m.v, &fetches_[1], nullptr),
                       map(m.u, &fetches_[2], nullptr), map(m.y, nullptr, &y_writes_)};
    y_writes_.assign(y_.bits.size(), 0);
    const RowParams params{
        int32_t(c_.M),   int32_t(c_.N),  int32_t(c_.K),   int32_t(bound()), layer.rank_ptr,
        layer.bias,      layer.h,        layer.stride_hm, c_.activation,    int32_t(items(c_.M, c_.config)),
        c_.config.whole, c_.config.parts};
    sim::machine.run(c_.config.clusters, c_.config.cluster, 128 * (c_.config.groups + 1), c_.order, c_.seed,
                     [&] { kernel(maps, params, c_.config.cluster); });
    check_fetches(m);
    check_writes(y_, y_writes_, "y");
    check_values();
  }

 private:
  static int64_t round8(int64_t n) { return (n + 7) / 8 * 8; }
  static void* ptr(Buffer& b) { return b.bits.data(); }
  int64_t bound() const { return c_.device_rank ? c_.R : c_.rank; }

  // Integers so small that every sum is exact, or random numbers.
  void fill(Buffer& b, int64_t rows, int64_t columns, int range, std::mt19937& random) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        b.at(i, j) = narrow(c_.dtype, c_.real ? normal(random) * 0.1 : int(random() % (2u * range + 1)) - range);
  }

  static ptx::TensorMap map(const Matrix& m, std::map<std::pair<int32_t, int32_t>, int>* fetches,
                            std::vector<uint8_t>* writes) {
    // What cuTensorMapEncodeTiled asks for.
    sim::require(reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride * 2 % 16 == 0, "map: not on 16 bytes");
    sim::require(m.rows >= 1 && m.columns >= 1 && m.rows <= (int64_t{1} << 32), "map: no such size");
    sim::require(m.box_rows >= 1 && m.box_rows <= 256 && m.box_rows % 8 == 0, "map: no such box");
    return {static_cast<const uint16_t*>(m.data), m.rows, m.columns, m.stride, m.box_rows, fetches, writes};
  }

  // x once for each item of its row group, v once for each item, u once for each row group: once per cluster and walk.
  void check_fetches(const Matrices& m) {
    const int64_t groups = row_groups(c_.M, c_.config), all = items(c_.M, c_.config), k_tiles = ceil_div(c_.K, 64),
                  n_tiles = ceil_div(c_.N, 64);
    const struct {
      int64_t boxes, times;
    } expected[] = {{groups * c_.config.cluster * k_tiles, 1},
                    {k_tiles * c_.config.width / m.v.box_rows, all},
                    {n_tiles * (64 / m.u.box_rows) * c_.config.width / 64, groups}};
    for (int i = 0; i < 3; ++i) {
      sim::require(static_cast<int64_t>(fetches_[i].size()) == expected[i].boxes, "boxes of x, v or u were left out");
      for (const auto& box : fetches_[i]) {
        const int64_t rows = int64_t{m.x.box_rows} * c_.config.cluster;
        const bool in_parts = i == 0 && box.first.first / rows >= c_.config.whole;
        sim::require(box.second == (in_parts ? c_.config.parts : expected[i].times),
                     "a box of x, v or u was fetched too often or too rarely");
      }
    }
  }
  static void check_writes(const Buffer& b, const std::vector<uint8_t>& writes, const char* which) {
    for (int64_t i = 0; i < b.rows; ++i)
      for (int64_t j = 0; j < b.stride; ++j)
        if (writes[static_cast<size_t>(i * b.stride + j)] != (j < b.columns))
          throw sim::Failure(std::string(which) + ": an element is not written exactly once");
  }

  void check_values() {
    double worst = 0, worst_pair = 0, largest = 0;
    std::vector<double> h(static_cast<size_t>(c_.rank)), rounded(h.size());
    for (int64_t i = 0; i < c_.M; ++i) {
      for (int64_t r = 0; r < c_.rank; ++r) {
        double sum = 0;
        for (int64_t k = 0; k < c_.K; ++k) sum += double{at(x_, i, k)} * at(v_, r, k);
        h[static_cast<size_t>(r)] = sum;
        rounded[static_cast<size_t>(r)] = widen(c_.dtype, narrow(c_.dtype, sum));
        if (!c_.real && rounded[static_cast<size_t>(r)] != sum) throw std::logic_error("inexact H: " + name(c_));
      }
      if (c_.stores_h) check_h(i, rounded);
      for (int64_t n = 0; n < c_.N; ++n) {
        double exact = c_.bias ? at(bias_, 1, n) : 0, pair = exact;
        for (int64_t r = 0; r < c_.rank; ++r) {
          exact += h[static_cast<size_t>(r)] * at(u_, n, r);
          pair += rounded[static_cast<size_t>(r)] * at(u_, n, r);
        }
        exact = activated(c_.activation, exact);
        pair = widen(c_.dtype, narrow(c_.dtype, activated(c_.activation, pair)));
        const double got = at(y_, i, n);
        const bool is_exact = !c_.real && (c_.activation == Activation::none || c_.activation == Activation::relu);
        if (is_exact ? got != pair : std::isnan(got)) throw sim::Failure(difference("y", i, n, got, pair));
        worst = std::max(worst, std::fabs(got - exact));
        worst_pair = std::max(worst_pair, std::fabs(pair - exact));
        largest = std::max(largest, std::fabs(exact));
      }
    }
    // The gate of maestro_kernels/testing.py: twice the error of two matmuls, plus one rounding.
    const double eps = c_.dtype == DType::bf16 ? 1.0 / 128 : 1.0 / 1024;
    if (worst > 2 * worst_pair + eps * largest) throw sim::Failure("y: error above that of two matmuls");
  }
  void check_h(int64_t i, const std::vector<double>& rounded) {
    for (int64_t r = 0; r < bound(); ++r) {
      const double wanted = r < c_.rank ? rounded[static_cast<size_t>(r)] : 0, got = at(h_, i, r);
      const double room = c_.real ? std::fabs(wanted) / 64 + 1e-6 : 0;  // the sum of another order may round otherwise
      if (!(std::fabs(got - wanted) <= room)) throw sim::Failure(difference("H", i, r, got, wanted));
    }
    for (int64_t r = bound(); r < h_.stride; ++r) sim::require(h_.at(i, r) == 0xFFFF, "H: written beyond its columns");
  }
  double at(Buffer& b, int64_t i, int64_t j) const { return widen(c_.dtype, b.at(i, j)); }
  static std::string difference(const char* what, int64_t i, int64_t j, double got, double wanted) {
    char text[128];
    std::snprintf(text, sizeof text, "%s[%d, %d]: expected %g, got %g", what, int(i), int(j), wanted, got);
    return text;
  }

  Case c_;
  Buffer x_, v_, u_, y_, h_, bias_;
  std::map<std::pair<int32_t, int32_t>, int> fetches_[3];
  std::vector<uint8_t> y_writes_;
};

bool passes(const Case& c, bool quiet = false) {
  try {
    Run run(c);
    run();
    return true;
  } catch (const sim::Failure& failure) {
    if (!quiet) std::fprintf(stderr, "%s\n  %s\n", name(c).c_str(), failure.what());
    return false;
  }
}

// A case of random sizes for a configuration; `i` turns through ranks, features and schedules.
Case draw(DType dtype, int width, int groups, int cluster, uint32_t i) {
  std::mt19937 random(i * 31 + static_cast<uint32_t>(width + groups * 7 + cluster * 3));
  const auto between = [&](int low, int high) { return low + int(random() % uint32_t(high - low + 1)); };
  Case c;
  c.dtype = dtype;
  c.config.width = width;
  c.config.groups = groups;
  c.config.cluster = cluster;
  const int rows = 64 * groups * cluster, row_groups_wanted = between(1, 3);
  c.M = std::max(64, rows * (row_groups_wanted - 1) + between(1, rows));
  const int least = between(1, 2);
  c.K = i % 5 == 0 ? between(1, 63) : i % 5 == 1 ? 64 * between(1, 4) : between(65, 300);
  c.N = i % 4 == 0 ? between(1, 63) : i % 4 == 1 ? 64 * between(1, 4) : between(65, 300);
  // Two of three draws have row groups in parts, to all of them and to one tile of y each.
  const auto wanted = static_cast<int>(row_groups(c.M, c.config)), tiles = static_cast<int>(ceil_div(c.N, 64));
  c.config.whole = i % 3 == 0 ? wanted : between(0, wanted);
  c.config.parts = i % 3 == 0 ? 1 : between(1, std::min(tiles, 4));
  c.config.clusters = static_cast<int32_t>(std::min<int64_t>(items(c.M, c.config), least));
  c.rank = i % 3 == 0 ? width : between(width - 63, width);
  c.device_rank = i % 2 == 1;
  c.R = c.device_rank ? c.rank : (c.rank + 7) / 8 * 8 + 8 * between(0, 4);
  if (c.device_rank) c.rank = i % 8 == 1 ? 0 : i % 8 == 3 ? c.R : between(1, int(c.R));
  c.bias = i % 3 != 1;
  c.stores_h = i % 4 == 2;
  c.real = i % 6 == 4;
  c.activation = static_cast<Activation>(i % 5);
  c.order = static_cast<Order>(i % uint32_t(Order::count));
  c.seed = i;
  return c;
}

int run_cases(uint32_t draws) {
  int count = 0, failed = 0;
  uint32_t i = 0;
  for (const int width : {64, 128, 192, 256})
    for (const int groups : {1, 2})
      for (const int cluster : {1, 2, 4})
        for (uint32_t j = 0; j < draws; ++j, ++i, ++count)
          failed += !passes(draw(DType::bf16, width, groups, cluster, i));
  for (const int width : {64, 192})
    for (uint32_t j = 0; j < draws; ++j, ++i, ++count)
      failed += !passes(draw(DType::f16, width, width == 64 ? 2 : 1, 2, i));
  std::printf("%d cases, %d failed\n", count, failed);
  return failed > 0;
}

Case small_case(uint32_t i) {
  Case c;
  c.config = {128, 2, 2, 1, 1, 2};
  c.M = 300 + i % 200;
  c.N = 200 + i;
  c.K = 250 + i;
  c.rank = 101;
  c.R = 104;
  c.order = static_cast<Order>(i % uint32_t(Order::count));
  c.seed = i;
  if (i % 2) {
    c.device_rank = c.stores_h = true;
    c.R = 120;
  }
  if (i == 5) c.rank = 0;
  return c;
}

int run_mutant(int mutant) {
  sim::mutant = mutant;
  for (uint32_t i = 0; i < 7; ++i)
    if (!passes(small_case(i))) return 1;
  return 0;
}

int run_faults() {
  int missed = 0;
  for (int fault = 0; fault < int(Fault::count); ++fault) {
    sim::machine.fault = static_cast<Fault>(fault);
    bool noticed = false;
    for (uint32_t i = 0; i < 14 && !noticed; ++i) noticed = !passes(small_case(i), true);
    if (noticed == (fault == 0)) {
      std::fprintf(stderr, "fault %d: %s\n", fault, fault == 0 ? "there is none" : "not noticed");
      ++missed;
    }
  }
  std::printf("%d faults, %d missed\n", int(Fault::count) - 1, missed);
  return missed > 0;
}

}  // namespace
}  // namespace mk::cuda::sm90

#include "layout_test.h"

int main(int argc, char** argv) {
  using namespace mk::cuda::sm90;
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "layout") return run_layout();
  if (what == "cases") return run_cases(argc > 2 ? static_cast<uint32_t>(std::atoi(argv[2])) : 6);
  if (what == "faults") return run_faults();
  if (what == "mutant") return run_mutant(argc > 2 ? std::atoi(argv[2]) : 0);
  if (what == "table") return print_table();
  std::fprintf(stderr, "row_test: expected layout, cases, faults, mutant or table, got '%s'\n", what.c_str());
  return 2;
}
