// runner CASES OUT [--fault NAME ORDINAL] [--short BYTES]: runs the kernels of csrc/cuda on the calls in a file and
// writes their outputs to another. tests/test_cuda_host.py writes the one and judges the other.
//
// Each call runs three times: in three orders of the threads, with one block, all and two resident at a time, on memory
// that is NaN and counters that the run before has left. The results must agree to the bit. Launches that may overlap
// do so two times of the three, behind a kernel that writes whatever they read when it ends.
#include <cstdint>
#include <fstream>
#include <string>
#include <utility>

#include "decode.cuh"
#include "rows.cuh"

extern "C" const char* __asan_default_options() { return "exitcode=67:detect_stack_use_after_return=1:detect_leaks=0"; }
extern "C" const char* __tsan_default_options() { return "exitcode=66:halt_on_error=1"; }

namespace {

using namespace mk;
using namespace mk::cuda;
using std::string, std::vector;

[[noreturn]] void stop(int status, const string& why) {
  std::fprintf(stderr, "%s\n", why.c_str());
  std::_Exit(status);  // the heap may be damaged
}

// Exactly `bytes`, `shift` bytes off a multiple of 256: what lies beyond is ASan's.
class Buffer {
 public:
  Buffer(size_t bytes, size_t shift)
      : bytes_(bytes), shift_(shift), memory_(static_cast<unsigned char*>(operator new(shift + bytes, kAlignment))) {
    poison();
  }
  Buffer(Buffer&& other) noexcept
      : bytes_(other.bytes_), shift_(other.shift_), memory_(std::exchange(other.memory_, nullptr)) {}
  ~Buffer() {
    if (memory_) operator delete(memory_, kAlignment);
  }
  unsigned char* data() const { return memory_ + shift_; }
  size_t size() const { return bytes_; }
  void poison() { memset(memory_, 0xFF, shift_ + bytes_); }
  bool operator==(const Buffer& other) const { return bytes_ == other.bytes_ && !memcmp(data(), other.data(), bytes_); }

 private:
  static constexpr std::align_val_t kAlignment{256};
  size_t bytes_, shift_;
  unsigned char* memory_;
};

struct Call {
  DType dtype;
  Precision precision;
  Strategy only;
  Device device;
  int streams;
  int64_t sum_by_all;  // -1: as planned
  vector<Layer> layers;
  vector<Buffer> inputs, outputs;
  vector<int32_t> ranks;
};

struct Reader {
  std::ifstream file;
  int64_t number() {
    int64_t value = 0;
    file.read(reinterpret_cast<char*>(&value), 8);
    if (!file) stop(host::kBadInput, "the file ends early");
    return value;
  }
  Buffer buffer(size_t shift) {
    Buffer result(static_cast<size_t>(number()), shift);
    file.read(reinterpret_cast<char*>(result.data()), static_cast<std::streamsize>(result.size()));
    if (!file) stop(host::kBadInput, "the file ends early");
    return result;
  }
};

void read_layer(Reader& in, Call& call) {
  Layer layer{};
  for (int64_t* field : {&layer.M, &layer.N, &layer.K, &layer.R, &layer.rank, &layer.stride_xm, &layer.stride_un,
                         &layer.stride_vr, &layer.stride_ym, &layer.stride_hm})
    *field = in.number();
  layer.activation = static_cast<Activation>(in.number());
  call.ranks.push_back(static_cast<int32_t>(in.number()));
  if (in.number()) layer.rank_ptr = &call.ranks.back();  // reserved in read_call
  const bool wants_h = in.number();
  const auto shift = static_cast<size_t>(in.number());
  const void** const operands[] = {&layer.x, &layer.u, &layer.v, &layer.bias};
  for (const void** operand : operands) {
    call.inputs.push_back(in.buffer(shift));
    *operand = call.inputs.back().size() ? call.inputs.back().data() : nullptr;
  }
  const int64_t element = call.dtype == DType::f32 ? 4 : 2;
  const auto bytes = [&](int64_t stride, int64_t columns) {
    return static_cast<size_t>(((layer.M - 1) * stride + columns) * element);
  };
  call.outputs.emplace_back(bytes(layer.stride_ym, layer.N), shift);
  layer.y = call.outputs.back().data();
  call.outputs.emplace_back(wants_h && layer.rank ? bytes(layer.stride_hm, layer.rank) : 0, shift);
  layer.h = wants_h ? call.outputs.back().data() : nullptr;
  call.layers.push_back(layer);
}

Call read_call(Reader& in) {
  Call call{};
  call.dtype = static_cast<DType>(in.number());
  call.precision = static_cast<Precision>(in.number());
  call.only = static_cast<Strategy>(in.number());
  call.device = {90, static_cast<int32_t>(in.number()), static_cast<int32_t>(in.number()),
                 static_cast<int32_t>(in.number()), false};
  call.streams = static_cast<int>(in.number());
  call.sum_by_all = in.number();
  const int64_t n = in.number();
  call.ranks.reserve(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) read_layer(in, call);
  return call;
}

using Kernel = void (*)(Params);
Kernel find_kernel(const Plan& plan, DType dtype, Precision precision) {
  static constexpr Kernel decode[4][2] = {{decode_kernel<Bf16, 1>, decode_kernel<Bf16, 4>},
                                          {decode_kernel<F16, 1>, decode_kernel<F16, 4>},
                                          {decode_kernel<Tf32, 1>, decode_kernel<Tf32, 4>},
                                          {decode_kernel<Ieee, 1>, decode_kernel<Ieee, 4>}};
  static constexpr Kernel rows[3][2] = {{rows_kernel<Bf16, false>, rows_kernel<Bf16, true>},
                                        {rows_kernel<F16, false>, rows_kernel<F16, true>},
                                        {rows_kernel<Tf32, false>, rows_kernel<Tf32, true>}};
  const int op = dtype == DType::bf16 ? 0 : dtype == DType::f16 ? 1 : precision == Precision::tf32 ? 2 : 3;
  return plan.strategy == Strategy::decode ? decode[op][plan.block_m > 16] : rows[op][plan.block_m > 64];
}

// Memory of one stream.
struct Workspace {
  vector<uint32_t> counters;  // all that the plan asks for and no more
  Buffer scratch;
};

size_t short_bytes = 0;
host::Grid make_grid(const Call& call, const Plan& plan, Workspace& workspace, const vector<Layer>& layers) {
  const auto n = static_cast<int64_t>(layers.size());
  if (const char* reason = mismatch(plan, layers.data(), n, call.dtype, plan.scratch_bytes))
    stop(host::kBadInput, reason);
  const Params params =
      make_params(plan, layers.data(), n, call.dtype, workspace.counters.data(), workspace.scratch.data());
  const int arrays = plan.strategy == Strategy::decode ? 4 : 2;
  const Kernel kernel = find_kernel(plan, call.dtype, call.precision);
  return {plan.blocks, plan.threads,
          static_cast<size_t>(plan.shared_bytes) + static_cast<size_t>(arrays * kSharedGap) - short_bytes,
          [=] { kernel(params); }};
}

// Outputs of a second stream: the same layers on memory of its own.
vector<Layer> with_outputs(const Call& call, vector<Buffer>& outputs) {
  vector<Layer> layers = call.layers;
  for (size_t i = 0; i < layers.size(); ++i) {
    layers[i].y = outputs[2 * i].data();
    if (layers[i].h) layers[i].h = outputs[2 * i + 1].data();
  }
  return layers;
}

// All that the kernel in front writes: factors, x, bias, ranks and, as the launch before, counters.
class Front {
 public:
  Front(Call& call, vector<Workspace>& workspaces) : call_(call), workspaces_(workspaces), ranks_(call.ranks) {
    for (Buffer& input : call.inputs) {
      inputs_.emplace_back(input.data(), input.data() + input.size());
      memset(input.data(), 0xFF, input.size());
    }
    for (int32_t& rank : call.ranks) rank = 1 << 20;
    for (Workspace& workspace : workspaces)
      std::fill(workspace.counters.begin(), workspace.counters.end(), uint32_t{0xFFFF});
  }
  void end() {
    for (size_t i = 0; i < inputs_.size(); ++i)
      if (!inputs_[i].empty()) memcpy(call_.inputs[i].data(), inputs_[i].data(), inputs_[i].size());
    std::copy(ranks_.begin(), ranks_.end(), call_.ranks.begin());
    for (Workspace& workspace : workspaces_)
      std::fill(workspace.counters.begin(), workspace.counters.end(), uint32_t{0});
  }

 private:
  Call& call_;
  vector<Workspace>& workspaces_;
  vector<vector<unsigned char>> inputs_;
  vector<int32_t> ranks_;
};

void run(Call& call, const string& name, std::ofstream& out) {
  const auto n = static_cast<int64_t>(call.layers.size());
  Plan p = plan(call.layers.data(), n, call.dtype, call.precision, call.device, call.only);
  if (call.sum_by_all >= 0) p.sum_by_all = call.sum_by_all;
  std::printf("%s: %s\n", name.c_str(), describe(p).c_str());
  if (p.strategy == Strategy::none) stop(host::kBadInput, name + ": " + describe(p));
  vector<Workspace> workspaces;
  vector<vector<Buffer>> outputs(static_cast<size_t>(call.streams));
  for (auto& buffers : outputs) {
    workspaces.push_back({vector<uint32_t>(static_cast<size_t>(p.counter_bytes / 4), 0),
                          Buffer(static_cast<size_t>(p.scratch_bytes), 0)});
    const auto shift = reinterpret_cast<uintptr_t>(call.outputs[0].data()) % 256;
    for (const Buffer& like : call.outputs) buffers.emplace_back(like.size(), shift);
  }
  const struct {
    host::Order order;
    int resident;
  } runs[] = {{host::Order::kDescending, 1}, {host::Order::kShuffled, 1 << 20}, {host::Order::kShuffled, 2}};
  unsigned seed = 0;
  const bool overlaps = p.overlap;
  for (const auto& r : runs) {
    p.overlap = overlaps && r.resident != 1 << 20;
    vector<host::Grid> grids;
    for (size_t i = 0; i < outputs.size(); ++i) {
      for (Buffer& buffer : outputs[i]) buffer.poison();
      workspaces[i].scratch.poison();
      grids.push_back(make_grid(call, p, workspaces[i], with_outputs(call, outputs[i])));
    }
    if (p.overlap) {
      Front front(call, workspaces);
      host::run_grids(grids, r.resident, r.order, ++seed, [&] { front.end(); });
    } else {
      host::run_grids(grids, r.resident, r.order, ++seed);
    }
    for (size_t i = 0; i < outputs.size(); ++i) {
      for (uint32_t counter : workspaces[i].counters)
        if (counter != 0) stop(host::kWrongResult, name + ": a counter was not left at zero");
      for (size_t b = 0; b < call.outputs.size(); ++b) {
        if (seed == 1 && i == 0) memcpy(call.outputs[b].data(), outputs[i][b].data(), outputs[i][b].size());
        if (!(outputs[i][b] == call.outputs[b]))
          stop(host::kWrongResult, name + ": the result depends on the order of execution");
      }
    }
  }
  for (const Buffer& buffer : call.outputs)
    out.write(reinterpret_cast<const char*>(buffer.data()), static_cast<std::streamsize>(buffer.size()));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) stop(host::kBadInput, "usage: runner CASES OUT [--fault NAME ORDINAL] [--short BYTES]");
  for (int i = 3; i < argc; ++i) {
    const string option = argv[i];
    if (option == "--fault" && i + 2 < argc) {
      const string names[] = {"none",    "block-barrier", "async-wait",
                              "release", "wait-for-h",    "wait-for-kernel-in-front"};
      const auto at = std::find(std::begin(names), std::end(names), argv[i + 1]);
      if (at == std::end(names)) stop(host::kBadInput, "unknown fault");
      host::injection = {static_cast<host::Fault>(at - std::begin(names)), std::atoi(argv[i + 2])};
      i += 2;
    } else if (option == "--short" && i + 1 < argc) {
      short_bytes = static_cast<size_t>(std::atoi(argv[++i]));
    } else {
      stop(host::kBadInput, "unknown option " + option);
    }
  }
  Reader in{std::ifstream(argv[1], std::ios::binary)};
  std::ofstream out(argv[2], std::ios::binary);
  const int64_t count = in.number();
  for (int64_t i = 0; i < count; ++i) {
    Call call = read_call(in);
    run(call, "case " + std::to_string(i), out);
  }
  return host::kPass;
}
