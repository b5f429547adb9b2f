#include "isa.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mk::cpu {
namespace {

#if defined(__x86_64__)

struct Registers {
  uint32_t eax, ebx, ecx, edx;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r{0, 0, 0, 0};
  if (leaf <= __get_cpuid_max(0, nullptr)) __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
  return r;
}

bool all(uint32_t value, uint32_t bits) { return (value & bits) == bits; }

// State components that the operating system saves on a context switch (XCR0).
uint32_t saved_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// Linux hands out the 8 KiB of tile state only to a process that asks.
bool permit_tiles() {
#if defined(__linux__)
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

Isa supported(Isa cap) {
  constexpr uint32_t ymm_state = 0x6, zmm_state = 0xe6, tile_state = 0x60000;
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
  const bool osxsave = all(one.ecx, 1u << 27);
  const uint32_t state = osxsave ? saved_state() : 0;
  const bool avx2 = all(one.ecx, 1u << 12 | 1u << 28 | 1u << 29) && all(seven.ebx, 1u << 5) && all(state, ymm_state);
  if (cap < Isa::avx2 || !avx2) return Isa::portable;
  const bool avx512 = all(seven.ebx, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31) && all(state, zmm_state);  // F DQ BW VL
  if (cap < Isa::avx512 || !avx512) return Isa::avx2;
  if (cap < Isa::avx512_bf16 || !all(seven_one.eax, 1u << 5)) return Isa::avx512;
  const bool amx = all(seven.edx, 1u << 22 | 1u << 24) && all(state, tile_state);  // AMX_BF16, AMX_TILE
  if (cap < Isa::amx || !amx || !permit_tiles()) return Isa::avx512_bf16;
  return cap < Isa::amx_fp16 || !all(seven_one.eax, 1u << 21) ? Isa::amx : Isa::amx_fp16;
}

#else

Isa supported(Isa) { return Isa::portable; }

#endif

Isa cap_from_environment() {
  const char* cap = std::getenv("MK_CPU_ISA");
  if (cap == nullptr) return Isa::amx_fp16;
  if (std::strcmp(cap, "portable") == 0) return Isa::portable;
  if (std::strcmp(cap, "avx2") == 0) return Isa::avx2;
  if (std::strcmp(cap, "avx512") == 0) return Isa::avx512;
  if (std::strcmp(cap, "avx512_bf16") == 0) return Isa::avx512_bf16;
  if (std::strcmp(cap, "amx") == 0) return Isa::amx;
  return Isa::amx_fp16;
}

}  // namespace

Isa best_isa() {
  static const Isa isa = supported(cap_from_environment());
  return isa;
}

}  // namespace mk::cpu
