// Index arithmetic against the formulas of the manuals, budgets, refusals and the choice of tiles; part of
// row_test.cpp.
#pragma once

namespace mk::cuda::sm90 {
namespace {

int failures = 0;
#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                                    \
    }                                                                                \
  } while (false)

constexpr int kWidths[] = {64, 128, 192, 256};

void check_layout() {
  for (uint32_t row = 0; row < 256; ++row)
    for (uint32_t piece = 0; piece < 8; ++piece)
      CHECK(piece_offset(row, piece) == ptx::swizzled(row * 128 + piece * 16));
  // Start address / 16 in bits 0..13, stride of 8-row groups / 16 in 32..45, base offset 0 in 49..51, layout in 62..63.
  const uint64_t descriptor = matrix_descriptor(0x2F400);
  CHECK((descriptor & 0x3FFF) == 0x2F40 && (descriptor >> 32 & 0x3FFF) == 64);
  CHECK((descriptor >> 49 & 7) == 0 && descriptor >> 62 == 1);
  for (const int n : {64, 256}) {
    std::vector<int> owners(static_cast<size_t>(64 * n), 0);
    for (int thread = 0; thread < 128; ++thread)
      for (int i = 0; i < n / 2; ++i)
        ++owners[static_cast<size_t>(accumulator_row(thread, i) * n + accumulator_column(thread, i))];
    CHECK(std::count(owners.begin(), owners.end(), 1) == 64 * n);
  }
  // Register 4 s + q of A covers columns 16 s + ..: q % 2 selects the row, q / 2 the right half.
  for (int thread = 0; thread < 128; ++thread)
    for (int reg = 0; reg < 64; ++reg) {
      CHECK(accumulator_row(thread, a_source(reg)) == thread / 32 * 16 + thread % 32 / 4 + reg % 2 * 8);
      CHECK(accumulator_column(thread, a_source(reg)) == reg / 4 * 16 + reg / 2 % 2 * 8 + thread % 4 * 2);
      CHECK(accumulator_column(thread, a_source(reg) + 1) == accumulator_column(thread, a_source(reg)) + 1);
    }
  CHECK(keep_below(-3) == 0 && keep_below(0) == 0 && keep_below(1) == 0xFFFF && keep_below(2) == 0xFFFFFFFF);
}

template <int WIDTH, int GROUPS>
void check_registers() {
  using Split = Registers<WIDTH, GROUPS>;
  constexpr Tile tile = make_tile(WIDTH, GROUPS);
  constexpr int threads = 128 * (GROUPS + 1);
  const int at_launch = 65536 / tile.blocks_per_sm / threads / 8 * 8;  // per thread, in steps of 8
  CHECK(Split::PRODUCER % 8 == 0 && Split::CONSUMER % 8 == 0 && Split::PRODUCER >= 24 && Split::CONSUMER <= 256);
  if (Split::MOVE) CHECK(128 * (Split::PRODUCER + GROUPS * Split::CONSUMER) <= at_launch * threads);
}

void check_budgets() {
  for (const int width : kWidths)
    for (const int groups : {1, 2}) {
      const Tile t = make_tile(width, groups);
      CHECK(t.smem_bytes <= kSharedPerBlock && t.blocks_per_sm * (t.smem_bytes + 1024) <= 228 * 1024);
      CHECK(t.stages >= 3 && t.u_bytes <= t.slot_bytes);
      CHECK(t.slot_bytes % 1024 == 0 && t.x_bytes % 1024 == 0 && t.out_offset % 1024 == 0 && t.out_bytes % 1024 == 0);
      CHECK(t.barrier_offset >= t.out_offset + groups * t.out_bytes);
      CHECK(t.smem_bytes >= t.barrier_offset + 2 * kMaxStages * 8 && t.barrier_offset % 8 == 0);
      CHECK(shrink_bytes(t) < 1 << 20 && expand_bytes(t) < 1 << 20);  // a barrier counts no more
      for (const int cluster : {1, 2, 4}) CHECK(width / cluster % 8 == 0 && kBlockN / cluster % 8 == 0);
    }
  check_registers<64, 1>(), check_registers<64, 2>(), check_registers<128, 1>(), check_registers<128, 2>();
  check_registers<192, 1>(), check_registers<192, 2>(), check_registers<256, 1>(), check_registers<256, 2>();
}

Layer plain_layer(int64_t M, int64_t N, int64_t K, int64_t R) {
  Layer layer{};
  layer.M = M, layer.N = N, layer.K = K, layer.R = layer.rank = R;
  layer.stride_xm = layer.stride_vr = K, layer.stride_un = R, layer.stride_ym = N, layer.stride_hm = R;
  return layer;
}
constexpr Device kHopper{90, 132, kSharedPerBlock, 228 * 1024};

void check_choice() {
  for (const int64_t M : {64, 65, 128, 129, 500, 1000, 4096, 8192, 8500, 16384, 32768, 100000})
    for (const int64_t rank : {1, 64, 65, 127, 200, 256})
      for (const int32_t sms : {1, 3, 114, 132}) {
        const Layer layer = plain_layer(M, 4096, 4096, rank);
        const Device device{90, sms, kSharedPerBlock, 228 * 1024};
        const Config c = choose(layer, device);
        CHECK(invalid(c, layer) == nullptr);
        CHECK(c.width - 64 < rank && rank <= c.width);
        CHECK(int64_t{c.clusters} * c.cluster <=
              std::max<int64_t>(c.cluster, sms * make_tile(c.width, c.groups).blocks_per_sm));
        CHECK(c.cluster == 1 || ceil_div(M, 64 * c.groups) >= c.cluster);
        CHECK(predicted_ns(layer, c, device) > 0);
      }
  // 128 blocks of 64 rows fill a wave that 64 blocks of 128 would half fill; twice the rows, and blocks of 128 do.
  CHECK(choose(plain_layer(8192, 4096, 4096, 256), kHopper).groups == 1);
  CHECK(choose(plain_layer(16384, 4096, 4096, 256), kHopper).groups == 2);
  // 64 rows and a wide H are limited by L2 unless four blocks share; 33 clusters of 4 would leave one to a second
  // round.
  CHECK(choose(plain_layer(8192, 4096, 4096, 256), kHopper).cluster == 4);
  CHECK(choose(plain_layer(132 * 64, 4096, 4096, 256), kHopper).cluster == 2);
}

// Every row group and tile of y belongs to one item, and no item is without tiles.
void check_walks() {
  for (const int32_t groups : {1, 3, 33, 50})
    for (const int32_t n_tiles : {1, 7, 64})
      for (int32_t whole = 0; whole <= groups; ++whole)
        for (int32_t parts = 1; parts <= std::min(n_tiles, 9); ++parts) {
          Walk walk{};
          walk.n_tiles = n_tiles, walk.whole = whole, walk.parts = parts;
          walk.items = whole + (groups - whole) * parts;
          std::vector<int> made(static_cast<size_t>(groups * n_tiles));
          for (int32_t i = 0; i < walk.items; ++i) {
            const Item item = item_of(walk, i);
            CHECK(item.n_begin < item.n_end && item.group < groups);
            for (int32_t n = item.n_begin; n < item.n_end; ++n) ++made[static_cast<size_t>(item.group * n_tiles + n)];
          }
          for (const int times : made) CHECK(times == 1);
        }
  // As wide as tiles of y can be: the product of tiles and parts is more than 32 bits hold.
  Walk wide{};
  wide.n_tiles = 1 << 24, wide.whole = 0, wide.parts = 132, wide.items = 132;
  CHECK(item_of(wide, 131).n_end == 1 << 24 && item_of(wide, 130).n_end == item_of(wide, 131).n_begin);
}

// A last round of few row groups is shared, and shorter for it.
void check_parts() {
  for (const int64_t M : {4097, 9000, 12000, 20000}) {
    const Layer layer = plain_layer(M, 4096, 4096, 128);
    const Config c = choose(layer, kHopper);
    Config alone = c;
    set_walk(alone, layer, kHopper, false);
    CHECK(alone.parts == 1 && alone.whole == row_groups(M, c));
    CHECK(predicted_ns(layer, c, kHopper) <= predicted_ns(layer, alone, kHopper));
  }
  const Layer layer = plain_layer(4096, 4096, 4096, 128);  // 64 blocks of 64 rows
  const Config c = choose(layer, kHopper);
  CHECK(c.parts > 1 && int64_t{c.clusters} * c.cluster > 64);
  const Layer wide = plain_layer(9000, 14336, 4096, 256);
  CHECK(choose(wide, kHopper).parts > 1 && choose(wide, kHopper).whole > 0);
  const Layer full = plain_layer(132 * 64, 4096, 4096, 256);
  CHECK(choose(full, kHopper).parts == 1);
  CHECK(choose(plain_layer(4096, 64, 4096, 128), kHopper).parts == 1);  // one tile of y
}

void refused(const char* expected, DType dtype, const Device& device, void (*change)(Layer&)) {
  Layer layer = plain_layer(128, 64, 64, 64);
  change(layer);
  const char* const why = unsupported(layer, dtype, device);
  const bool same = expected ? why && std::strstr(why, expected) : why == nullptr;
  if (same) return;
  std::fprintf(stderr, "refusal: expected '%s', got '%s'\n", expected ? expected : "none", why ? why : "none");
  ++failures;
}
void refused(const char* expected, void (*change)(Layer&)) { refused(expected, DType::bf16, kHopper, change); }

void check_refusals() {
  alignas(16) static unsigned char memory[64];
  static int32_t rank = 3;
  const auto same = [](Layer&) {};
  refused(nullptr, same);
  refused(nullptr, DType::f16, kHopper, same);
  refused("bfloat16 or float16", DType::f32, kHopper, same);
  refused("compute capability 9.0", DType::bf16, {100, 148, kSharedPerBlock, 228 * 1024}, same);
  refused("shared memory", DType::bf16, {90, 132, 100 * 1024, 228 * 1024}, same);
  refused("rank of at least 1", [](Layer& a) { a.rank = 0; });
  refused(nullptr, [](Layer& a) { a.rank = 63; });
  refused("at most 256", [](Layer& a) { a.rank = a.R = a.stride_un = 264; });
  refused("at most 256", [](Layer& a) { a.rank_ptr = &rank, a.R = a.stride_un = 264; });
  refused("64 rows", [](Layer& a) { a.M = 63; });
  refused("N >= 1", [](Layer& a) { a.K = 0; });
  refused("2^30", [](Layer& a) { a.M = (int64_t{1} << 30) + 1; });
  refused(nullptr, [](Layer& a) { a.bias = memory + 2; });  // not loaded by TMA
  refused("rows of x must", [](Layer& a) { a.stride_xm = 68; });
  refused("rows of x must", [](Layer& a) { a.x = memory + 8; });
  refused("rows of v must", [](Layer& a) { a.stride_vr = 68; });
  refused("rows of u must", [](Layer& a) { a.u = memory + 2; });
  refused("rows of y must", [](Layer& a) { a.stride_ym = 65; });
  refused(nullptr, [](Layer& a) { a.h = memory + 2, a.stride_hm = 63; });  // not stored by TMA
  refused("rows of x overlap", [](Layer& a) { a.stride_xm = 0; });
  refused("rows of u overlap", [](Layer& a) { a.stride_un = 56; });
  refused("rows of v overlap or", [](Layer& a) { a.stride_vr = int64_t{1} << 39; });
  const Layer layer = plain_layer(128, 64, 64, 64);
  CHECK(invalid({64, 1, 2, 1, 1, 1}, layer) == nullptr);
  for (const Config& bad : {Config{32, 1, 2, 1, 1, 1},
                            {320, 1, 2, 1, 1, 1},
                            {64, 3, 2, 1, 1, 1},
                            {64, 1, 3, 1, 1, 1},
                            {64, 1, 2, 2, 1, 1},
                            {64, 1, 2, 0, 1, 1},
                            {64, 1, 2, 1, 2, 1},
                            {64, 1, 2, 1, -1, 1},
                            {64, 1, 2, 1, 1, 0},
                            {64, 1, 2, 1, 0, 2}})
    CHECK(invalid(bad, layer) != nullptr);
  CHECK(invalid({64, 1, 2, 1, 1, 1}, plain_layer(128, 64, 64, 72)) != nullptr);
}

int run_layout() {
  check_layout();
  check_budgets();
  check_choice();
  check_walks();
  check_parts();
  check_refusals();
  return failures > 0;
}

template <int WIDTH, int GROUPS>
void print_budget() {
  using Split = Registers<WIDTH, GROUPS>;
  const Tile t = make_tile(WIDTH, GROUPS);
  const std::string split =
      Split::MOVE ? std::to_string(Split::PRODUCER) + " / " + std::to_string(Split::CONSUMER) : "not moved";
  std::printf("| %d | %d | %d | %d | %d | %d | %d | %d | %s |\n", WIDTH, t.block_m, t.stages, t.slot_bytes / 1024,
              t.u_bytes / 1024, GROUPS * t.out_bytes / 1024, t.smem_bytes, t.blocks_per_sm, split.c_str());
}

int print_table() {
  std::printf(
      "| H | rows | stages | slot, KiB | of it u | staging, KiB | shared, bytes | blocks per SM | registers |\n"
      "|---|---|---|---|---|---|---|---|---|\n");
  print_budget<64, 1>(), print_budget<64, 2>(), print_budget<128, 1>(), print_budget<128, 2>();
  print_budget<192, 1>(), print_budget<192, 2>(), print_budget<256, 1>(), print_budget<256, 2>();
  std::printf("\n| M | N | K | r | tiles | predicted | roofline | share |\n|---|---|---|---|---|---|---|---|\n");
  for (const int64_t N : {4096, 14336})
    for (const int64_t M : {2048, 8192, 16384, 32768})
      for (const int64_t rank : {64, 128, 256}) {
        const double K = 4096, m = double(M), n = double(N), r = double(rank);
        const Layer layer = plain_layer(M, N, 4096, rank);
        const Config c = choose(layer, kHopper);
        const double time = predicted_ns(layer, c, kHopper) / 1e3;
        const double roof = std::max(2 * m * r * (K + n) / 800e6, 2 * (m * K + K * r + r * n + m * n) / 3e6);
        std::printf("| %d | %d | 4096 | %d | %d rows, clusters of %d | %.1f | %.1f | %.0f%% |\n", int(M), int(N),
                    int(rank), 64 * c.groups, c.cluster, time, roof, 100 * roof / time);
      }
  return 0;
}

}  // namespace
}  // namespace mk::cuda::sm90
