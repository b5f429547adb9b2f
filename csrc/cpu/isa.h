// Which instruction set the kernels may use here.
#pragma once

namespace mk::cpu {

// In rising order: each one includes those before it.
enum class Isa { portable, avx2, avx512, avx512_bf16, amx, amx_fp16 };

// The best that the CPU, the operating system and MK_CPU_ISA allow; found once.
Isa best_isa();

}  // namespace mk::cpu
