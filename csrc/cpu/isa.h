// Which instruction set the kernels may use here.
#pragma once

namespace mk::cpu {

// In rising order, on each machine: a set includes those before it that this machine knows.
enum class Isa { portable, neon, avx2, avx512, avx512_bf16, amx, amx_fp16 };

// The best that this build, the CPU, the operating system and MK_CPU_ISA allow; found once.
Isa best_isa();

// The sets that MK_CPU_ISA can name here, best last: "portable, avx2, avx512".
const char* available_isas();

// What is wrong with MK_CPU_ISA, naming what it may be; or null.
const char* isa_error();

}  // namespace mk::cpu
