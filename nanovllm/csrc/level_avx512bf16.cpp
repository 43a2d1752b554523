// Compiled with this instruction set switched on (setup.py); without it there is no such level.
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#include "level.h"

static const Kernels kernels = table("avx512bf16", avx512bf16::quantize);
const Kernels* const nanovllm::avx512bf16_kernels = &kernels;
#else
#include "kernels.h"

const nanovllm::Kernels* const nanovllm::avx512bf16_kernels = nullptr;
#endif
