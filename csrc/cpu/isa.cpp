#include "isa.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

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

// What the CPU has and the operating system saves.
Isa supported() {
  constexpr uint32_t ymm_state = 0x6, zmm_state = 0xe6, tile_state = 0x60000;
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
  const bool osxsave = all(one.ecx, 1u << 27);
  const uint32_t state = osxsave ? saved_state() : 0;
  const bool avx2 = all(one.ecx, 1u << 12 | 1u << 28 | 1u << 29) && all(seven.ebx, 1u << 5) && all(state, ymm_state);
  if (!avx2) return Isa::portable;
  const bool avx512 = all(seven.ebx, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31) && all(state, zmm_state);  // F DQ BW VL
  if (!avx512) return Isa::avx2;
  if (!all(seven_one.eax, 1u << 5)) return Isa::avx512;
  const bool amx = all(seven.edx, 1u << 22 | 1u << 24) && all(state, tile_state);  // AMX_BF16, AMX_TILE
  if (!amx) return Isa::avx512_bf16;
  return all(seven_one.eax, 1u << 21) ? Isa::amx_fp16 : Isa::amx;
}

#else

bool permit_tiles() { return false; }

#if defined(__aarch64__)
Isa supported() { return Isa::neon; }  // which every AArch64 has
#else
Isa supported() { return Isa::portable; }
#endif

#endif

// The sets of this build in rising order, by the names that MK_CPU_ISA takes.
constexpr struct {
  const char* name;
  Isa isa;
} kBuilt[] = {
    {"portable", Isa::portable},
#if defined(MK_HAVE_NEON)
    {"neon", Isa::neon},
#endif
#if defined(MK_HAVE_AVX2)
    {"avx2", Isa::avx2},
#endif
#if defined(MK_HAVE_AVX512)
    {"avx512", Isa::avx512},
#endif
#if defined(MK_HAVE_AVX512_BF16)
    {"avx512_bf16", Isa::avx512_bf16},
#endif
#if defined(MK_HAVE_AMX)
    {"amx", Isa::amx},
    {"amx_fp16", Isa::amx_fp16},
#endif
};

struct Choice {
  Isa isa = Isa::portable;
  std::string available, error;
};

Choice choose() {
  const char* asked = std::getenv("MK_CPU_ISA");
  if (asked != nullptr && *asked == '\0') asked = nullptr;
  const auto is_asked = [&](const char* name) { return asked != nullptr && std::strcmp(asked, name) == 0; };
  Isa limit = supported();
  // A set below tiles leaves the process without their state.
  bool below_tiles = false;
  for (const auto& built : kBuilt) below_tiles |= built.isa < Isa::amx && is_asked(built.name);
  if (limit >= Isa::amx && !below_tiles && !permit_tiles()) limit = Isa::avx512_bf16;
  Choice choice;
  bool found = false;
  for (const auto& built : kBuilt) {
    if (built.isa > limit) break;
    choice.available += (choice.available.empty() ? "" : ", ") + std::string(built.name);
    if (!found) choice.isa = built.isa;
    found |= is_asked(built.name);
  }
  if (asked != nullptr && !found) {
    choice.error = "MK_CPU_ISA: expected one of " + choice.available +
                   " (what this build has and this machine runs), got '" + asked + "'";
  }
  return choice;
}

const Choice& choice() {
  static const Choice made = choose();
  return made;
}

}  // namespace

Isa best_isa() { return choice().isa; }

const char* available_isas() { return choice().available.c_str(); }

const char* isa_error() { return choice().error.empty() ? nullptr : choice().error.c_str(); }

}  // namespace mk::cpu
