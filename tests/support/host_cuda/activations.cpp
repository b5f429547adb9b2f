// activations CODE IN OUT: the activation of csrc/cuda with that number on a file of floats.
#include <cstdio>
#include <cstdlib>

#ifdef MK_SM90
#include "../../../csrc/cuda/sm90/row_kernel.cuh"
using namespace mk::cuda::sm90;
static float one(mk::Activation code, float z) {
  switch (code) {
    case mk::Activation::relu:
      return activate<mk::Activation::relu>(z);
    case mk::Activation::gelu:
      return activate<mk::Activation::gelu>(z);
    case mk::Activation::gelu_tanh:
      return activate<mk::Activation::gelu_tanh>(z);
    case mk::Activation::silu:
      return activate<mk::Activation::silu>(z);
    case mk::Activation::none:
      return z;
  }
  return z;
}
#else
#include "ops.cuh"
static float one(mk::Activation code, float z) {
  float values[] = {z};
  mk::cuda::activate(values, code);
  return values[0];
}
#endif

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  std::FILE* const in = std::fopen(argv[2], "rb");
  std::FILE* const out = std::fopen(argv[3], "wb");
  if (!in || !out) return 2;
  for (float z; std::fread(&z, sizeof z, 1, in) == 1;) {
    const float y = one(static_cast<mk::Activation>(std::atoi(argv[1])), z);
    std::fwrite(&y, sizeof y, 1, out);
  }
  std::fclose(in);
  return std::fclose(out);
}
